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

from querymask.common.layers import MLP
from querymask.common.mask_coding import MaskCoding
from querymask.common.matching import Targets
from querymask.solq.criterion import VECTOR_LOSS_REDUCTIONS, SOLQCriterion, SOLQOutput

LAYERS, QUERIES, CLASSES, WIDTH, LENGTH = 3, 4, 5, 8, 6
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
BATCHES = [[2, 1], [0, 3], [3, 0], [0], [0, 0], [6, 1]]


def make_criterion(**options: Any) -> SOLQCriterion:
    return SOLQCriterion(COSTS, WEIGHTS, **options)


def make_outputs(batch: int, seed: int = 0) -> SOLQOutput:
    """Random predictions in float64, all leaves with gradient."""
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, "requires_grad": True}
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, **options)
    boxes = (torch.rand(LAYERS, batch, QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    hidden = torch.randn(LAYERS, batch, QUERIES, WIDTH, **options)
    return SOLQOutput(logits, boxes, hidden, MLP(WIDTH, 7, LENGTH, 3).double())


def make_targets(counts: Sequence[int], seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    fields = {
        "boxes": torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.2,
        "vectors": torch.randn(n, LENGTH, generator=generator, dtype=torch.float64),
    }
    return Targets(counts, torch.randint(0, CLASSES, (n,), generator=generator), fields)


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


def slow_losses(outputs: SOLQOutput, targets: Targets, criterion: SOLQCriterion) -> dict[str, float]:
    """All losses, with the vector head applied to every query of every layer."""
    starts = [sum(targets.counts[:b]) for b in range(len(targets.counts))]
    logits, boxes = outputs.logits.detach(), outputs.boxes.detach()
    vectors = outputs.vector_head(outputs.hidden).detach()
    losses = {}
    for layer in range(LAYERS):
        one_hot = torch.zeros_like(logits[layer])
        distance, overlap, vector, matched = 0.0, 0.0, 0.0, 0
        for b, (start, count) in enumerate(zip(starts, targets.counts, strict=True)):
            labels, true_boxes = targets.labels[start : start + count], targets.fields["boxes"][start : start + count]
            cost = slow_cost(logits[layer, b], boxes[layer, b], labels, true_boxes)
            for q, t in slow_match(cost, count):
                one_hot[b, q, labels[t]] = 1
                distance += (boxes[layer, b, q] - true_boxes[t]).abs().sum().item()
                overlap += 1 - giou(boxes[layer, b, q][None], true_boxes[t][None]).item()
                vector += (vectors[layer, b, q] - targets.fields["vectors"][start + t]).abs().sum().item()
                matched += 1
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        total = max(sum(targets.counts), 1)
        losses[f"loss_ce{suffix}"] = sigmoid_focal_loss(logits[layer], one_hot, 0.25, 2.0).sum().item() / total
        losses[f"loss_bbox{suffix}"] = distance / total
        losses[f"loss_giou{suffix}"] = overlap / total
        if layer >= min(criterion.vector_start_layer, LAYERS - 1):
            divisor = total if criterion.vector_reduction == "sum" else max(matched, 1) * LENGTH
            losses[f"loss_vector{suffix}"] = criterion.vector_weight * vector / divisor
    return losses


@pytest.mark.parametrize("counts", BATCHES)
@pytest.mark.parametrize("reduction", VECTOR_LOSS_REDUCTIONS)
def test_losses(counts: list[int], reduction: str) -> None:
    """Also without targets, and with more targets than queries: then pairs are fewer than targets."""
    criterion = make_criterion(vector_reduction=reduction)
    outputs, targets = make_outputs(len(counts)), make_targets(counts)
    losses = criterion(outputs, targets)
    actual = {name: value.item() for name, value in losses.items()}
    assert actual == pytest.approx(slow_losses(outputs, targets, criterion), rel=1e-10, abs=1e-12)
    sum(criterion.weigh(losses).values()).backward()
    for tensor in (outputs.logits, outputs.boxes, outputs.hidden, *outputs.vector_head.parameters()):
        assert tensor.grad is not None, "every process must give every gradient, also without targets"
        assert torch.isfinite(tensor.grad).all()
    assert bool(outputs.boxes.grad.any()) == bool(outputs.hidden.grad.any()) == (sum(counts) > 0)


class Halves(MaskCoding):
    """A coding of 2x3 pixels: the maps are half of the vectors."""

    length = LENGTH

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.view(-1, 2, 3) / 2


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [6, 1]])
@pytest.mark.parametrize("start", [0, 2])
def test_squares_and_dice(counts: list[int], start: int) -> None:
    """Per target, not per pair: with 6 targets and 4 queries both differ."""
    criterion = make_criterion(vector_loss="l2_dice", vector_weight=0.7, vector_start_layer=start)
    outputs, targets = make_outputs(len(counts)), make_targets(counts)
    outputs.coding = Halves()
    crops = torch.rand(sum(counts), 2, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    targets.fields["crops"] = crops
    losses = criterion(outputs, targets)
    assignment = criterion.match(outputs, targets)
    vectors = outputs.vector_head(outputs.hidden).detach()
    expected = [0.0] * LAYERS
    pairs = zip(assignment.layer, assignment.image, assignment.query, assignment.target, strict=True)
    for layer, image, query, target in pairs:
        predicted, truth = vectors[layer, image, query], targets.fields["vectors"][target]
        p, t = predicted / 2, crops[target].flatten().double()
        square = sum((a - b) ** 2 for a, b in zip(predicted.tolist(), truth.tolist(), strict=True)) / LENGTH
        dice = 1 - 2 * (p @ t).item() / ((p @ p).item() + (t @ t).item() + 1e-5)
        expected[layer] += 0.7 * (square + dice) / max(sum(counts), 1)
    names = ["loss_vector_0", "loss_vector_1", "loss_vector"][start:]
    assert names == [name for name in losses if "vector" in name]
    assert [losses[name].item() for name in names] == pytest.approx(expected[start:], rel=1e-9)
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in outputs.vector_head.parameters())


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_vector_start_layer(start: int) -> None:
    """Layers before it have no vector loss; the last one has it always."""
    criterion = make_criterion(vector_start_layer=start, vector_weight=0.7)
    outputs, targets = make_outputs(2), make_targets([2, 1])
    losses = criterion(outputs, targets)
    expected = slow_losses(outputs, targets, criterion)
    names = {"loss_vector_0", "loss_vector_1", "loss_vector"}
    assert names & set(losses) == {0: names, 1: names - {"loss_vector_0"}}.get(start, {"loss_vector"})
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-10)
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
    criterion = make_criterion(vector_start_layer=start)
    targets = make_targets(counts)
    results = []
    for on_all in (False, True):
        outputs = make_outputs(len(counts))
        leaves = [outputs.hidden, *outputs.vector_head.parameters()]
        if on_all:
            numbers = torch.arange(LAYERS * len(counts) * QUERIES).view(LAYERS, len(counts), QUERIES)
            outputs = SOLQOutput(outputs.logits, outputs.boxes, numbers, OnAll(outputs.vector_head(outputs.hidden)))
        loss = sum(value for name, value in criterion(outputs, targets).items() if name.startswith("loss_vector"))
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for few, all_queries in zip(*results, strict=True):
        assert torch.allclose(few, all_queries, rtol=1e-12, atol=1e-14)
    assert bool(results[0][1].any()) == (sum(counts) > 0)


