"""EffSeg's detectors FQDet and FQDetV2 against their official implementation: network, detections, matching, losses."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_document, load_manifest, reference_dir
from torch import Tensor

from querymask.effseg.checkpoint import convert_detector
from querymask.effseg.criterion import MATCHED_RANKS, SELECTED_RANKS, FQDetCriterion, rank_anchors
from querymask.effseg.fqdet import FQDet, FQDetOutput, detect

VERSIONS = {"FQDet": 1, "FQDetV2": 2}
SETTINGS = {"kind", "canvas", "image_sizes", "model", "overrides", "slices", "inputs", "arrays", "file", "input_prefix"}
SETTINGS |= {"checkpoint_file", "checkpoint_entry"}
LOSSES = {"sel_loss": "loss_selection", "cls_loss_6_0": "loss_class", "box_loss_6_1": "loss_box"}
NUM_CLASSES = 80


def load_detector_cases() -> dict[str, dict[str, Any]]:
    if not (reference_dir() / "effseg" / "cases.json").exists():
        return {}
    cases = load_document("effseg")["cases"]
    return {name: case for name, case in cases.items() if case["kind"].startswith("FQDet")}


CASES = load_detector_cases()


def make_detector(case: Mapping[str, Any]) -> FQDet:
    """The detector of a case, its weights loaded strictly; a setting without counterpart is an error."""
    assert not (unknown := set(case) - SETTINGS), f"the case has settings that the project does not know: {unknown}"
    model = dict(case["model"])
    assert case["checkpoint_file"] == model.pop("checkpoint")
    assert case["checkpoint_entry"] is None, f"unknown checkpoint_entry: {case['checkpoint_entry']}"
    model.pop("nms")
    detector = FQDet(
        version=VERSIONS[model.pop("detector")],
        num_queries=model.pop("queries"),
        ffn_dim=model.pop("ffn"),
        levels=model.pop("levels"),
        num_classes=NUM_CLASSES,
    )
    assert not model, f"the case has settings that the project does not know: {model}"
    manifest = load_manifest("effseg", case["checkpoint_file"])
    state = {key: fixture().weight(key, shape) for key, shape in manifest.items()}
    for operation, entries in case["overrides"].items():
        for key, number in entries.items():
            assert operation in ("multiply", "add"), f"unknown override: {operation}"
            state[key] = state[key] * number if operation == "multiply" else state[key] + number
    converted, report = convert_detector(state)
    assert not [line for line in report.of("dropped") if "heads.gvd.dec_layers" in line.source]
    detector.double().load_state_dict(converted, strict=True)
    return detector


def run(case: Mapping[str, Any], detector: FQDet) -> tuple[FQDetOutput, dict[str, Tensor]]:
    """The output, and the queries after each part of each layer."""
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
    return detector(maps, (height, width)), steps


def targets_of(arrays: Mapping[str, np.ndarray], images: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Boxes, labels and numbers of the targets of each image."""
    image = torch.from_numpy(arrays["tgt_image"])
    boxes, labels = torch.from_numpy(arrays["tgt_boxes"]).double(), torch.from_numpy(arrays["tgt_labels"]).long()
    numbers = [(image == i).nonzero().flatten() for i in range(images)]
    return [boxes[n] for n in numbers], [labels[n] for n in numbers], numbers


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

    output, steps = run(case, detector)
    num_images, num_anchors = output.selection_logits.shape
    num_queries = detector.num_queries
    compare(output.anchors, "anchors_cxcywh")
    compare(output.selection_logits, "sel_logits")
    compare((output.selected + num_anchors * torch.arange(num_images)[:, None]).flatten(), "sel_ids")
    compare(output.query_anchors.flatten(0, 1), "prior_boxes")
    for key, value in steps.items():
        compare(value.flatten(0, 1), key, "dec" if key.startswith("dec") else "query_init")
    compare(output.class_logits.flatten(0, 1), "cls_logits")
    compare(output.deltas.flatten(0, 1), "box_deltas")
    compare(output.boxes.flatten(0, 1), "pred_boxes")

    found = [detect(output.class_logits[i], output.boxes[i], case["model"]["nms"]) for i in range(num_images)]
    compare(torch.cat([torch.full_like(d.labels, i) for i, d in enumerate(found)]), "det_image")
    compare(torch.cat([d.labels for d in found]), "det_labels")
    compare(torch.cat([d.scores for d in found]), "det_scores")
    compare(torch.cat([d.boxes for d in found]), "det_boxes")

    boxes, labels, numbers = targets_of(arrays, num_images)
    losses, matches = FQDetCriterion(VERSIONS[case["model"]["detector"]])(output, boxes, labels)
    query = matches.image * num_queries + matches.query
    compare(query, "train_matched_query")
    compare(torch.stack([numbers[i][t] for i, t in zip(matches.image, matches.target)]), "train_matched_target")
    matched = torch.zeros(num_images * num_queries)
    compare(matched.index_fill(0, query, 1), "train_query_label")
    ranked = [rank_anchors(output.anchors, b) + i * num_anchors for i, b in enumerate(boxes)]
    columns = torch.cat(numbers)
    ranked = torch.cat(ranked, 1)[:, columns.argsort()]
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
