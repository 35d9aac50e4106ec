"""Parts of ISTR against its official implementation, on given inputs: stage, box deltas, matching, losses, output."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases
from detectron2.modeling import build_model
from istr_model import (
    LOSSES,
    check_masks,
    configure,
    double_precision,
    make_targets,
    official_shapes,
    official_value,
    unpack,
)

from querymask.common.images import Canvas
from querymask.common.mask_coding import PCAMaskCoding
from querymask.common.predictions import Targets, unweighted
from querymask.common.pyramid import FeaturePyramid
from querymask.istr import ISTR
from querymask.istr.checkpoint import convert
from querymask.istr.detector import build_stage
from querymask.istr.mask_head import MaskCode, build_mask_head
from querymask.istr.predictions import RecurrentPredictions
from querymask.istr.stage import move_boxes

STRIDES = (4, 8, 16, 32)


def component_cases(*arrays: str) -> list[str]:
    found = load_cases("istr", "component").items()
    return [name for name, case in found if all(array in case["arrays"] for array in arrays)]


def test_every_component_case_is_run() -> None:
    here = component_cases("interact") + component_cases("deltas", "out") + component_cases("soft")
    here += component_cases("target_embeddings_*")
    codings = component_cases("embedding_half") + component_cases("polygons", "other_boxes")
    codings += component_cases("explained_variance_ratio") + component_cases("see") + component_cases("dct_embedding")
    assert set(here + codings) == set(load_cases("istr", "component"))


@pytest.mark.parametrize("name", component_cases("interact"))
def test_istr_stage(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    cfg = configure(case["configuration"])
    with double_precision():
        coding = PCAMaskCoding(cfg.MODEL.MASK_CODING.SIZE, cfg.MODEL.MASK_CODING.LENGTH)
        istr, code = cfg.MODEL.ISTR, cfg.MODEL.MASK_BRANCH.CODE
        stage = build_stage(istr)
        head = build_mask_head(code.HEAD, coding, istr.HIDDEN_DIM, code.HEAD_LAYERS, code.POOL_SIZE)
    prefix = case["inputs"]["stage"].removeprefix("weights of ") + "."
    state = {key: official_value(key, s) for key, s in official_shapes(cfg).items() if key.startswith(prefix)}
    converted, number = convert(state)[0], prefix.split(".")[2]
    for module, own in ((stage, f"detector.stages.{number}."), (head, f"mask_branch.heads.{number}.")):
        part = {key.removeprefix(own): value for key, value in converted.items() if key.startswith(own)}
        module.load_state_dict(part, strict=True)

    def pseudo(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(fixture().weight(key, shape))

    boxes = torch.from_numpy(expected["boxes"])
    batch, queries = boxes.shape[:2]
    maps = [
        pseudo(f"case.p{i}", (batch, 256, s, s)) * (256 * s * s) ** 0.5 for i, s in zip((2, 3, 4, 5), (64, 32, 16, 8))
    ]
    features = 16 * pseudo("case.query_features", (batch, queries, 256))
    seen: dict[str, Any] = {}
    for module in ("self_attn", "norm1", "inst_interact", "norm2", "norm3", "bboxes_delta"):
        stage.get_submodule(module).register_forward_hook(
            lambda _, arguments, output, module=module: seen.update({module: output, f"{module}.input": arguments})
        )
    pyramid = FeaturePyramid(maps, STRIDES)
    with torch.no_grad():
        output = stage(pyramid, boxes, features)
        images = torch.arange(batch).repeat_interleave(queries)
        code = head(output.features.flatten(0, 1), output.boxes.flatten(0, 1), images, pyramid)
    crops = seen["inst_interact.input"][1].view(batch, queries, 7, 7, -1).permute(0, 1, 4, 2, 3)
    for key, value in {
        "roi": crops[:, :, ::16],
        "attention": seen["self_attn"],
        "norm1": seen["norm1"],
        "interact": seen["inst_interact"].view(batch, queries, -1),
        "norm2": seen["norm2"],
        "norm3": seen["norm3"],
        "deltas": seen["bboxes_delta"],
        "logits": output.logits,
        "out_boxes": output.boxes,
        "object_features": output.features,
        "embeddings": code.vectors.view(batch, queries, -1),
    }.items():
        assert_close(value, expected[key], key)


@pytest.mark.parametrize("name", component_cases("deltas", "out"))
def test_istr_deltas(name: str) -> None:
    expected = load_arrays("istr", load_cases("istr")[name])
    boxes, deltas = torch.from_numpy(expected["boxes"]), torch.from_numpy(expected["deltas"])
    moved = move_boxes(boxes, deltas)
    for row, truth in zip(moved, expected["out"], strict=True):  # scales differ by orders of magnitude
        assert_close(row, truth, "out")


def given_output(
    expected: Mapping[str, np.ndarray], sizes: list[list[int]]
) -> tuple[RecurrentPredictions, list[MaskCode]]:
    """What one stage would have found, made of a case's inputs."""

    def tensor(key: str) -> torch.Tensor:
        value = torch.from_numpy(expected[key].astype(np.float64))
        return value[None] if value.dim() == 3 else value[None, None]

    sides = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float64)
    found = RecurrentPredictions(
        logits=tensor("logits"),
        hidden=torch.zeros(1, *tensor("boxes").shape[1:3], 1, dtype=torch.float64),
        canvas=Canvas(tuple(sizes[0]), torch.zeros(len(sizes), 1, 1, dtype=torch.bool), sides, True),
        image_sizes=[tuple(size) for size in sizes],
        boxes=tensor("boxes"),
    )
    return found, [MaskCode(tensor("embeddings")[0].flatten(0, 1))]


