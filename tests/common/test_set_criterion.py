"""The skeleton of a set criterion: names, weights, normalisation, class loss and statistics."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from querymask.common.matching import Assignment, Targets, hungarian_assignment
from querymask.common.set_criterion import (
    Normalizers,
    SetCriterion,
    by_layer,
    cardinality_error,
    class_error,
    focal_class_loss,
    normalizers_over_processes,
)


class Distance(SetCriterion):
    """Matches numbers to numbers by their distance. Outputs (N, B, Q), targets in the field ``value``."""

    def cost_terms(self, outputs: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled(), "matching needs no gradient"
        padded = torch.nn.utils.rnn.pad_sequence(targets.fields["value"].split(list(targets.counts)), batch_first=True)
        return {"distance": (outputs[..., None] - padded[None, :, None]).abs()}

    def layer_losses(
        self, outputs: torch.Tensor, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, dict[int, torch.Tensor]]:
        distance = (assignment.select(outputs) - targets.fields["value"][assignment.target]).abs()
        sums = by_layer(assignment.sum_layers(distance) / normalizers.targets)
        return {"loss_far": sums, "loss_late": {layer: value for layer, value in sums.items() if layer > 0}}


def numbers(*counts: int) -> Targets:
    total = sum(counts)
    return Targets(list(counts), torch.zeros(total, dtype=torch.int64), {"value": torch.arange(float(total))})


def test_losses_by_name() -> None:
    outputs = torch.tensor([[[0.1, 5, 9], [1.5, 9, 9]], [[0.0, 3, 4], [9.0, 8, 3]], [[0.0, 3, 9], [4.0, 8, 1]]])
    outputs.requires_grad_()
    criterion = Distance({"loss_far": 2.0, "loss_late": 10.0})
    losses = criterion(outputs, numbers(1, 1))
    expected = {"loss_far_0": 0.3, "loss_far_1": 1.0, "loss_far": 0.0, "loss_late_1": 1.0, "loss_late": 0.0}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected)
    weighted = {name: value.item() for name, value in criterion.weigh(losses).items()}
    assert weighted == pytest.approx(
        {"loss_far_0": 0.6, "loss_far_1": 2.0, "loss_far": 0.0, "loss_late_1": 10.0, "loss_late": 0.0}
    )
    losses["loss_far_0"].backward()
    assert outputs.grad[0, :, 0].tolist() == [0.5, 0.5] and outputs.grad.abs().sum() == 1


def test_losses_of_one_layer_have_no_suffix() -> None:
    assert set(Distance({})(torch.zeros(1, 1, 2), numbers(1))) == {"loss_far"}


def test_weights_ignore_suffixes() -> None:
    weigh = Distance({"loss_a": 2.0, "loss_a_b": 3.0}).weigh
    one = torch.ones(())
    weighted = weigh({"loss_a": one, "loss_a_0": one, "loss_a_12": one, "loss_a_enc": one, "loss_a_b_1": one})
    assert list(weighted.values()) == [2, 2, 2, 2, 3]
    with pytest.raises(KeyError, match="loss_unknown"):
        weigh({"loss_unknown_0": one})


@pytest.mark.parametrize(
    ("counts", "targets", "pairs"), [([0, 3], 3, 3), ([3, 0], 3, 3), ([5, 1], 6, 3), ([0, 0], 1, 1), ([0], 1, 1)]
)
def test_normalizers(counts: list[int], targets: int, pairs: int) -> None:
    """Numbers of targets and of pairs, of which an image has at most as many as its 2 or 3 queries; at least 1."""
    num_queries = 2 if counts == [5, 1] else 3
    all_targets = numbers(*counts)
    assignment = hungarian_assignment({"cost": torch.zeros(2, len(counts), num_queries, max(counts))}, all_targets)
    normalizers = normalizers_over_processes(assignment, all_targets)
    assert (normalizers.targets.item(), normalizers.pairs.item()) == (targets, pairs)


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [3, 0], [0, 0]])
def test_focal_class_loss(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (sum(counts),), generator=generator)
    targets = Targets(counts, labels)
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


def test_class_error() -> None:
    """Two of the four matched queries of the last layer have the right class; those of the first layer do not count."""
    logits = torch.zeros(2, 2, 3, 4)
    labels = torch.tensor([2, 1, 3, 3])
    targets = Targets([1, 3], labels)
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
    nothing = hungarian_assignment({"cost": torch.zeros(2, 2, 3, 0)}, Targets([0, 0], labels[:0]))
    assert class_error(logits, labels[:0], nothing).item() == 100


def test_cardinality_error() -> None:
    logits = torch.zeros(2, 2, 3, 4)
    logits[0, :, :, 3] = 1  # all of the last class: no object
    logits[1, 0, :2, 0] = 1  # two objects
    logits[1, 0, 2, 3] = 1
    logits[1, 1, :, 1] = 1  # three objects
    assert cardinality_error(logits, [4, 1]).tolist() == [(4 + 1) / 2, (2 + 2) / 2]
