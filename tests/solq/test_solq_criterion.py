"""SOLQ's matching and losses against loops over queries and targets."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from querymask.common.mask_coding import MaskCoding
from querymask.common.mask_coding.targets import CodedTargets
from querymask.common.matching import hungarian_assignment
from querymask.common.predictions import Assignment, LossTerm, Targets, unweighted, weighted
from querymask.common.set_criterion import SetDetector
from querymask.solq.criterion import DETRCriterion, cardinality_error, class_error
from querymask.solq.predictions import DETRPredictions
from querymask.solq.vectors import VECTOR_LOSS_REDUCTIONS, VectorBranch

LAYERS, QUERIES, CLASSES, WIDTH, LENGTH = 3, 4, 5, 8, 6
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
BATCHES = [[2, 1], [0, 3], [3, 0], [0], [0, 0], [6, 1]]
SIZE = (64, 96)


class Halves(MaskCoding):
    """A coding of 2x3 pixels: the maps are half of the vectors."""

    length = LENGTH

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.view(-1, 2, 3) / 2


def make_branch(**options: Any) -> VectorBranch:
    branch = VectorBranch(width=WIDTH, hidden_dim=7, coding=Halves(), **options)
    torch.manual_seed(2)
    torch.nn.init.normal_(branch.head(-1).layers[-1].weight)
    return branch.double()


def make_detector() -> SetDetector:
    return SetDetector(DETRCriterion(COSTS, WEIGHTS))


def make_outputs(batch: int, seed: int = 0) -> DETRPredictions:
    """Random predictions in float64, all leaves with gradient."""
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, "requires_grad": True}
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, **options)
    boxes = (torch.rand(LAYERS, batch, QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    hidden = torch.randn(LAYERS, batch, QUERIES, WIDTH, **options)
    return DETRPredictions(logits, hidden, boxes=boxes)


def make_targets(counts: Sequence[int], seed: int = 1) -> tuple[Targets, torch.Tensor, CodedTargets]:
    """Targets, their boxes CXCYWH relative to the image, and their vectors."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    boxes = torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.2
    vectors = torch.randn(n, LENGTH, generator=generator, dtype=torch.float64)
    crops = torch.rand(n, 2, 3, generator=generator) < 0.5
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    sides = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=torch.float64)
    targets = Targets(counts, labels, box_convert(boxes, "cxcywh", "xyxy") * sides, [SIZE] * len(counts))
    return targets, boxes, CodedTargets(crops, vectors)


