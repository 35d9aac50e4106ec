"""Matching against brute force over all assignments, costs against loops, and the errors of broken costs."""

import itertools
import math
import re

import pytest
import torch
from detectron2.utils.events import EventStorage

from querymask.common.matching import focal_class_cost, hungarian_assignment, pad_targets
from querymask.common.predictions import Assignment, Targets

NAN, INF = math.nan, math.inf


def make_targets(counts: list[int], boxes: torch.Tensor | None = None) -> Targets:
    boxes = torch.zeros(sum(counts), 4) if boxes is None else boxes
    images = [f"image{b}.jpg" for b in range(len(counts))]
    return Targets(counts, torch.zeros(sum(counts), dtype=torch.int64), boxes, [(8, 8)] * len(counts), images=images)


def best_total(cost: torch.Tensor) -> float:
    """Least sum over all assignments of the shorter side of (Q, T) to the longer one."""
    cost = cost if cost.shape[0] >= cost.shape[1] else cost.T
    rows, columns = range(cost.shape[0]), range(cost.shape[1])
    return min(sum(cost[r, c].item() for c, r in enumerate(p)) for p in itertools.permutations(rows, len(columns)))


def pairs_of(assignment: Assignment, layer: int, image: int) -> list[tuple[int, int]]:
    here = (assignment.layer == layer) & (assignment.image == image)
    return list(zip(assignment.query[here].tolist(), assignment.target[here].tolist(), strict=True))


@pytest.mark.parametrize("counts", [[3], [0], [0, 3], [3, 0], [2, 0, 4], [6, 1], [7]])
def test_assignment_is_the_best_one(counts: list[int]) -> None:
    """Also without targets, and with more targets than the 5 queries."""
    num_layers, num_queries, most = 2, 5, max(counts)
    generator = torch.Generator().manual_seed(sum(counts))
    terms = {
        "first": torch.randn(num_layers, len(counts), num_queries, most, generator=generator),
        "second": torch.randn(num_layers, len(counts), num_queries, most, generator=generator, dtype=torch.float64),
    }
    for b, count in enumerate(counts):
        terms["first"][:, b, :, count:] = -1e6  # padding is cheap, and yet must not be taken
    cost = terms["first"] + terms["second"]
    assignment = hungarian_assignment(terms, make_targets(counts))

    matched = [min(count, num_queries) for count in counts]
    assert assignment.num_layers == num_layers
    assert assignment.pairs_per_layer() == sum(matched)
    for layer in range(num_layers):
        for b, count in enumerate(counts):
            start = sum(counts[:b])
            pairs = pairs_of(assignment, layer, b)
            queries, targets = {q for q, _ in pairs}, {t for _, t in pairs}
            assert len(pairs) == len(queries) == len(targets) == matched[b]
            assert targets <= set(range(start, start + count))
            if count:
                total = sum(cost[layer, b, q, t - start].item() for q, t in pairs)
                assert total == pytest.approx(best_total(cost[layer, b, :, :count]))
    order = list(zip(assignment.layer.tolist(), assignment.image.tolist(), assignment.query.tolist(), strict=True))
    assert order == sorted(order)


