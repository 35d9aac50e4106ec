"""ISDA's matching and losses against loops over queries and targets."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from querymask.common.predictions import Predictions, Targets, unweighted, weighted
from querymask.common.set_criterion import SetDetector
from querymask.isda.criterion import ClassCriterion
from querymask.isda.kernels import KernelBranch, Kernels

LAYERS, QUERIES, CLASSES, WIDTH, SIZE = 3, 4, 5, 6, (3, 5)
BATCHES = [[2, 1], [0, 3], [3, 0], [0], [0, 0], [6, 1]]


def make_branch(mask_loss: str = "dice") -> KernelBranch:
    return KernelBranch(
        width=32,
        strides=[8],
        shapes={},
        kernel_fcs=1,
        kernel_positions="logit",
        mask_stride=8,
        mask_feature_dim=32,
        mask_positions=False,
        mask_loss=mask_loss,
    )


Outputs = tuple[Predictions, Kernels]


def make_outputs(batch: int) -> Outputs:
    """Random predictions in float64, all leaves with gradient."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "requires_grad": True}
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, **options)
    kernels = torch.randn(LAYERS, batch, QUERIES, WIDTH, **options)
    return Predictions(logits, logits), Kernels(kernels, torch.randn(batch, WIDTH, *SIZE, **options))


def make_targets(counts: Sequence[int]) -> tuple[Targets, torch.Tensor]:
    """Targets, and their soft masks."""
    generator = torch.Generator().manual_seed(1)
    n = sum(counts)
    masks = torch.randint(0, 5, (n, *SIZE), generator=generator).double() / 4
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return Targets(counts, labels, torch.zeros(n, 4), [(24, 40)] * len(counts)), masks


def compute(
    outputs: Outputs, targets: Targets, masks: torch.Tensor, mask_loss: str = "dice", class_cost: str = "focal"
) -> list[Any]:
    """The terms of detector and branch."""
    found, made = outputs
    detector, branch = SetDetector(ClassCriterion(2.0, 2.0, class_cost=class_cost)), make_branch(mask_loss)
    with torch.no_grad():
        costs = branch.costs(found, made, masks, targets)
    assignment = detector.match(found, targets, costs)
    normalizers = detector.normalizers(targets, assignment)
    terms = detector.losses(found, targets, assignment, normalizers)
    return terms + branch.losses(found, made, masks, targets, assignment, normalizers)


def masks_of(made: Kernels, layer: int, image: int) -> torch.Tensor:
    """Probabilities [query, row, column]."""
    return torch.einsum("qc,chw->qhw", made.kernels[layer, image], made.features[image]).sigmoid()