def compute(
    outputs: DETRPredictions, targets: Targets, truth: CodedTargets, branch: VectorBranch | None
) -> tuple[list[LossTerm], Assignment]:
    """The terms of detector and branch, and the assignment."""
    detector = make_detector()
    assignment = detector.match(outputs, targets, {})
    normalizers = detector.normalizers(targets, assignment)
    terms = detector.losses(outputs, targets, assignment, normalizers)
    if branch is not None:
        terms = terms + branch.losses(outputs, None, truth, targets, assignment, normalizers)
    return terms, assignment


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of CXCYWH boxes (n, 4) and (m, 4), all pairs."""
    return generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))


def slow_cost(logits: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, true_boxes: torch.Tensor) -> list:
    """Cost [query][target] of one layer and image."""
    overlaps = giou(boxes, true_boxes)
    rows = []
    for q in range(QUERIES):
        row = []
        for t, label in enumerate(labels.tolist()):
            p = 1 / (1 + math.exp(-logits[q, label].item()))
            positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
            negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
            distance = (boxes[q] - true_boxes[t]).abs().sum().item()
            row.append(2 * (positive - negative) + 5 * distance - 2 * overlaps[q, t].item())
        rows.append(row)
    return rows


def slow_match(cost: list, count: int) -> list[tuple[int, int]]:
    """The best pairs (query, target) among all assignments."""
    size = min(QUERIES, count)
    candidates = (
        list(zip(queries, targets, strict=True))
        for queries in itertools.permutations(range(QUERIES), size)
        for targets in itertools.combinations(range(count), size)
    )
    return min(candidates, key=lambda pairs: sum(cost[q][t] for q, t in pairs))


def slow_losses(
    outputs: DETRPredictions,
    targets: Targets,
    boxes_of_targets: torch.Tensor,
    truth: CodedTargets,
    branch: VectorBranch,
) -> dict[str, float]:
    """All losses, with the vector head applied to every query of every layer."""
    logits, boxes = outputs.logits.detach(), outputs.boxes.detach()
    vectors = branch.vector_embed(outputs.hidden).detach()
    losses = {}
    for layer in range(LAYERS):
        one_hot = torch.zeros_like(logits[layer])
        distance, overlap, vector, matched = 0.0, 0.0, 0.0, 0
        for b, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
            labels, true_boxes = targets.labels[start : start + count], boxes_of_targets[start : start + count]
            cost = slow_cost(logits[layer, b], boxes[layer, b], labels, true_boxes)
            for q, t in slow_match(cost, count):
                one_hot[b, q, labels[t]] = 1
                distance += (boxes[layer, b, q] - true_boxes[t]).abs().sum().item()
                overlap += 1 - giou(boxes[layer, b, q][None], true_boxes[t][None]).item()
                vector += (vectors[layer, b, q] - truth.vectors[start + t]).abs().sum().item()
                matched += 1
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        total = max(sum(targets.counts), 1)
        losses[f"loss_ce{suffix}"] = sigmoid_focal_loss(logits[layer], one_hot, 0.25, 2.0).sum().item() / total
        losses[f"loss_bbox{suffix}"] = distance / total
        losses[f"loss_giou{suffix}"] = overlap / total
        if layer >= min(branch.start_layer, LAYERS - 1):
            divisor = total if branch.reduction == "sum" else max(matched, 1) * LENGTH
            losses[f"loss_vector{suffix}"] = branch.weight * vector / divisor
    return losses


@pytest.mark.parametrize("counts", BATCHES)
@pytest.mark.parametrize("reduction", VECTOR_LOSS_REDUCTIONS)
def test_losses(counts: list[int], reduction: str) -> None:
    """Also without targets, and with more targets than queries: then pairs are fewer than targets."""
    branch = make_branch(reduction=reduction)
    outputs, (targets, boxes, truth) = make_outputs(len(counts)), make_targets(counts)
    terms, _ = compute(outputs, targets, truth, branch)
    actual = {name: value.item() for name, value in unweighted(terms).items()}
    assert actual == pytest.approx(slow_losses(outputs, targets, boxes, truth, branch), rel=1e-9, abs=1e-12)
    sum(weighted(terms).values()).backward()
    for tensor in (outputs.logits, outputs.boxes, outputs.hidden, *branch.parameters()):
        assert tensor.grad is not None, "every process must give every gradient, also without targets"
        assert torch.isfinite(tensor.grad).all()
    assert bool(outputs.boxes.grad.any()) == bool(outputs.hidden.grad.any()) == (sum(counts) > 0)


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [6, 1]])
@pytest.mark.parametrize("start", [0, 2])
def test_squares_and_dice(counts: list[int], start: int) -> None:
    """Per target, not per pair: with 6 targets and 4 queries both differ."""
    branch = make_branch(loss="l2_dice", weight=0.7, start_layer=start)
    outputs, (targets, _, truth) = make_outputs(len(counts)), make_targets(counts)
    terms, assignment = compute(outputs, targets, truth, branch)
    vectors = branch.vector_embed(outputs.hidden).detach()
    expected = [0.0] * LAYERS
    pairs = zip(assignment.layer, assignment.image, assignment.query, assignment.target, strict=True)
    for layer, image, query, target in pairs:
        predicted, wanted = vectors[layer, image, query], truth.vectors[target]
        p, t = predicted / 2, truth.crops[target].flatten().double()
        square = sum((a - b) ** 2 for a, b in zip(predicted.tolist(), wanted.tolist(), strict=True)) / LENGTH
        dice = 1 - 2 * (p @ t).item() / ((p @ p).item() + (t @ t).item() + 1e-5)
        expected[layer] += 0.7 * (square + dice) / max(sum(counts), 1)
    names = ["loss_vector_0", "loss_vector_1", "loss_vector"][start:]
    losses = unweighted(terms)
    assert names == [name for name in losses if "vector" in name]
    assert [losses[name].item() for name in names] == pytest.approx(expected[start:], rel=1e-9)
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in branch.parameters())


@pytest.mark.parametrize("counts", [[2, 1], [0, 0], [6, 1]])
@pytest.mark.parametrize(("start", "trained"), [(0, 3), (1, 3), (5, 3), (1, 2)])
def test_a_head_for_each_layer(counts: list[int], start: int, trained: int) -> None:
    """Every layer's vectors are those of its own head; heads of layers without a loss are not trained.

    Args:
        trained: layers that the detector has losses for, the last ones, which alone are found then.
    """
    branch = make_branch(start_layer=start, num_layers=LAYERS, num_trained_layers=trained)
    heads = list(branch.vector_embed)
    assert len(heads) == LAYERS
    for head in heads[:-1]:
        nn.init.normal_(head.layers[-1].weight)
    whole, (targets, _, truth) = make_outputs(len(counts)), make_targets(counts)
    first = LAYERS - trained
    outputs = DETRPredictions(whole.logits[first:], whole.hidden[first:], boxes=whole.boxes[first:])
    terms, assignment = compute(outputs, targets, truth, branch)
    expected = [0.0] * trained
    pairs = zip(assignment.layer, assignment.image, assignment.query, assignment.target, strict=True)
    for layer, image, query, target in pairs:
        vector = heads[first + layer](outputs.hidden[layer, image, query])
        expected[layer] += 3.0 * (vector - truth.vectors[target]).abs().sum().item()
    with_loss = min(start, trained - 1)
    divisor = max(assignment.pairs_per_layer(), 1) * LENGTH
    losses = [term.value.item() for term in terms if term.name == "loss_vector"]
    assert losses == pytest.approx([value / divisor for value in expected[with_loss:]], rel=1e-9)
    sum(weighted(terms).values()).backward()
    for layer, head in enumerate(heads):
        for parameter in head.parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (layer >= first + with_loss)


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_vector_start_layer(start: int) -> None:
    """Layers before it have no vector loss; the last one has it always."""
    branch = make_branch(start_layer=start, weight=0.7)
    outputs, (targets, boxes, truth) = make_outputs(2), make_targets([2, 1])
    losses = unweighted(compute(outputs, targets, truth, branch)[0])
    expected = slow_losses(outputs, targets, boxes, truth, branch)
    names = {"loss_vector_0", "loss_vector_1", "loss_vector"}
    assert names & set(losses) == {0: names, 1: names - {"loss_vector_0"}}.get(start, {"loss_vector"})
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-9)
    sum(losses[name] for name in names & set(losses)).backward()
    assert [bool(gradient.any()) for gradient in outputs.hidden.grad] == [start <= layer for layer in (0, 1)] + [True]


class OnAll(nn.Module):
    """A vector head that has run on every query; it is given a query's number instead of its hidden state."""

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.vectors.flatten(0, -2)[numbers]


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0]])
@pytest.mark.parametrize("start", [0, 2])
def test_vector_head_on_matched_queries_only(counts: list[int], start: int) -> None:
    """The loss and every gradient are those of the head on all queries of all layers."""
    targets, _, truth = make_targets(counts)
    results = []
    for on_all in (False, True):
        branch, outputs = make_branch(start_layer=start), make_outputs(len(counts))
        leaves = [outputs.hidden, *branch.parameters()]
        if on_all:
            numbers = torch.arange(LAYERS * len(counts) * QUERIES).view(LAYERS, len(counts), QUERIES)
            branch.vector_embed = OnAll(branch.vector_embed(outputs.hidden))
            outputs = DETRPredictions(outputs.logits, numbers, boxes=outputs.boxes)
        terms, _ = compute(outputs, targets, truth, branch)
        loss = sum(value for name, value in unweighted(terms).items() if name.startswith("loss_vector"))
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for few, all_queries in zip(*results, strict=True):
        assert torch.allclose(few, all_queries, rtol=1e-12, atol=1e-14)
    assert bool(results[0][1].any()) == (sum(counts) > 0)


