"""ISTR against its official implementations: network, detections, matching, losses, gradients, strict loading."""

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
from training_steps import training_step

from querymask.common.predictions import Assignment, Targets, unweighted, weighted
from querymask.istr.checkpoint import convert


def load_model(case: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, str]]:
    """The project's model with the official weights, in evaluation mode, and its names by official name."""
    cfg = configure(case["configuration"])
    dct = cfg.MODEL.MASK_CODING.NAME == "dct"
    state = {key: official_value(key, shape, dct) for key, shape in official_shapes(cfg).items()}
    with double_precision():
        model = build_model(cfg).double().eval()
    converted, report = convert(state)
    model.load_state_dict(converted, strict=True)
    return model, {line.source: line.target for line in report.lines if line.target}


INPUT_KEYS = {"image_seed", "height", "width", "output_height", "output_width", "target_seed", "count"}


def model_inputs(case: Mapping[str, Any], num_classes: int) -> list[dict[str, Any]]:
    """The batch of a case."""
    assert set(case["inputs"]) == {"images"}, f"the case has inputs that are not known: {sorted(case['inputs'])}"
    batch = []
    for image in case["inputs"]["images"]:
        assert set(image) <= INPUT_KEYS, f"an image has settings that are not known: {sorted(set(image) - INPUT_KEYS)}"
        size = (image["height"], image["width"])
        pixels = fixture().image(image["image_seed"], *size)[:, :, ::-1]
        item: dict[str, Any] = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}
        if "output_height" in image:
            item["height"], item["width"] = image["output_height"], image["output_width"]
        if "target_seed" in image:
            item["instances"] = make_targets(image["target_seed"], size, image["count"], num_classes)
        batch.append(item)
    return batch


def every(array: torch.Tensor, step: int, axis: int) -> torch.Tensor:
    return array.index_select(axis, torch.arange(0, array.shape[axis], step))


def thin_map(array: torch.Tensor, level: int) -> torch.Tensor:
    step = {2: 4, 3: 2}.get(level, 1)
    return array[:, ::16, ::step, ::step]


