"""EffSeg's detectors FQDet and FQDetV2, and the whole model, against their official implementation."""

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_document, reference_dir
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from effseg_inputs import official_state
from torch import Tensor, nn

from querymask import get_cfg
from querymask.common.predictions import Targets, weighted
from querymask.effseg.checkpoint import convert
from querymask.effseg.fqdet import FQDet
from querymask.effseg.fqdet.criterion import MATCHED_RANKS, SELECTED_RANKS, FQDetCriterion, rank_anchors
from querymask.effseg.fqdet.predictions import FQDetPredictions
from querymask.effseg.fqdet.suppression import detect
from querymask.effseg.pasting import foreground_certainty, paste_probabilities

VERSIONS = {"FQDet": 1, "FQDetV2": 2}
SETTINGS = {"kind", "canvas", "image_sizes", "model", "overrides", "slices", "inputs", "arrays", "file", "input_prefix"}
SETTINGS |= {"checkpoint_file", "checkpoint_entry"}
LOSSES = {"sel_loss": "loss_selection", "cls_loss_6_0": "loss_class", "box_loss_6_1": "loss_box"}
NUM_CLASSES = 80


def load_kind(start: str) -> dict[str, dict[str, Any]]:
    if not (reference_dir() / "effseg" / "cases.json").exists():
        return {}
    cases = load_document("effseg")["cases"]
    return {name: case for name, case in cases.items() if case["kind"].startswith(start)}


CASES = load_kind("FQDet")
MODEL_CASES = load_kind("whole model")


def make_detector(case: Mapping[str, Any]) -> FQDet:
    """The detector of a case, its weights loaded strictly; a setting without counterpart is an error."""
    assert not (unknown := set(case) - SETTINGS), f"the case has settings that the project does not know: {unknown}"
    model = dict(case["model"])
    assert case["checkpoint_file"] == model.pop("checkpoint")
    assert case["checkpoint_entry"] is None, f"unknown checkpoint_entry: {case['checkpoint_entry']}"
    model.pop("nms")
    version = VERSIONS[model.pop("detector")]
    detector = FQDet(
        in_features=[],
        neck=nn.Identity(),
        criterion=FQDetCriterion(version),
        version=version,
        num_queries=model.pop("queries"),
        ffn_dim=model.pop("ffn"),
        levels=model.pop("levels"),
        num_classes=NUM_CLASSES,
    )
    assert not model, f"the case has settings that the project does not know: {model}"
    state = official_state(case)
    converted, report = convert(state, detector_only=True)
    assert not [line for line in report.of("dropped") if "heads.gvd.dec_layers" in line.source]
    own = {
        key.removeprefix("detector."): value
        for key, value in converted.items()
        if re.match(r"detector\.(?!neck\.)", key)
    }
    detector.double().load_state_dict(own, strict=True)
    return detector


def run(case: Mapping[str, Any], detector: FQDet) -> tuple[FQDetPredictions, dict[str, Tensor]]:
    """What is found, and the queries after each part of each layer."""
    height, width = case["canvas"]
    batch = len(case["image_sizes"])
    maps = []
    for level in case["model"]["levels"]:
        name = f"{case['input_prefix']}.p{level}"
        shape = (batch, 256, -(-height // 2**level), -(-width // 2**level))
        maps.append(torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)))
    steps: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: steps.__setitem__(name, output))

    for number, layer in enumerate(detector.layers, 1):
        keep(f"dec{number}_cross", layer.cross_attention)
        keep(f"dec{number}_self", layer.self_attention)
        keep(f"dec{number}_ffn", layer.ffn)
    if detector.anchor_encoder is not None:
        keep("prior_encodings", detector.anchor_encoder)
    detector.layers[0].register_forward_hook(lambda module, inputs, output: steps.__setitem__("query_init", inputs[0]))
    return detector.decode(maps, (height, width)), steps


def targets_of(arrays: Mapping[str, np.ndarray], image_sizes: Sequence[tuple[int, int]]) -> tuple[Targets, Tensor]:
    """The targets, and the number that each has in the case."""
    image = torch.from_numpy(arrays["tgt_image"])
    numbers = image.argsort(stable=True)
    boxes, labels = torch.from_numpy(arrays["tgt_boxes"]).double(), torch.from_numpy(arrays["tgt_labels"]).long()
    counts = image.bincount(minlength=len(image_sizes)).tolist()
    return Targets(counts, labels[numbers], boxes[numbers], image_sizes), numbers


