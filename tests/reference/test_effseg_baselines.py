"""The heads that EffSeg is compared with, against the official implementation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_manifest
from effseg_inputs import PastedDetections, make_input, paste
from torch import Tensor

from querymask.common.checkpoint import apply_rules
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.fqdet.suppression import Detections, detect
from querymask.effseg.heads.checkpoint_baselines import BASELINE_HEAD_RULES
from querymask.effseg.heads.class_masks import ClassMaskHead
from querymask.effseg.heads.mask_rcnn import MaskRCNNHead
from querymask.effseg.heads.pointrend import PointRendHead
from querymask.effseg.heads.refine_mask import RefineMaskHead
from querymask.effseg.regions import STRIDES, Regions

HEADS: dict[str, tuple[str, str, type[ClassMaskHead]]] = {
    "Mask R-CNN++ head": ("mrcnn", "MaskRCNNBranch", MaskRCNNHead),
    "PointRend++ head": ("pointrend", "PointRendBranch", PointRendHead),
    "RefineMask++ head": ("refinemask", "RefineMaskBranch", RefineMaskHead),
}
CASES = {name: case for kind in HEADS for name, case in load_cases("effseg", kind).items()}
SETTINGS = {"kind", "canvas", "image_sizes", "checkpoint", "inputs", "arrays", "file", "input_prefix", "head_name"}
SETTINGS |= {"checkpoint_file", "checkpoint_entry"}
INPUTS = {"pyramid", "queries", "class logits", "boxes"}
WIDTH, NUM_CLASSES, LEVELS = 256, 80, range(2, 8)
NMS_THRESHOLD = 0.65


def make_head(case: Mapping[str, Any]) -> ClassMaskHead:
    """The head of a case, its weights loaded strictly; a setting without counterpart is an error."""
    assert not (unknown := set(case) - SETTINGS), f"the case has settings that the project does not know: {unknown}"
    assert not (unknown := set(case["inputs"]) - INPUTS), f"the case has inputs that the test does not know: {unknown}"
    entry, name, head_class = HEADS[case["kind"]]
    assert (case["head_name"], case["checkpoint_entry"]) == (entry, entry), f"unknown head: {case['head_name']}"
    manifest = load_manifest("effseg", case["checkpoint_file"])[entry]
    state = {key: torch.as_tensor(fixture().weight(key, shape)) for key, shape in manifest.items()}
    converted, report = apply_rules(state, BASELINE_HEAD_RULES[name])
    assert not report.of("used", "dropped"), "every key is renamed"
    head = head_class(WIDTH, NUM_CLASSES).double()
    head.load_state_dict({key.removeprefix("mask_branch.head."): value for key, value in converted.items()})
    return head.eval()


def make_pairs(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[tuple[Regions, Detections, Tensor]]:
    """For every image its pairs of query and class, its detections, and the numbers of the pairs' boxes."""
    boxes, images = torch.from_numpy(arrays["boxes"]).double(), torch.from_numpy(arrays["box_image"]).long()
    queries = make_input(case, "query", (len(boxes), WIDTH))
    logits = make_input(case, "cls", (len(boxes), NUM_CLASSES + 1))
    result = []
    for image in range(len(case["image_sizes"])):
        (rows,) = (images == image).nonzero(as_tuple=True)
        found = detect(logits[rows], boxes[rows], NMS_THRESHOLD, drop_empty=False)
        chosen = rows[found.queries]
        result.append((Regions(boxes[chosen], images[chosen], queries[chosen], found.labels), found, chosen))
    return result


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_head(name: str) -> None:
    case, arrays = CASES[name], load_arrays("effseg", CASES[name])
    head, canvas = make_head(case), tuple(case["canvas"])
    sizes = [tuple(-(-side // 2**level) for side in canvas) for level in LEVELS]
    batch = len(case["image_sizes"])
    maps = [make_input(case, f"p{level}", (batch, WIDTH, *size)) for level, size in zip(LEVELS, sizes)]
    pyramid = FeaturePyramid(maps[: len(STRIDES)], STRIDES)
    compared = {"boxes", "box_image"}

    def compare(actual: Any, key: str, tolerance: float = 1e-5) -> None:
        assert_close(actual, arrays[key], key, tolerance)
        compared.add(key)

    detections = PastedDetections(compare)
    steps: dict[str, Tensor] = {}
    head.query_fusion.register_forward_hook(lambda _, inputs, output: steps.update(fused=inputs[0] + output))
    for image, (regions, found, chosen) in enumerate(make_pairs(case, arrays)):
        steps.clear()
        # Of the image's own maps, as in the model: RefineMask's semantic convolutions are the most costly part
        own = Regions(regions.boxes, torch.zeros_like(regions.images), regions.queries, regions.labels)
        logits = head.logits(pyramid.of_image(image), own)
        compare(steps["fused"][::10, ::8, ::2, ::2], f"img{image}_fused_roi_features")
        compare(logits[::5, ::2, ::2], f"img{image}_mask_logits")
        probabilities = logits.sigmoid()
        if image == batch - 1:  # found among the maps of all images
            few = slice(None, None, 40)
            torch.testing.assert_close(head(pyramid, canvas, regions[few]), probabilities[few])

        pasted = paste(probabilities, regions.boxes, canvas)
        detections.add(image, pasted, found, chosen)
    detections.compare_all()
    left = set(arrays) - compared
    assert not left, f"the case has arrays that nothing is compared to: {left}"


def test_settings_that_are_not_known() -> None:
    """They fail by name."""
    if not CASES:
        pytest.skip("the folder has no cases of these heads")
    case = next(iter(CASES.values()))
    with pytest.raises(AssertionError, match="does not know: {'subdivisions'}"):
        make_head(case | {"subdivisions": 2})
    with pytest.raises(AssertionError, match="does not know: {'targets'}"):
        make_head(case | {"inputs": case["inputs"] | {"targets": ""}})
    with pytest.raises(AssertionError, match="unknown head: cascade"):
        make_head(case | {"head_name": "cascade"})
