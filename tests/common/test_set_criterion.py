"""The skeleton of a set criterion: names, weights, normalisation, class loss and statistics."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from querymask.common.matching import hungarian_assignment
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Targets, loss_terms, unweighted, weighted
from querymask.common.set_criterion import (
    SetCriterion,
    SetDetector,
    focal_class_loss,
)


class Distance(SetCriterion):
    """Matches numbers to numbers by their distance. Predictions (N, B, Q); targets are the boxes' left sides."""

    def cost_terms(self, found: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled(), "matching needs no gradient"
        values = targets.boxes[:, 0].split(list(targets.counts))
        padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return {"distance": (found[..., None] - padded[None, :, None]).abs()}

    def layer_losses(
        self, found: torch.Tensor, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, torch.Tensor]:
        distance = (assignment.select(found) - targets.boxes[assignment.target, 0]).abs()
        sums = assignment.sum_layers(distance) / normalizers.targets
        return {"loss_far": sums, "loss_late": sums[1:]}


def make_targets(*counts: int, labels: torch.Tensor | None = None) -> Targets:
    total = sum(counts)
    labels = torch.zeros(total, dtype=torch.int64) if labels is None else labels
    boxes = torch.arange(float(total))[:, None].expand(-1, 4)
    return Targets(list(counts), labels, boxes, [(8, 8)] * len(counts))


def compute(found: torch.Tensor, targets: Targets, weights: dict[str, float]) -> list[LossTerm]:
    detector = SetDetector(Distance(weights))
    assignment = detector.match(found, targets, {})
    return detector.losses(found, targets, assignment, detector.normalizers(targets, assignment))


def test_losses_by_name() -> None:
    found = torch.tensor([[[0.1, 5, 9], [1.5, 9, 9]], [[0.0, 3, 4], [9.0, 8, 3]], [[0.0, 3, 9], [4.0, 8, 1]]])
    found.requires_grad_()
    terms = compute(found, make_targets(1, 1), {"loss_far": 2.0, "loss_late": 10.0})
    expected = {"loss_far_0": 0.3, "loss_far_1": 1.0, "loss_far": 0.0, "loss_late_1": 1.0, "loss_late": 0.0}
    losses = unweighted(terms)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected)
    assert {name: value.item() for name, value in weighted(terms).items()} == pytest.approx(
        {"loss_far_0": 0.6, "loss_far_1": 2.0, "loss_far": 0.0, "loss_late_1": 10.0, "loss_late": 0.0}
    )
    losses["loss_far_0"].backward()
    assert found.grad[0, :, 0].tolist() == [0.5, 0.5] and found.grad.abs().sum() == 1


def test_losses_of_one_layer_have_no_suffix() -> None:
    assert [term.key for term in loss_terms("loss_far", torch.zeros(1), 1.0, 1)] == ["loss_far"]


def test_a_loss_without_weight_is_an_error() -> None:
    with pytest.raises(KeyError, match="loss_late"):
        compute(torch.zeros(2, 1, 2), make_targets(1), {"loss_far": 2.0})


def test_mask_costs_have_a_say() -> None:
    detector, targets = SetDetector(Distance({})), make_targets(1)
    found = torch.tensor([[[0.0, 0.1]]])
    assert detector.match(found, targets, {}).query.tolist() == [0]
    assert detector.match(found, targets, {"mask cost": torch.tensor([[[[1.0], [0.0]]]])}).query.tolist() == [1]


@pytest.mark.parametrize(
    ("counts", "targets", "pairs"), [([0, 3], 3, 3), ([3, 0], 3, 3), ([5, 1], 6, 3), ([0, 0], 1, 1), ([0], 1, 1)]
)
def test_normalizers(counts: list[int], targets: int, pairs: int) -> None:
    """Numbers of targets and of pairs, of which an image has at most as many as its 2 or 3 queries; at least 1."""
    num_queries = 2 if counts == [5, 1] else 3
    all_targets = make_targets(*counts)
    assignment = hungarian_assignment({"cost": torch.zeros(2, len(counts), num_queries, max(counts))}, all_targets)
    normalizers = SetDetector(Distance({})).normalizers(all_targets, assignment)
    assert (normalizers.targets.item(), normalizers.pairs.item()) == (targets, pairs)
    assert assignment.pairs_of_images(len(counts)) == [min(count, num_queries) for count in counts]


def test_layers_of_an_assignment() -> None:
    """Those from a layer on count from 0; the host knows how many pairs each image has, or asks."""
    assignment = hungarian_assignment({"cost": torch.rand(3, 2, 4, 3)}, make_targets(3, 1))
    part = assignment.since(1)
    assert part.num_layers == 2 and part.layer.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(part.query, assignment.query[4:]) and torch.equal(part.target, assignment.target[4:])
    last = assignment.last()
    assert torch.equal(last.query, assignment.query[8:]) and last.layer.tolist() == [0] * 4
    unknown = Assignment(last.layer, last.image, last.query, last.target, 1)
    assert unknown.pairs_of_images(2) == last.pairs_of_images(2) == [3, 1]


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [3, 0], [0, 0]])
def test_focal_class_loss(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (sum(counts),), generator=generator)
    targets = make_targets(*counts, labels=labels)
    assignment = hungarian_assignment({"cost": torch.randn(2, 2, 4, max(counts), generator=generator)}, targets)
    loss = focal_class_loss(logits, labels, assignment, torch.tensor(3.0), alpha=0.25)
    for layer in range(2):
        one_hot = torch.zeros(2, 4, 5, dtype=torch.float64)
        for i, number in enumerate(assignment.layer.tolist()):
            if number == layer:
                one_hot[assignment.image[i], assignment.query[i], labels[assignment.target[i]]] = 1
        assert one_hot.sum() == sum(counts)
        expected = sigmoid_focal_loss(logits[layer], one_hot, 0.25, 2.0).sum() / 3
        assert loss[layer].item() == pytest.approx(expected.item())
    assert focal_class_loss(logits.bfloat16(), labels, assignment, torch.tensor(3.0), 0.25).dtype == torch.float32