def sliced(array: Tensor, text: str | None) -> Tensor:
    """What is stored of an array: a slice in numpy's syntax, of queries flattened over the images."""
    if text is None:
        return array
    parts = [
        tuple(int(n) if n else None for n in part.split(":")) for part in text.strip("[]").replace(" ", "").split(",")
    ]
    return array[tuple(slice(*part) for part in parts)]


@pytest.mark.parametrize("name", CASES)
def test_fqdet(name: str) -> None:
    case, arrays = CASES[name], load_arrays("effseg", CASES[name])
    detector = make_detector(case)
    slices, compared = dict(case["slices"]), set()

    def compare(actual: Any, key: str, slice_name: str | None = None) -> None:
        if isinstance(actual, Tensor):
            actual = sliced(actual.detach(), slices.get(slice_name or key))
        assert_close(actual, arrays[key], key)
        compared.add(key)

    found, steps = run(case, detector)
    num_images, num_anchors = found.selection_logits.shape
    num_queries = detector.num_queries
    compare(found.anchors, "anchors_cxcywh")
    compare(found.selection_logits, "sel_logits")
    compare((found.selected + num_anchors * torch.arange(num_images)[:, None]).flatten(), "sel_ids")
    compare(found.query_anchors.flatten(0, 1), "prior_boxes")
    for key, value in steps.items():
        compare(value.flatten(0, 1), key, "dec" if key.startswith("dec") else "query_init")
    compare(found.logits[0].flatten(0, 1), "cls_logits")
    compare(found.deltas.flatten(0, 1), "box_deltas")
    compare(found.boxes.flatten(0, 1), "pred_boxes")

    detections = [detect(found.logits[0, i], found.boxes[i], case["model"]["nms"]) for i in range(num_images)]
    compare(torch.cat([torch.full_like(d.labels, i) for i, d in enumerate(detections)]), "det_image")
    compare(torch.cat([d.labels for d in detections]), "det_labels")
    compare(torch.cat([d.scores for d in detections]), "det_scores")
    compare(torch.cat([d.boxes for d in detections]), "det_boxes")

    targets, numbers = targets_of(arrays, case["image_sizes"])
    assignment = detector.match(found, targets, {})
    query = assignment.image * num_queries + assignment.query
    compare(query, "train_matched_query")
    compare(numbers[assignment.target], "train_matched_target")
    matched = torch.zeros(num_images * num_queries)
    compare(matched.index_fill(0, query, 1), "train_query_label")
    boxes = targets.boxes.split(targets.counts)
    ranked = [rank_anchors(found.anchors, b) + i * num_anchors for i, b in enumerate(boxes)]
    ranked = torch.cat(ranked, 1)[:, numbers.argsort()]
    assert len(ranked) == MATCHED_RANKS
    # Anchors inside of a target have equal overlaps where they have equal areas: their order is not specified, but no
    # such tie crosses the ranks that matter.
    for ranks in (slice(0, SELECTED_RANKS), slice(SELECTED_RANKS, MATCHED_RANKS)):
        expected = np.sort(arrays["train_top_anchor_ids"][ranks], 0)
        assert_close(ranked[ranks].sort(0).values, expected, "train_top_anchor_ids")
    pairs = torch.stack([ranked[:SELECTED_RANKS], torch.arange(ranked.shape[1]).expand(SELECTED_RANKS, -1)], -1)
    expected = np.stack([arrays["train_sel_pos_anchor"], arrays["train_sel_pos_target"]], -1)
    assert sorted(map(tuple, pairs.reshape(-1, 2).tolist())) == sorted(map(tuple, expected.tolist()))
    compared |= {"train_top_anchor_ids"}
    compared |= {"train_sel_pos_anchor", "train_sel_pos_target", "tgt_boxes", "tgt_labels", "tgt_image"}
    losses = weighted(detector.losses(found, targets, assignment, detector.normalizers(targets, assignment)))
    assert set(losses) == set(LOSSES.values())
    for key, ours in LOSSES.items():
        compare(losses[ours], f"loss.{key}")
    left = {key for key in arrays if key not in compared and not key.startswith("metric.")}  # no outputs of ours
    assert not left, f"the case has arrays that nothing is compared to: {left}"


def test_settings_that_are_not_known() -> None:
    """They fail by name."""
    if not CASES:
        pytest.skip("the folder has no cases of FQDet")
    case = next(iter(CASES.values()))
    with pytest.raises(AssertionError, match="does not know: {'stride'}"):
        make_detector(case | {"stride": 2})
    with pytest.raises(AssertionError, match="does not know: {'dropout': 0.1}"):
        make_detector(case | {"model": case["model"] | {"dropout": 0.1}})


