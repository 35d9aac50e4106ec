"""ISDA's matching and losses against loops over queries and targets."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from querymask.common.matching import Targets
from querymask.isda.criterion import ISDACriterion, ISDAOutput

LAYERS, QUERIES, CLASSES, WIDTH, SIZE = 3, 4, 5, 6, (3, 5)
BATCHES = [[2, 1], [0, 3], [3, 0], [0], [0, 0], [6, 1]]


def make_criterion(**options: Any) -> ISDACriterion:
    return ISDACriterion({"class": 2.0, "mask": 3.0}, {"loss_cls": 2.0, "loss_mask": 3.0}, **options)


def make_outputs(batch: int) -> ISDAOutput:
    """Random predictions in float64, all leaves with gradient."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "requires_grad": True}
    return ISDAOutput(
        torch.randn(LAYERS, batch, QUERIES, CLASSES, **options),
        torch.randn(LAYERS, batch, QUERIES, WIDTH, **options),
        torch.randn(batch, WIDTH, *SIZE, **options),
        torch.rand(batch, QUERIES, 2),
    )


def make_targets(counts: Sequence[int]) -> Targets:
    generator = torch.Generator().manual_seed(1)
    n = sum(counts)
    masks = torch.randint(0, 5, (n, *SIZE), generator=generator).double() / 4  # soft
    return Targets(counts, torch.randint(0, CLASSES, (n,), generator=generator), {"masks": masks})


def masks_of(outputs: ISDAOutput, layer: int, image: int) -> torch.Tensor:
    """Probabilities [query, row, column]."""
    return torch.einsum("qc,chw->qhw", outputs.kernels[layer, image], outputs.mask_features[image]).sigmoid()


def slow_iou(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    both = (p * t).sum()
    return both / (p.sum() + t.sum() - both + 1e-6)


def slow_cost(outputs: ISDAOutput, layer: int, image: int, labels: torch.Tensor, masks: torch.Tensor) -> list:
    """Cost [query][target] of one layer and image."""
    rows = []
    for q in range(QUERIES):
        row = []
        for label, mask in zip(labels.tolist(), masks, strict=True):
            s = 1 / (1 + math.exp(-outputs.logits[layer, image, q, label].item()))
            focal = -0.25 * (1 - s) ** 2 * math.log(s + 1e-12) + 0.75 * s**2 * math.log(1 - s + 1e-12)
            row.append(2 * focal + 3 * (1 - slow_iou(masks_of(outputs, layer, image)[q], mask).item()))
        rows.append(row)
    return rows


def best_pairs(cost: list, count: int) -> list[tuple[int, int]]:
    """(query, target) of the cheapest assignment, by trying all of them."""
    if count <= QUERIES:
        choices = (list(zip(queries, range(count))) for queries in itertools.permutations(range(QUERIES), count))
    else:
        choices = (list(zip(range(QUERIES), chosen)) for chosen in itertools.permutations(range(count), QUERIES))
    return min(choices, key=lambda pairs: sum(cost[q][t] for q, t in pairs))


@pytest.mark.parametrize("mask_loss", ["dice", "iou"])
@pytest.mark.parametrize("counts", BATCHES)
def test_against_loops(counts: list[int], mask_loss: str) -> None:
    criterion, outputs, targets = make_criterion(mask_loss=mask_loss), make_outputs(len(counts)), make_targets(counts)
    losses = criterion(outputs, targets)
    labels, masks = targets.labels.split(counts), targets.fields["masks"].split(counts)
    pairs = max(sum(min(count, QUERIES) for count in counts), 1)
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        one_hot = torch.zeros(len(counts), QUERIES, CLASSES, dtype=torch.float64)
        mask_sum = torch.zeros((), dtype=torch.float64)
        for image, count in enumerate(counts):
            cost = slow_cost(outputs, layer, image, labels[image], masks[image])
            for q, t in best_pairs(cost, count):
                one_hot[image, q, labels[image][t]] = 1
                p, truth = masks_of(outputs, layer, image)[q], masks[image][t]
                dice = 1 - 2 * (p * truth).sum() / ((p**2).sum() + 0.001 + (truth**2).sum() + 0.001)
                mask_sum = mask_sum + (dice if mask_loss == "dice" else 1 - slow_iou(p, truth))
        focal = sigmoid_focal_loss(outputs.logits[layer], one_hot, reduction="sum") / pairs
        assert losses[f"loss_cls{suffix}"].item() == pytest.approx(focal.item(), rel=1e-7)
        expected = (mask_sum / (pairs + 1e-5)).item()
        assert losses[f"loss_mask{suffix}"].item() == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("mask_loss", ["dice", "iou"])
def test_gradients(mask_loss: str) -> None:
    """Finite differences; the assignment stays the same within their step."""
    criterion, outputs, targets = make_criterion(mask_loss=mask_loss), make_outputs(2), make_targets([2, 1])

    def total(logits: torch.Tensor, kernels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        losses = criterion(ISDAOutput(logits, kernels, features, outputs.references), targets)
        return sum(criterion.weigh(losses).values())

    assert torch.autograd.gradcheck(total, (outputs.logits, outputs.kernels, outputs.mask_features))


def test_without_instances_all_parts_are_connected() -> None:
    """Zero gradients, not missing ones: distributed training waits for every parameter."""
    criterion, outputs = make_criterion(), make_outputs(2)
    sum(criterion(outputs, make_targets([0, 0])).values()).backward()
    assert outputs.logits.grad.any()
    assert not outputs.kernels.grad.any() and not outputs.mask_features.grad.any()


def test_cost_that_is_not_finite_is_named() -> None:
    criterion, outputs, targets = make_criterion(), make_outputs(1), make_targets([2])
    outputs.kernels.data[1, 0, 2] = math.nan
    with pytest.raises(FloatingPointError, match="layer 1.*mask cost: the predictions of 1 of 4 queries"):
        criterion(outputs, targets)
