"""The merge of queries to a panoptic map, on given masks and on those of EffSeg's head, against the official
implementation.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import assert_close, load_arrays, load_cases, load_document, load_manifest, reference_dir
from effseg_inputs import fixed_weights, make_input, paste
from torch import Tensor, nn

from querymask.common.checkpoint import Drop, Options, apply_rules, fit_to_model, recognise
from querymask.common.flops import count_parameters
from querymask.common.masks import Bands, pasted_bands
from querymask.common.measured_models import build_on_meta
from querymask.common.panoptic import (
    VOID,
    PanopticRule,
    Segments,
    contest_pixels,
    keep_agreeing,
    keep_large,
    keep_scores,
    merge,
    panoptic_output,
    suppress_masks,
)
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.fqdet import FQDet
from querymask.effseg.fqdet.criterion import FQDetCriterion
from querymask.effseg.heads.checkpoint_effseg import EFFSEG_HEAD_RULES
from querymask.effseg.heads.effseg import EffSegHead
from querymask.effseg.regions import STRIDES, Regions
from querymask.model_zoo import get_value, read_config

MERGES = load_cases("panoptic", "panoptic merge")
HEADS = load_cases("panoptic", "EffSeg head, panoptic")
SETTINGS = {"kind", "file", "seed", "image_sizes", "canvas", "settings", "margins", "arrays"}
SETTINGS_OF_MERGES = SETTINGS | {"original_sizes", "queries_per_image"}
SETTINGS_OF_HEADS = SETTINGS | {"input_prefix", "overrides", "class_shift"}
THRESHOLDS = {
    "score_thr": "score",
    "mask_thr": "mask",
    "nms_thr": "nms",
    "pan_mask_thr": "pixel",
    "ins_pan_thr": "agreement",
    "area_thr": "area",
}
NUM_THINGS = 80
LEVELS = range(2, 6)


class Case:
    """A case, whose arrays must all be compared; a setting without counterpart is an error."""

    def __init__(self, case: Mapping[str, Any], known: set[str]) -> None:
        assert not (unknown := set(case) - known), f"the case has settings that the project does not know: {unknown}"
        settings = dict(case["settings"])
        self.box_nms = settings.pop("box_nms")
        self.refinements = settings.pop("refinements", None)
        thresholds = {name: settings.pop(key) for key, name in THRESHOLDS.items()}
        assert not settings, f"the case has settings that the project does not know: {settings}"
        self.rule = PanopticRule(NUM_THINGS, **thresholds)
        self.num_classes = len(load_document("panoptic")["general"]["category_ids"])
        self.arrays = load_arrays("panoptic", case)
        self.canvas = tuple(case["canvas"])
        self.compared: set[str] = set()

    def compare(self, actual: Any, key: str) -> None:
        assert_close(actual, self.arrays[key], key)
        self.compared.add(key)

    def select(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, labels and scores of an image, as the detector selects them."""
        detector = FQDet(
            [], nn.Identity(), FQDetCriterion(2), num_layers=0, num_classes=self.num_classes, nms_threshold=self.box_nms
        )
        return detector.select_queries(SimpleNamespace(logits=logits[None, None], boxes=boxes[None]), 0)

    def compare_steps(self, image: int, numbers: Tensor, labels: Tensor, scores: Tensor, bands: Bands) -> Segments:
        """All steps of an image's merge one by one; the segments that they give together.

        Args:
            numbers: (n,) of the queries among those of all images.
        """
        self.compare(numbers, f"img{image}_box_nms")
        rows = keep_scores(scores, self.rule.score)
        self.compare(numbers[rows], f"img{image}_score")
        rows, areas = suppress_masks(rows, bands, self.canvas, self.rule)
        self.compare(numbers[rows], f"img{image}_mask_nms")
        contest = contest_pixels(rows, scores, areas, bands, self.canvas, self.rule)
        self.compare(contest.areas, f"img{image}_argmax_area")
        kept = keep_agreeing(contest, self.rule.agreement)
        self.compare(numbers[rows[kept]], f"img{image}_instance_iou")
        self.compare(numbers[rows[keep_large(contest, kept, self.rule.area)]], f"img{image}_area")
        segments = merge(labels, scores, bands, self.canvas, self.rule)
        self.compare(segments.labels, f"img{image}_labels")
        self.compare(segments.scores, f"img{image}_scores")
        self.compare(segments.numbers, f"img{image}_map")
        areas = (segments.numbers[segments.numbers != VOID]).bincount(minlength=len(segments.labels))
        self.compare(areas, f"img{image}_segment_area")
        return segments

    def finish(self) -> None:
        assert not (left := set(self.arrays) - self.compared), (
            f"the case has arrays that nothing is compared to: {left}"
        )