class Parts:
    """What `given_output` and the methods under test need of a model, without its network."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        cfg = configure(settings)
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
        cfg.MODEL.ISTR.NUM_STAGES = 1
        with double_precision():
            self.model: ISTR = build_model(cfg)
        keys = ("components", "explained_variances", "means")
        for key in keys:
            parameter = getattr(self.model.mask_branch.coding, key)
            parameter.data = official_value(f"mask_encoding.{key}", parameter.shape)


@pytest.mark.parametrize("name", component_cases("target_embeddings_*"))
def test_istr_matching(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model = Parts(case["configuration"]).model
    recipe = case["inputs"]["images"]
    batch = [{"instances": make_targets(i["target_seed"], (i["height"], i["width"]), i["count"], 80)} for i in recipe]
    detector, branch = model.detector, model.mask_branch
    targets = Targets.from_inputs(batch, model.device, with_masks=True)
    found, made = given_output(expected, [[i["height"], i["width"]] for i in recipe])
    truth = branch.encode(targets, found)
    mask_costs = branch.costs(found, made, truth, targets)
    terms = {**detector.criterion.cost_terms(found, targets), **mask_costs}
    assignment = detector.match(found, targets, mask_costs)
    weights = {"class": 2.0, "L1 box": 5.0, "GIoU box": 2.0, "mask": 2.0}
    start = 0
    for b, count in enumerate(targets.counts):
        here = slice(start, start + count)
        assert np.array_equal(truth.crops[here], expected[f"crops_{b}"])
        assert_close(truth.vectors[here], expected[f"target_embeddings_{b}"], "target_embeddings")
        for key, own in {"class": "class", "l1": "L1 box", "giou": "GIoU box", "mask": "mask"}.items():
            assert_close(terms[f"{own} cost"][0, b, :, :count] / weights[own], expected[f"{key}_{b}"], f"{key}_{b}")
        assert_close(sum(terms.values())[0, b, :, :count], expected[f"total_{b}"], f"total_{b}")
        pairs = assignment.image == b
        assert np.array_equal(assignment.query[pairs], expected[f"query_{b}"])
        assert np.array_equal(assignment.target[pairs] - start, expected[f"target_{b}"])
        start += count
    normalizers = detector.normalizers(targets, assignment)
    losses = unweighted(
        [
            *detector.losses(found, targets, assignment, normalizers),
            *branch.losses(found, made, truth, targets, assignment, normalizers),
        ]
    )
    for official, own in LOSSES.items():
        assert_close(losses[own], expected[official], official)


@pytest.mark.parametrize("name", component_cases("soft"))
def test_istr_output(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model = Parts(case["configuration"]).model
    found, made = given_output(expected, [case["inputs"]["network_input"]])
    scores = model.detector.scores(found)[0]
    top = scores.flatten().topk(len(expected["scores"]))
    queries = top.indices // scores.shape[1]
    assert_close(top.values, expected["scores"], "scores")
    assert np.array_equal(top.indices % scores.shape[1], expected["labels"])
    assert_close(found.boxes[0, 0, queries], expected["raw_boxes"], "raw_boxes")
    stored = queries[: len(expected["soft"])]
    code = model.mask_branch.codes(found, made, torch.zeros_like(stored), stored, 0)
    soft = code.decode(model.mask_branch.coding)
    assert_close(soft, expected["soft"], "soft")
    height, width = case["inputs"]["output"]
    (found,) = model.detect(found, made, [(height, width)])
    assert_close(found.scores, expected["out_scores"], "out_scores")
    assert np.array_equal(found.pred_classes, expected["out_labels"])
    assert_close(found.pred_boxes.tensor, expected["out_boxes"], "out_boxes")
    truth = unpack(expected["out_masks"], (len(found), height, width))
    check_masks(found.pred_masks.numpy(), truth, "out_masks")