def test_matched_targets_do_not_depend_on_padding() -> None:
    """Images of a batch are matched as they are alone."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(1, 3, 6, 4, generator=generator)
    counts = [4, 1, 2]
    together = hungarian_assignment({"cost": cost}, make_targets(counts))
    for b, count in enumerate(counts):
        alone = hungarian_assignment({"cost": cost[:, b : b + 1, :, :count]}, make_targets([count]))
        start = sum(counts[:b])
        assert [(q, t - start) for q, t in pairs_of(together, 0, b)] == pairs_of(alone, 0, 0)


def test_assignment_selects_and_sums() -> None:
    counts = [2, 0, 1]
    generator = torch.Generator().manual_seed(0)
    assignment = hungarian_assignment({"cost": torch.randn(2, 3, 4, 2, generator=generator)}, make_targets(counts))
    predictions = torch.randn(2, 3, 4, 5, generator=generator)
    selected = assignment.select(predictions)
    assert selected.shape == (6, 5)
    for i in range(6):
        layer, image, query = assignment.layer[i], assignment.image[i], assignment.query[i]
        assert torch.equal(selected[i], predictions[layer, image, query])
    values = torch.tensor([1.0, 2, 3, 10, 20, 30])
    assert assignment.sum_layers(values).tolist() == [6, 60]


def test_assignment_of_nothing() -> None:
    assignment = hungarian_assignment({"cost": torch.zeros(3, 2, 4, 0)}, make_targets([0, 0]))
    assert assignment.pairs_per_layer() == 0
    assert assignment.select(torch.zeros(3, 2, 4, 7)).shape == (0, 7)
    assert assignment.sum_layers(torch.zeros(0)).tolist() == [0, 0, 0]
    assert assignment.query.dtype == torch.int64


def test_pad_targets() -> None:
    values = torch.arange(1.0, 11).view(5, 2)
    padded = pad_targets(values, [2, 0, 3])
    zero = [0.0, 0.0]
    assert padded.tolist() == [[[1, 2], [3, 4], zero], [zero, zero, zero], [[5, 6], [7, 8], [9, 10]]]
    assert pad_targets(values[:0], [0, 0]).shape == (2, 0, 2)
    assert pad_targets(values[:0, 0], [0]).shape == (1, 0)


def test_focal_class_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64) * 4
    labels = torch.tensor([[3, 0], [1, 1]])
    cost = focal_class_cost(logits, labels, alpha=0.3, gamma=1.5, eps=1e-8)
    assert cost.shape == (2, 2, 3, 2)
    for layer, image, query, target in itertools.product(range(2), range(2), range(3), range(2)):
        p = 1 / (1 + math.exp(-logits[layer, image, query, labels[image, target]].item()))
        positive = 0.3 * (1 - p) ** 1.5 * -math.log(p + 1e-8)
        negative = 0.7 * p**1.5 * -math.log(1 - p + 1e-8)
        assert cost[layer, image, query, target].item() == pytest.approx(positive - negative)


def test_focal_class_cost_is_not_in_half_precision() -> None:
    """With 1e-8 added to 1 - p, bfloat16 would take the logarithm of zero from p = 0.998 on."""
    logits = torch.tensor([12.0, -12.0, 60.0, -60.0], dtype=torch.bfloat16).view(1, 1, 4, 1)
    cost = focal_class_cost(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert cost.dtype == torch.float32 and torch.isfinite(cost).all()
    assert torch.equal(cost, focal_class_cost(logits.float(), torch.zeros(1, 1, dtype=torch.int64)))


def broken_costs(counts: list[int]) -> dict[str, torch.Tensor]:
    """Costs of 2 layers and 4 queries, to be broken by the test."""
    shape = (2, len(counts), 4, max(counts))
    return {"class cost": torch.zeros(shape), "L1 box cost": torch.zeros(shape)}


def error_of(terms: dict[str, torch.Tensor], targets: Targets) -> str:
    with pytest.raises(FloatingPointError) as info:
        hungarian_assignment(terms, targets)
    return str(info.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_predictions_at_fault(value: float) -> None:
    """Named: iteration, layer, image, cost term, number of predictions; no target, also if there is only one."""
    for counts in ([2, 3], [2, 1]):
        terms = broken_costs(counts)
        terms["L1 box cost"][1, 1, 2:] = value
        with EventStorage(start_iter=1234):
            message = error_of(terms, make_targets(counts, boxes=torch.zeros(sum(counts), 4)))
        for part in ("iteration 1234:", "decoder layer 1 ", f"image1.jpg ({counts[1]} targets)"):
            assert part in message
        assert "L1 box cost: the predictions of 2 of 4 queries at fault" in message
        assert "class cost" not in message and not re.search(r"target \d", message)
        assert "SOLVER.BASE_LR" in message


@pytest.mark.parametrize("counts", [[2, 3], [2, 1]])
def test_target_at_fault(counts: list[int]) -> None:
    """Number 0 of the second image, which may be its only one: then its costs alone would not tell."""
    boxes = torch.zeros(sum(counts), 4)
    boxes[2, 1] = NAN
    terms = broken_costs(counts)
    terms["L1 box cost"][:, 1, :, 0] = NAN
    message = error_of(terms, make_targets(counts, boxes=boxes))
    assert message.startswith("outside of training: ")
    assert "decoder layer 0 for image1.jpg" in message and "L1 box cost: target 0 at fault" in message
    assert "repair or drop its annotation" in message and "queries" not in message


def test_both_at_fault_in_several_terms() -> None:
    boxes = torch.zeros(3, 4)
    boxes[2] = INF
    terms = broken_costs([3])
    terms["class cost"][0, 0, 3] = NAN
    terms["L1 box cost"][0, 0, :, 2] = INF
    terms["L1 box cost"][0, 0, 3] = NAN
    message = error_of(terms, make_targets([3], boxes=boxes))
    assert "class cost: target 2 and the predictions of 1 of 4 queries at fault" in message
    assert "L1 box cost: target 2 and the predictions of 1 of 4 queries at fault" in message


def test_a_pair_at_fault() -> None:
    """Two empty boxes at one place have no GIoU, though both are finite: the prediction should not be empty."""
    terms = broken_costs([2])
    terms["class cost"][0, 0, 1, 1] = NAN
    assert "class cost: the predictions of 1 of 4 queries at fault" in error_of(terms, make_targets([2]))


def test_sum_overflows() -> None:
    terms = broken_costs([1])
    for term in terms.values():
        term.fill_(3e38)
    assert "the sum of the terms overflows" in error_of(terms, make_targets([1]))


def test_images_without_names() -> None:
    terms = broken_costs([1, 1])
    terms["class cost"][0, 1] = NAN
    targets = Targets([1, 1], torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), [(8, 8)] * 2)
    assert "for image 1 of the batch (1 targets)" in error_of(terms, targets)


def test_broken_padding_is_no_error() -> None:
    terms = broken_costs([3, 1])
    terms["class cost"][:, 1, :, 1:] = NAN
    assert hungarian_assignment(terms, make_targets([3, 1])).pairs_per_layer() == 4