def made_up_masks(shapes: Tensor, boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(n, H, W) soft ellipses, cut off at their boxes."""
    cx, cy, a, b, cos, sin, k, amplitude = (column[:, None, None] for column in shapes.unbind(1))
    x0, y0, x1, y1 = (column[:, None, None] for column in boxes.unbind(1))
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in canvas), indexing="ij")
    dx, dy = x - cx, y - cy
    d = ((dx * cos + dy * sin) / a) ** 2 + ((dy * cos - dx * sin) / b) ** 2
    return amplitude / (1 + (-k * (1 - d)).exp()) * ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))


@pytest.mark.parametrize("name", MERGES)
def test_merge(name: str) -> None:
    settings = MERGES[name]
    case = Case(settings, SETTINGS_OF_MERGES)
    shapes, logits, boxes = (torch.from_numpy(case.arrays[key]).double() for key in ("shapes", "cls_logits", "boxes"))
    case.compared |= {"shapes", "cls_logits", "boxes"}
    count = settings["queries_per_image"]
    for image, (size, original) in enumerate(zip(settings["image_sizes"], settings["original_sizes"], strict=True)):
        own = slice(image * count, (image + 1) * count)
        queries, labels, scores = case.select(logits[own], boxes[own])
        masks = made_up_masks(shapes[own], boxes[own], case.canvas)[queries]
        bands = lambda rows, top, bottom, masks=masks: masks[rows, top:bottom]  # noqa: E731
        segments = case.compare_steps(image, queries + own.start, labels, scores, bands)

        ids, found = panoptic_output(segments, tuple(size), tuple(original), NUM_THINGS)
        case.compare(ids - 1, f"img{image}_original_map")
        areas = ids.flatten().bincount(minlength=len(segments.labels) + 1)[1:]
        case.compare(areas, f"img{image}_original_area")
        assert [segment["id"] for segment in found] == (1 + areas.nonzero().flatten()).tolist()
        assert [segment["category_id"] for segment in found] == [
            label for label, area in zip(segments.labels, areas, strict=True) if area
        ]
        assert all(segment["isthing"] is (segment["category_id"] < NUM_THINGS) for segment in found)
    case.finish()


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_head(name: str) -> None:
    settings = HEADS[name]
    case = Case(settings, SETTINGS_OF_HEADS)
    head = EffSegHead(refinements=case.refinements)
    state = fixed_weights(load_manifest("panoptic", "checkpoint.json"), settings["overrides"])
    rules = [Drop(r"^(?!heads\.gvd\.heads\.2\.)", "not of the head"), *EFFSEG_HEAD_RULES]
    converted, _ = apply_rules({key: torch.as_tensor(value) for key, value in state.items()}, rules)
    head.double().load_state_dict({key.removeprefix("mask_branch.head."): value for key, value in converted.items()})

    boxes, images = torch.from_numpy(case.arrays["boxes"]).double(), torch.from_numpy(case.arrays["box_image"]).long()
    case.compared |= {"boxes", "box_image"}
    features = make_input(settings, "query", (len(boxes), 256))
    logits = make_input(settings, "cls", (len(boxes), case.num_classes + 1)) + settings["class_shift"]
    batch = len(settings["image_sizes"])
    sizes = [tuple(-(-side // 2**level) for side in case.canvas) for level in LEVELS]
    maps = [make_input(settings, f"p{level}", (batch, 256, *size)) for level, size in zip(LEVELS, sizes, strict=True)]
    pyramid = FeaturePyramid(maps, STRIDES)
    for image in range(batch):
        (rows,) = (images == image).nonzero(as_tuple=True)
        queries, labels, scores = case.select(logits[rows], boxes[rows])
        chosen = rows[queries]
        regions = Regions(boxes[chosen], torch.zeros_like(chosen), features[chosen], labels)
        probabilities = head(pyramid.of_image(image), case.canvas, regions)
        bands = pasted_bands(probabilities, regions.boxes, case.canvas[1])
        pasted = bands(torch.arange(len(chosen)), 0, case.canvas[0])
        torch.testing.assert_close(pasted, paste(probabilities, regions.boxes, case.canvas))
        # The case's boxes are rounded to float32: 1e-5 of a pixel, across which a mask can fall from 1 to 0 at its rim
        key = f"img{image}_pasted_scores"
        assert_close(pasted[::3, ::4, ::4], case.arrays[key], key, 5e-5)
        case.compared.add(key)
        case.compare_steps(image, chosen, labels, scores, bands)
    case.finish()


# ---- Published files ----------------------------------------------------------------------------------------------

SEGMENTATION_HEAD = "heads.gvd.heads.2."
CONFIGS = Path(__file__).parents[2] / "projects" / "effseg" / "configs" / "panoptic"
# Entry of checkpoint_heads.json, None for checkpoint.json -> config, what the head is called, trained parameters
PUBLISHED = {
    None: ("effseg_v2_r50_panoptic", "EffSeg", 41_840_475),
    "mrcnn": ("mask_rcnn_v2_r50_panoptic", "Mask R-CNN++", 40_551_416),
    "pointrend": ("pointrend_v2_r50_panoptic", "PointRend++", 40_902_806),
    "refinemask": ("refine_mask_v2_r50_panoptic", "RefineMask++", 44_236_096),
}


def manifests() -> dict[str | None, dict[str, list[int]]]:
    """Keys and shapes of the published files; a baseline's head stands in the place of EffSeg's."""
    folder = reference_dir() / "panoptic"
    if not (folder / "checkpoint.json").exists():
        return {}
    whole = load_manifest("panoptic", "checkpoint.json")
    detector = {key: shape for key, shape in whole.items() if not key.startswith(SEGMENTATION_HEAD)}
    heads = load_manifest("panoptic", "checkpoint_heads.json") if (folder / "checkpoint_heads.json").exists() else {}
    return {None: whole, **{name: detector | head for name, head in heads.items()}}


@pytest.mark.parametrize("entry", manifests())
def test_published_file_fits_its_config(entry: str | None) -> None:
    name, title, size = PUBLISHED[entry]
    state = {
        key: torch.tensor(zlib.crc32(key.encode()) / 2**32).expand(tuple(shape))
        for key, shape in manifests()[entry].items()
    }
    cfg = read_config(CONFIGS / f"{name}.yaml")
    format = recognise(state)
    assert format.describe(state) == f"{title} on FQDetV2 (R50, 6 layers, 133 classes, panoptic)"
    options = Options(class_ids=None, drop_classes=False, detector_only=False, model_keys=())
    wanted = format.settings(state, options)
    assert wanted["MODEL.PANOPTIC.ENABLED"] is True and wanted["MODEL.EFFSEG.NUM_CLASSES"] == 133
    assert {key: get_value(cfg, key) for key in wanted} == wanted
    model = build_on_meta(cfg)
    assert count_parameters(model)[""].trainable == size
    fitted, report = fit_to_model(
        *format.convert(state, options), {key: value.shape for key, value in model.state_dict().items()}
    )
    assert report.fits, report.details(*report.MISFITS)
    assert {line.source for line in report.of("dropped")} == {"backbone.in_norm_mean", "backbone.in_norm_std"}
    for line in report.of("used", "renamed"):  # every tensor keeps its value
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line

    # For other data or boxes alone it is a file like others
    for part in ({"drop_classes": True}, {"detector_only": True}):
        assert "MODEL.PANOPTIC.ENABLED" not in format.settings(state, dataclasses.replace(options, **part))


def test_settings_that_are_not_known() -> None:
    """They fail by name."""
    if not MERGES:
        pytest.skip("the folder has no cases of the merge")
    case = next(iter(MERGES.values()))
    with pytest.raises(AssertionError, match="does not know: {'stride'}"):
        Case(case | {"stride": 2}, SETTINGS_OF_MERGES)
    with pytest.raises(AssertionError, match="does not know: {'sharing': 1}"):
        Case(case | {"settings": case["settings"] | {"sharing": 1}}, SETTINGS_OF_MERGES)