@pytest.mark.parametrize("name", load_cases("istr", "inference"))
def test_istr_inference(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    strides = case["strides"]
    model, _ = load_model(case)
    seen: dict[str, torch.Tensor] = {}
    model.backbone.register_forward_hook(lambda module, arguments, output: seen.update(output))
    batch = model_inputs(case, case["configuration"]["num_classes"])
    sizes = [(item["height"], item["width"]) for item in batch]
    with torch.no_grad():
        outputs, made = model.predict(model.preprocess(batch))
        detections = model.detect(outputs, made, sizes)
        scores = model.detector.scores(outputs)
        shape = outputs.logits.shape[1:3]
        images = torch.arange(shape[0]).repeat_interleave(shape[1])
        queries = torch.arange(shape[1]).repeat(shape[0])
        # Convolutions on crops cost more than all else: without need, not of every stage
        first = 0 if "stage_embeddings" in expected else outputs.num_layers - 1
        codes = [model.mask_branch.predict(outputs, images, queries, i) for i in range(first, outputs.num_layers)]

    maps = [seen[f"p{level}"] for level in (2, 3, 4, 5)]
    pooling = torch.mean if model.detector.query_pooling == "mean" else torch.amax
    arrays = {f"p{level}": thin_map(x, level) for level, x in enumerate(maps, start=2)}
    arrays["image_feature"] = sum(pooling(x, dim=(2, 3)) for x in maps)
    boxes = model.detector.init_proposal_boxes.weight.detach()
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
    arrays["query_boxes"] = corners * outputs.canvas.sides[:, None]
    arrays["stage_boxes"] = outputs.boxes
    arrays["stage_logits"] = every(outputs.logits, strides["q"], 2)
    arrays["stage_object_features"] = every(outputs.hidden, strides["q"], 2)
    vectors = [code.vectors.unflatten(0, shape) for code in codes]
    if first == 0:
        arrays["stage_embeddings"] = every(torch.stack(vectors), strides["e"], 2)
    arrays["final_embeddings"] = every(vectors[-1], strides["e"], 1)
    averaged = torch.log(scores / (1 - scores))
    arrays["averaged_logits"] = every(averaged, strides["q"], 1)
    context = codes[-1].context
    if context is None and "final_mask_roi" in expected:
        pool_size = model.mask_branch.heads[-1].pool_size
        context = outputs.pyramid.pool(outputs.boxes[-1].flatten(0, 1), images, pool_size)
    if context is not None:
        arrays["final_mask_roi"] = every(context.unflatten(0, shape)[:, :, ::4, ::4, ::4], strides["q"], 1)
    compared = set()
    for key, array in arrays.items():
        if key in expected:
            assert_close(array, expected[key], key)
            compared.add(key)

    for b, found in enumerate(detections):
        top = scores[b].flatten().topk(len(expected[f"scores_{b}"]))
        labels, queries = top.indices % scores.shape[2], top.indices // scores.shape[2]
        assert_close(top.values, expected[f"scores_{b}"], f"scores_{b}")
        same_order = np.array_equal(labels, expected[f"labels_{b}"])
        assert same_order, f"labels_{b}"
        assert_close(outputs.boxes[-1, b, queries], expected[f"boxes_{b}"], f"boxes_{b}")
        with torch.no_grad():
            stored = queries[: len(expected[f"masks_{b}"])]
            code = model.mask_branch.codes(outputs, made, torch.full_like(stored, b), stored, -1)
            soft = code.decode(model.mask_branch.coding)
        assert_close(soft, expected[f"masks_{b}"], f"masks_{b}")

        assert_close(found.scores, expected[f"out_scores_{b}"], f"out_scores_{b}")
        assert np.array_equal(found.pred_classes, expected[f"out_labels_{b}"]), f"out_labels_{b}"
        assert_close(found.pred_boxes.tensor, expected[f"out_boxes_{b}"], f"out_boxes_{b}")
        areas = found.pred_masks.sum((1, 2)).numpy()
        packed = expected[f"out_masks_{b}"]
        truth = unpack(packed, (len(packed), *found.image_size))
        check_masks(found.pred_masks[: len(packed)].numpy(), truth, f"out_masks_{b}")
        # pixels at the threshold to the precision of the pasting may fall on either side
        assert np.abs(areas - expected[f"out_areas_{b}"]).max() <= 1, f"out_areas_{b}"
        compared |= {f"{key}_{b}" for key in ("scores", "labels", "boxes", "masks")}
        compared |= {f"out_{key}_{b}" for key in ("scores", "labels", "boxes", "areas", "masks")}
    assert compared == set(expected), f"not compared: {sorted(set(expected) - compared)}"


@pytest.mark.parametrize("name", load_cases("istr", "training"))
def test_istr_training(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model, names = load_model(case)
    model.train()
    v2 = case["configuration"]["release"] == "v2"
    batch = model_inputs(case, case["configuration"]["num_classes"])
    spy = Spy(model)
    step = training_step(model, batch)
    outputs, targets, assignment = step.found, step.targets, step.assignment
    number, size = sum(targets.counts), model.mask_branch.coding.mask_size
    compared = set()

    def compare(key: str, value: Any) -> None:
        assert_close(value, expected[key], key)
        compared.add(key)

    compare("stage_boxes", outputs.boxes.detach())
    compare("stage_logits", every(outputs.logits.detach(), 10, 2))
    assert np.array_equal(step.truth.crops, unpack(expected["target_crops"], (number, size, size)))
    compared.add("target_crops")

    losses = unweighted(step.terms)
    weighted_losses = weighted(step.terms)
    compare("target_embeddings", spy.encoded[0][:number])
    last = outputs.num_layers - 1
    rows = 1 if outputs.logits.shape[2] <= 100 else 10
    cost = torch.stack(list(spy.terms.values())).sum(0)
    for stage in range(last + 1):
        check_matches(assignment, targets, stage, expected, compared)
        for b, count in enumerate(targets.counts):
            compare(f"cost_s{stage}_i{b}", cost[stage, b, ::rows, :count])
        for official, own in LOSSES.items():
            suffix = "" if stage == last else f"_{stage}"
            compare(f"{official}_s{stage}", losses[own + suffix].detach())
            released = f"_{stage}" if v2 else suffix
            compare(f"weighted/{official}{released}", weighted_losses[own + suffix].detach())
        if f"loss_crops_s{stage}" in expected:
            here = slice(stage * number, (stage + 1) * number)
            crops = model.mask_branch.target_crops(outputs, step.truth, targets, assignment)[here]
            truth = unpack(expected[f"loss_crops_s{stage}"], (number, size, size))
            assert np.array_equal(crops, truth), f"loss_crops_s{stage}"
            compared.add(f"loss_crops_s{stage}")
            compare(f"loss_embeddings_s{stage}", spy.loss_embeddings(stage, number))
        if f"match_embeddings_s{stage}" in expected:
            compare(f"match_embeddings_s{stage}", spy.encoded[2 * stage])
    total = sum(weighted_losses.values())
    compare("total", total.detach())
    assert len(weighted_losses) == len(LOSSES) * (last + 1)

    total.backward()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key in expected:
        kind, _, official = key.partition("/")
        if kind == "grad_norm":
            compare(key, parameters[names[official]].grad.norm())
        elif kind == "after":
            compare(key, buffers[names[official]].double())
    assert compared == set(expected), f"not compared: {sorted(set(expected) - compared)}"


class Spy:
    """Keeps costs and codes of the targets of one training step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.encoded: list[torch.Tensor] = []
        self.terms: dict[str, torch.Tensor] = {}
        branch, criterion = model.mask_branch, model.detector.criterion
        encode, cost_terms, costs = branch.coding.encode, criterion.cost_terms, branch.costs

        def spy_encode(masks: torch.Tensor) -> torch.Tensor:
            self.encoded.append(encode(masks))
            return self.encoded[-1]

        def spy_terms(*arguments: Any) -> dict[str, torch.Tensor]:
            terms = cost_terms(*arguments)
            self.terms.update(terms)
            return terms

        def spy_costs(*arguments: Any) -> dict[str, torch.Tensor]:
            terms = costs(*arguments)
            self.terms.update(terms)
            return terms

        branch.coding.encode, criterion.cost_terms, branch.costs = spy_encode, spy_terms, spy_costs

    def loss_embeddings(self, stage: int, number: int) -> torch.Tensor:
        """All stages were encoded at once, or after the targets of each stage's matching."""
        if len(self.encoded) > 2:
            return self.encoded[2 * stage + 1]
        return self.encoded[1][stage * number : (stage + 1) * number]


def check_matches(
    assignment: Assignment, targets: Targets, stage: int, expected: Mapping[str, np.ndarray], compared: set[str]
) -> None:
    starts = np.cumsum([0, *targets.counts])
    for b in range(len(targets.counts)):
        here = (assignment.layer == stage) & (assignment.image == b)
        for key, value in (("query", assignment.query[here]), ("target", assignment.target[here] - starts[b])):
            assert np.array_equal(value, expected[f"match_{key}_s{stage}_i{b}"]), f"match_{key}_s{stage}_i{b}"
            compared.add(f"match_{key}_s{stage}_i{b}")