def slow_iou(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    both = (p * t).sum()
    return both / (p.sum() + t.sum() - both + 1e-6)


def slow_cost(
    outputs: Outputs, layer: int, image: int, labels: torch.Tensor, masks: torch.Tensor, class_cost: str
) -> list:
    """Cost [query][target] of one layer and image."""
    rows = []
    for q in range(QUERIES):
        row = []
        for label, mask in zip(labels.tolist(), masks, strict=True):
            s = 1 / (1 + math.exp(-outputs[0].logits[layer, image, q, label].item()))
            cost = -s
            if class_cost == "focal":
                cost = -0.25 * (1 - s) ** 2 * math.log(s + 1e-12) + 0.75 * s**2 * math.log(1 - s + 1e-12)
            row.append(2 * cost + 3 * (1 - slow_iou(masks_of(outputs[1], layer, image)[q], mask).item()))
        rows.append(row)
    return rows


def best_pairs(cost: list, count: int) -> list[tuple[int, int]]:
    """(query, target) of the cheapest assignment, by trying all of them."""
    if count <= QUERIES:
        choices = (list(zip(queries, range(count))) for queries in itertools.permutations(range(QUERIES), count))
    else:
        choices = (list(zip(range(QUERIES), chosen)) for chosen in itertools.permutations(range(count), QUERIES))
    return min(choices, key=lambda pairs: sum(cost[q][t] for q, t in pairs))


@pytest.mark.parametrize(("mask_loss", "class_cost"), [("dice", "focal"), ("iou", "focal"), ("iou", "probability")])
@pytest.mark.parametrize("counts", BATCHES)
def test_against_loops(counts: list[int], mask_loss: str, class_cost: str) -> None:
    outputs, (targets, all_masks) = make_outputs(len(counts)), make_targets(counts)
    losses = unweighted(compute(outputs, targets, all_masks, mask_loss, class_cost))
    labels, masks = targets.labels.split(counts), all_masks.split(counts)
    pairs = max(sum(min(count, QUERIES) for count in counts), 1)
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        one_hot = torch.zeros(len(counts), QUERIES, CLASSES, dtype=torch.float64)
        mask_sum = torch.zeros((), dtype=torch.float64)
        for image, count in enumerate(counts):
            cost = slow_cost(outputs, layer, image, labels[image], masks[image], class_cost)
            for q, t in best_pairs(cost, count):
                one_hot[image, q, labels[image][t]] = 1
                p, truth = masks_of(outputs[1], layer, image)[q], masks[image][t]
                dice = 1 - 2 * (p * truth).sum() / ((p**2).sum() + 0.001 + (truth**2).sum() + 0.001)
                mask_sum = mask_sum + (dice if mask_loss == "dice" else 1 - slow_iou(p, truth))
        focal = sigmoid_focal_loss(outputs[0].logits[layer], one_hot, reduction="sum") / pairs
        assert losses[f"loss_cls{suffix}"].item() == pytest.approx(focal.item(), rel=1e-7)
        expected = (mask_sum / (pairs + 1e-5)).item()
        assert losses[f"loss_mask{suffix}"].item() == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_class_costs_choose_other_pairs() -> None:
    """So that the comparison with loops tells them apart."""
    (found, made), (targets, masks) = make_outputs(2), make_targets([2, 1])
    with torch.no_grad():
        costs = make_branch().costs(found, made, masks, targets)
        chosen = [
            SetDetector(ClassCriterion(9.0, 2.0, class_cost=kind)).match(found, targets, costs).query
            for kind in ("focal", "probability")
        ]
    assert not torch.equal(*chosen)


@pytest.mark.parametrize("mask_loss", ["dice", "iou"])
def test_gradients(mask_loss: str) -> None:
    """Finite differences; the assignment stays the same within their step."""
    (found, made), (targets, masks) = make_outputs(2), make_targets([2, 1])

    def total(logits: torch.Tensor, kernels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        outputs = Predictions(logits, logits), Kernels(kernels, features)
        return sum(weighted(compute(outputs, targets, masks, mask_loss)).values())

    assert torch.autograd.gradcheck(total, (found.logits, made.kernels, made.features))


def test_without_instances_all_parts_are_connected() -> None:
    """Zero gradients, not missing ones: distributed training waits for every parameter."""
    found, made = make_outputs(2)
    sum(unweighted(compute((found, made), *make_targets([0, 0]))).values()).backward()
    assert found.logits.grad.any()
    assert not made.kernels.grad.any() and not made.features.grad.any()


@pytest.mark.parametrize("mask_loss", ["dice", "iou"])
def test_masks_are_compared_at_points(mask_loss: str) -> None:
    """As if the mask features had no other cells, which are drawn anew for the matching and for the loss."""
    (found, made), (targets, masks) = make_outputs(2), make_targets([2, 3])
    branch, whole = make_branch(mask_loss), make_branch(mask_loss)
    branch.points = 7
    torch.manual_seed(5)
    cost = branch.costs(found, made, masks, targets)["mask cost"]
    assignment = SetDetector(ClassCriterion(2.0, 2.0)).match(found, targets, {"mask cost": cost})
    normalizers = SetDetector(ClassCriterion(2.0, 2.0)).normalizers(targets, assignment)
    terms = branch.losses(found, made, masks, targets, assignment, normalizers)

    torch.manual_seed(5)
    at = [torch.randint(SIZE[0] * SIZE[1], (7,)) for _ in range(2)]
    assert not torch.equal(*at)
    only = [Kernels(made.kernels, made.features.flatten(2)[:, :, None, cells]) for cells in at]
    there = [masks.flatten(1)[:, None, cells] for cells in at]
    torch.testing.assert_close(cost, whole.costs(found, only[0], there[0], targets)["mask cost"])
    expected = whole.losses(found, only[1], there[1], targets, assignment, normalizers)
    for term, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(term.value, other.value)
    branch.points = SIZE[0] * SIZE[1]  # as many as there are: all of them, once
    torch.testing.assert_close(branch.costs(found, made, masks, targets), whole.costs(found, made, masks, targets))


def test_cost_that_is_not_finite_is_named() -> None:
    found, made = make_outputs(1)
    made.kernels.data[1, 0, 2] = math.nan
    with pytest.raises(FloatingPointError, match="layer 1.*mask cost: the predictions of 1 of 4 queries"):
        compute((found, made), *make_targets([2]))