def test_no_mask_branch() -> None:
    outputs, (targets, _, truth) = make_outputs(2), make_targets([2, 1])
    with_masks = unweighted(compute(outputs, targets, truth, make_branch())[0])
    losses = unweighted(compute(outputs, targets, truth, None)[0])
    assert losses == {name: value for name, value in with_masks.items() if not name.startswith("loss_vector")}


def test_weights() -> None:
    """The coefficient of the vector loss is inside of it already."""
    outputs, (targets, _, truth) = make_outputs(2), make_targets([2, 1])
    terms, _ = compute(outputs, targets, truth, make_branch(weight=3.0))
    weights = {term.key: term.weight for term in terms}
    assert [weights[name] for name in ("loss_ce_0", "loss_bbox", "loss_giou_1", "loss_vector_1", "loss_vector")] == [
        2,
        5,
        2,
        1,
        1,
    ]
    assert all(torch.equal(weighted(terms)[name], weights[name] * value) for name, value in unweighted(terms).items())


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.3, 0.0], [0.0, 0.0, 1e-6, 1e-6], [0.5, 0.5, 1, 1]])
def test_degenerate_targets_have_finite_losses(box: list[float]) -> None:
    outputs, (targets, _, truth) = make_outputs(1), make_targets([3])
    targets.boxes[1] = box_convert(torch.tensor(box), "cxcywh", "xyxy") * torch.tensor([SIZE[1], SIZE[0]] * 2)
    losses = unweighted(compute(outputs, targets, truth, make_branch())[0])
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(outputs.boxes.grad).all()