# ---- The whole model ----------------------------------------------------------------------------------------------

MODEL_SETTINGS = {"kind", "model", "images", "overrides", "head", "slices", "arrays", "file", "phase", "mode"}
MODEL_SETTINGS |= {"checkpoint_file", "checkpoint_entry"}
MODEL_LOSSES = LOSSES | {"seg_loss_6_2": "loss_segmentation", "ref_loss_6_2": "loss_refinement"}


def make_model(case: Mapping[str, Any]) -> nn.Module:
    """The model of a case in float64, its weights loaded strictly; a setting without counterpart is an error."""
    assert not (unknown := set(case) - MODEL_SETTINGS), (
        f"the case has settings that the project does not know: {unknown}"
    )
    settings, head = dict(case["model"]), dict(case["head"])
    assert settings.pop("checkpoint") == case["checkpoint_file"]
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(__file__).parents[2] / "projects" / "effseg" / "configs" / "Base-EffSeg.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    effseg = cfg.MODEL.EFFSEG
    effseg.VERSION = VERSIONS[settings.pop("detector")]
    effseg.NUM_QUERIES = settings.pop("queries")
    effseg.DIM_FEEDFORWARD = settings.pop("ffn")
    effseg.NMS_THRESHOLD = settings.pop("nms")
    effseg.LEVELS = settings.pop("levels")
    cfg.MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS = head.pop("refinements")
    assert not settings and not head, f"the case has settings that the project does not know: {settings} {head}"
    model = build_model(cfg).double()
    state = official_state(case)
    model.load_state_dict(convert(state)[0], strict=True)
    # The release keeps the pixels' statistics, for values of 0 to 1, in buffers, which the recipe fills like weights
    for name in ("mean", "std"):
        values = torch.as_tensor(state[f"backbone.in_norm_{name}"])
        getattr(model, f"pixel_{name}").copy_(255 * values.view(3, 1, 1))
    return model


