"""The skeleton of a set criterion: match the predictions of every decoder layer, then a loss per layer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from querymask.common.losses import sigmoid_focal_loss
from querymask.common.matching import Assignment, Targets, hungarian_assignments
from querymask.common.precision import full_precision
from querymask.common.processes import Processes
from querymask.common.transfer import numbers_to_device


@dataclass
class Normalizers:
    """Averages over the processes, where the whole batch counts as at least 1, so that gradients averaged by DDP are
    those of the whole batch in one process.

    Attributes:
        targets: number of targets.
        pairs: number of matched pairs of a layer.
    """

    targets: torch.Tensor
    pairs: torch.Tensor


class SetCriterion(nn.Module):
    """Match, then compute losses per layer; subclasses say which costs and which losses.

    Args:
        weights: factor of every loss by its name without layer suffix.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    @abstractmethod
    def cost_terms(self, outputs: Any, targets: Targets) -> dict[str, torch.Tensor]:
        """Weighted costs (N, B, Q, T) by name."""

    @abstractmethod
    def layer_losses(
        self, outputs: Any, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Losses by name and layer, before their weights."""

    def match(self, outputs: Any, targets: Targets) -> Assignment:
        """Assign targets to queries, without gradient."""
        return self.match_all([(outputs, targets)])[0]

    def match_all(self, pairs: Sequence[tuple[Any, Targets]]) -> list[Assignment]:
        """:meth:`match` of several outputs with their targets; a GPU is waited for only once."""
        with torch.no_grad():
            return hungarian_assignments([(self.cost_terms(*pair), pair[1]) for pair in pairs])

    def forward(self, outputs: Any, targets: Targets, assignment: Assignment | None = None) -> dict[str, torch.Tensor]:
        """Losses before their weights; the last layer's have no suffix, layer i's end in ``_i``.

        Args:
            assignment: of the targets, where it is known already.
        """
        assignment = assignment or self.match(outputs, targets)
        normalizers = normalizers_over_processes(assignment, targets)
        losses = {}
        for name, values in self.layer_losses(outputs, targets, assignment, normalizers).items():
            for layer, value in values.items():
                losses[name if layer == assignment.num_layers - 1 else f"{name}_{layer}"] = value
        return losses

    def weigh(self, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Multiply every loss by the weight of its name."""
        return {name: value * self.weights[_without_suffix(name)] for name, value in losses.items()}


def _without_suffix(name: str) -> str:
    base, _, suffix = name.rpartition("_")
    return base if suffix.isdigit() or suffix == "enc" else name


def normalizers_over_processes(assignment: Assignment, targets: Targets) -> Normalizers:
    """Average the counts over all processes.

    At least 1 in the whole batch, not in every process as in the releases: so gradients do not depend on the number of
    processes even where a batch has fewer targets than processes.
    """
    counts = [float(sum(targets.counts)), float(assignment.pairs_per_layer())]
    processes = Processes()
    totals = processes.total(numbers_to_device(counts, torch.get_default_dtype(), targets.labels.device))
    return Normalizers(*totals.clamp(min=1) / processes.count)


def by_layer(values: torch.Tensor) -> dict[int, torch.Tensor]:
    """(N,) -> value by layer."""
    return dict(enumerate(values.unbind()))


def focal_class_loss(
    logits: torch.Tensor, labels: torch.Tensor, assignment: Assignment, normalizer: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Focal loss over all queries and classes, where unmatched queries have no positive class.

    Args:
        logits: (N, B, Q, K).
        labels: (sum of counts,).

    Returns:
        (N,): summed over the layer, divided by the normalizer.
    """
    logits = full_precision(logits)
    one_hot = torch.zeros_like(logits)
    one_hot[assignment.layer, assignment.image, assignment.query, labels[assignment.target]] = 1
    return sigmoid_focal_loss(logits, one_hot, alpha).sum((1, 2, 3)) / normalizer


@torch.no_grad()
def class_error(logits: torch.Tensor, labels: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """Percentage of the last layer's matched queries whose best class is wrong; 100 without targets. For logging."""
    n = assignment.pairs_per_layer()
    if not n:
        return logits.new_full((), 100.0)
    predicted = assignment.select(logits)[-n:].argmax(-1)
    return 100 - 100 * (predicted == labels[assignment.target[-n:]]).to(logits.dtype).mean()


@torch.no_grad()
def cardinality_error(logits: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Mean difference of the number of targets and the number of queries whose best class is not the last one.

    A left-over of DETR that the release logs; with sigmoid classifiers it says little.

    Args:
        logits: (N, B, Q, K).

    Returns:
        (N,)
    """
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (predicted - numbers_to_device(counts, torch.int64, logits.device)).abs().to(logits.dtype).mean(-1)