def test_low_precision_predictions() -> None:
    """Costs and losses of bfloat16 predictions are computed in float32."""
    outputs, (targets, _, truth) = make_outputs(2), make_targets([2, 1])
    targets.boxes, truth = targets.boxes.float(), CodedTargets(truth.crops, truth.vectors.float())
    branch = make_branch().bfloat16()
    low = DETRPredictions(outputs.logits.bfloat16(), outputs.hidden.bfloat16(), boxes=outputs.boxes.bfloat16())
    same = DETRPredictions(low.logits.float(), low.hidden, boxes=low.boxes.float())
    losses, expected = (unweighted(compute(x, targets, truth, branch)[0]) for x in (low, same))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses == expected


@pytest.mark.parametrize(
    ("tensor", "term", "culprit"),
    [
        ("logits", "class cost", "the predictions of 1 of 4 queries at fault"),
        ("boxes", "L1 box cost", "the predictions of 1 of 4 queries at fault"),
        ("boxes", "GIoU box cost", "the predictions of 1 of 4 queries at fault"),
        ("target", "L1 box cost", "target 0 at fault"),
        ("target", "GIoU box cost", "target 0 at fault"),
    ],
)
def test_error_of_broken_values(tensor: str, term: str, culprit: str) -> None:
    outputs, (targets, _, _) = make_outputs(2), make_targets([2, 1])
    targets.images = ["one.jpg", "two.jpg"]
    with torch.no_grad():
        if tensor == "target":
            targets.boxes[2] = math.nan
        else:
            getattr(outputs, tensor)[1, 1, 3] = math.nan
    layer = 0 if tensor == "target" else 1
    pattern = rf"^iteration 77: .* decoder layer {layer} for two\.jpg \(1 targets\) is not finite\..*{term}: {culprit}"
    with EventStorage(start_iter=77), pytest.raises(FloatingPointError, match=pattern):
        make_detector().match(outputs, targets, {})


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="VECTOR.LOSS_REDUCTION is 'median': choose one of .*'local_mean'"):
        make_branch(reduction="median")


def test_class_error() -> None:
    """Two of the four matched queries of the last layer have the right class; those of the first layer do not count."""
    logits = torch.zeros(2, 2, 3, 4)
    labels = torch.tensor([2, 1, 3, 3])
    targets = Targets([1, 3], labels, torch.zeros(4, 4), [SIZE] * 2)
    cost = torch.ones(2, 2, 3, 3)
    cost[:, 0, 2, 0] = 0
    for i in range(3):
        cost[:, 1, i, i] = 0
    assignment = hungarian_assignment({"cost": cost}, targets)
    logits[1, 0, 2, 2] = 1  # right
    logits[1, 1, 0, 0] = 1  # wrong
    logits[1, 1, 1, 3] = 1  # right
    logits[1, 1, 2, 1] = 1  # wrong
    assert class_error(logits, labels, assignment).item() == 50
    empty = Targets([0, 0], labels[:0], torch.zeros(0, 4), [SIZE] * 2)
    nothing = hungarian_assignment({"cost": torch.zeros(2, 2, 3, 0)}, empty)
    assert class_error(logits, labels[:0], nothing).item() == 100


def test_cardinality_error() -> None:
    logits = torch.zeros(2, 2, 3, 4)
    logits[0, :, :, 3] = 1  # all of the last class: no object
    logits[1, 0, :2, 0] = 1  # two objects
    logits[1, 0, 2, 3] = 1
    logits[1, 1, :, 1] = 1  # three objects
    assert cardinality_error(logits, [4, 1]).tolist() == [(4 + 1) / 2, (2 + 2) / 2]