def test_no_mask_branch() -> None:
    outputs, targets = make_outputs(2), make_targets([2, 1])
    with_masks = make_criterion()(outputs, targets)
    outputs.vector_head = None
    del targets.fields["vectors"]
    losses = make_criterion()(outputs, targets)
    assert losses == {name: value for name, value in with_masks.items() if not name.startswith("loss_vector")}


def test_weights() -> None:
    """The coefficient of the vector loss is inside of it already."""
    one = torch.ones(())
    names = ["loss_ce_0", "loss_bbox", "loss_giou_enc", "loss_vector_1", "loss_vector"]
    assert list(make_criterion(vector_weight=3.0).weigh(dict.fromkeys(names, one)).values()) == [2, 5, 2, 1, 1]


def test_masks_do_not_take_part_in_matching() -> None:
    outputs, targets = make_outputs(2), make_targets([2, 1])
    before = make_criterion().match(outputs, targets)
    targets.fields["vectors"] = targets.fields["vectors"].flip(0) * 100
    after = make_criterion().match(outputs, targets)
    assert torch.equal(before.query, after.query) and torch.equal(before.target, after.target)


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.3, 0.0], [0.0, 0.0, 1e-6, 1e-6], [0.5, 0.5, 1, 1]])
def test_degenerate_targets_have_finite_losses(box: list[float]) -> None:
    criterion = make_criterion()
    outputs, targets = make_outputs(1), make_targets([3])
    targets.fields["boxes"][1] = torch.tensor(box)
    losses = criterion(outputs, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(outputs.boxes.grad).all()


def test_low_precision_predictions() -> None:
    """Costs and losses of bfloat16 predictions are computed in float32."""
    outputs, targets = make_outputs(2), make_targets([2, 1])
    targets.fields = {name: value.float() for name, value in targets.fields.items()}
    low = SOLQOutput(
        outputs.logits.bfloat16(), outputs.boxes.bfloat16(), outputs.hidden.bfloat16(), outputs.vector_head.bfloat16()
    )
    same = SOLQOutput(low.logits.float(), low.boxes.float(), low.hidden, low.vector_head)
    losses, expected = make_criterion()(low, targets), make_criterion()(same, targets)
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
    outputs, targets = make_outputs(2), make_targets([2, 1])
    targets.images = ["one.jpg", "two.jpg"]
    with torch.no_grad():
        if tensor == "target":
            targets.fields["boxes"][2] = math.nan
        else:
            getattr(outputs, tensor)[1, 1, 3] = math.nan
    layer = 0 if tensor == "target" else 1
    pattern = rf"^iteration 77: .* decoder layer {layer} for two\.jpg \(1 targets\) is not finite\..*{term}: {culprit}"
    with EventStorage(start_iter=77), pytest.raises(FloatingPointError, match=pattern):
        make_criterion()(outputs, targets)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="VECTOR_LOSS_REDUCTION is 'median': choose one of .*'local_mean'"):
        make_criterion(vector_reduction="median")