def model_inputs(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """RGB images; the recipe gives BGR."""
    images = [fixture().image(*image) for image in case["images"]]
    return [{"image": torch.from_numpy(np.ascontiguousarray(x[:, :, ::-1].transpose(2, 0, 1)))} for x in images]


@pytest.mark.parametrize("name", [name for name, case in MODEL_CASES.items() if case["phase"] == "inference"])
def test_inference(name: str) -> None:
    case, arrays = MODEL_CASES[name], load_arrays("effseg", MODEL_CASES[name])
    model = make_model(case).eval()
    images = model.preprocess(model_inputs(case))
    with torch.no_grad():
        found, made = model.predict(images)
        assert found.pyramid is not None and found.canvas is not None
    canvas = found.canvas.size
    for level in range(4):
        actual = found.features[f"res{level + 2}"][:, ::16, ::2, ::2]
        assert_close(actual, arrays[f"backbone_{level}"], f"backbone_{level}")
    for level, feature in enumerate(found.pyramid.maps):
        part = feature[:, ::16, ::2, ::2] if level < 4 else feature
        assert_close(part, arrays[f"pyramid_{level}"], f"pyramid_{level}")
    slices, num_anchors = case["slices"], found.selection_logits.shape[1]
    assert_close(sliced(found.selection_logits, slices["sel_logits"]), arrays["sel_logits"], "sel_logits")
    selected = found.selected + num_anchors * torch.arange(len(found.selected))[:, None]
    assert_close(selected.flatten(), arrays["sel_ids"], "sel_ids")
    assert_close(sliced(found.query_anchors.flatten(0, 1), slices["prior_boxes"]), arrays["prior_boxes"], "prior_boxes")
    assert_close(sliced(found.hidden[0].flatten(0, 1), slices["query_dec"]), arrays["query_dec6"], "query_dec6")
    assert_close(sliced(found.logits[0].flatten(0, 1), slices["cls_logits"]), arrays["cls_logits"], "cls_logits")
    assert_close(found.deltas.flatten(0, 1), arrays["box_deltas"], "box_deltas")
    assert_close(found.boxes.flatten(0, 1), arrays["pred_boxes"], "pred_boxes")

    labels, scores, queries, areas, masks = [], [], [], [], []
    for image, size in enumerate(images.image_sizes):
        with torch.no_grad():
            chosen = model.detector.select(found, image, size)
            region, _, regions = model.mask_branch.regions(found, image, chosen)
            probabilities = model.mask_branch.head(made.of_image(image), canvas, regions)
            pasted = paste_probabilities(probabilities, regions.boxes, (0, canvas[0]), (0, canvas[1]))
        unique = chosen.pred_queries.unique() + image * model.detector.num_queries
        assert_close(unique, arrays[f"img{image}_roi_query"], f"img{image}_roi_query")
        part = pasted[region[:5], ::4, ::4]
        assert_close(part, arrays[f"img{image}_mask_scores"], f"img{image}_mask_scores")
        labels.append(chosen.pred_classes)
        scores.append(chosen.scores * foreground_certainty(pasted)[region])
        queries.append(chosen.pred_queries + image * model.detector.num_queries)
        masks.append((pasted > 0.5)[region])
        areas.append(masks[-1].sum((1, 2)))
    assert_close(torch.cat(labels), arrays["seg_labels"], "seg_labels")
    assert_close(torch.cat(queries), arrays["seg_query"], "seg_query")
    assert_close(torch.cat(scores), arrays["seg_scores"], "seg_scores")
    assert_close(torch.cat(areas), arrays["seg_mask_area"], "seg_mask_area")
    packed = np.packbits(torch.cat(masks)[::10].numpy(), axis=-1)
    assert_close(packed, arrays["seg_masks_packed"], "seg_masks_packed")


@pytest.mark.parametrize("name", [name for name, case in MODEL_CASES.items() if case["phase"] == "training"])
def test_training(name: str) -> None:
    """Losses with tolerant refinement targets; gradients as near as these come to the release's strict ones.

    The stored gradients are of targets 0 < v < 1, which rounding decides for some full cells, other ones on every
    machine. So the gradient of the refinement loss may differ by the share of these cells among those of the border.
    What this loss does not reach must be equal: the selection, and the box head, to which the release's masks give
    no gradient.
    """
    case, arrays = MODEL_CASES[name], load_arrays("effseg", MODEL_CASES[name])
    model = make_model(case).train()
    batch = model_inputs(case)
    sizes = [tuple(item["image"].shape[1:]) for item in batch]
    targets, _ = targets_of(arrays, sizes)
    boxes, labels = (x.split(targets.counts) for x in (targets.boxes, targets.labels))
    for item, image_boxes, image_labels in zip(batch, boxes, labels, strict=True):
        instances = Instances(tuple(item["image"].shape[1:]))
        instances.gt_boxes, instances.gt_classes = Boxes(image_boxes), image_labels
        instances.gt_boxes.tensor = image_boxes
        instances.gt_masks = BitMasks(ellipses(image_boxes, instances.image_size))
        item["instances"] = instances
    losses = model(batch)
    tolerant = sum(arrays[f"stage{stage}_ref_loss_tolerant"] for stage in range(4))
    for key, ours in MODEL_LOSSES.items():
        expected = tolerant if key.startswith("ref_loss") else arrays[f"loss.{key}"]
        assert_close(losses[ours].detach(), expected, f"loss.{key}")
    assert len(losses) == len(MODEL_LOSSES)
    names = {line.source: line.target for line in convert(official_state(case))[1].lines}
    parameters, keys = dict(model.named_parameters()), [key for key in arrays if key.startswith("grad.")]
    chosen = [parameters[names[key.removeprefix("grad.")]] for key in keys]
    of_refinement = torch.autograd.grad(losses.pop("loss_refinement"), chosen, retain_graph=True, allow_unused=True)
    of_others = torch.autograd.grad(sum(losses.values()), chosen)
    _, fragile, _, positive = arrays["fragile"].T
    share = float((fragile / positive).max())
    assert share < 0.05
    for key, refinement, others in zip(keys, of_refinement, of_others):
        refinement = torch.zeros_like(others) if refinement is None else refinement
        allowed = share * float(refinement.abs().max() / np.abs(arrays[key]).max())
        gradient = refinement + others
        if ".sub_modules." in key and gradient.dim() == 4:  # stored tap-major, then channels
            gradient = gradient.permute(0, 2, 3, 1)
        gradient = gradient.flatten()
        assert_close(gradient[:: max(1, len(gradient) // 500)], arrays[key], key, tolerance=1e-5 + allowed)


def ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Those inscribed in the boxes (n, 4), as (n, H, W) bool."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=boxes.dtype) + 0.5 for side in size), indexing="ij")
    low, high = boxes[:, None, None, :2], boxes[:, None, None, 2:]
    position = (torch.stack([x, y], -1) - (low + high) / 2) / ((high - low) / 2)
    return position.square().sum(-1) <= 1
