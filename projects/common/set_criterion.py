"""The skeleton of set prediction (Carion et al. 2020): match the predictions of every layer, then a loss per layer."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from querymask.common.detector import Detector
from querymask.common.matching import hungarian_assignment
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.processes import Processes, whole_batch
from querymask.common.transfer import numbers_to_device


class SetCriterion:
    """Costs of the matching and losses of classes and boxes; subclasses say which.

    Args:
        weights: factor of every loss by its name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)

    @abstractmethod
    def cost_terms(self, found: Any, targets: Targets) -> dict[str, Tensor]:
        """Weighted costs (N, B, Q, T) by name."""

    @abstractmethod
    def layer_losses(
        self, found: Any, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """Losses (N,) by name, before their weights."""

    def losses(self, found: Any, targets: Targets, assignment: Assignment, normalizers: Normalizers) -> list[LossTerm]:
        """A term for every loss and layer."""
        terms = []
        for name, values in self.layer_losses(found, targets, assignment, normalizers).items():
            terms += loss_terms(name, values, self.weights[name], assignment.num_layers)
        return terms


def box_criterion_arguments(section: CfgNode) -> dict[str, Any]:
    """``costs``, ``weights`` and ``focal_alpha`` of a criterion of classes and boxes, from a detector's section."""
    return {
        "costs": {"class": section.COST_CLASS, "bbox": section.COST_BBOX, "giou": section.COST_GIOU},
        "weights": {
            "loss_ce": section.CLASS_WEIGHT,
            "loss_bbox": section.BBOX_WEIGHT,
            "loss_giou": section.GIOU_WEIGHT,
        },
        "focal_alpha": section.FOCAL_ALPHA,
    }


class SetDetector(Detector):
    """A detector whose queries are matched one to one with the targets, in every layer, at the least cost.

    Args:
        criterion: what costs and what is lost.

    Attributes:
        num_queries: Q.
    """

    num_queries: int

    def __init__(self, criterion: SetCriterion) -> None:
        super().__init__()
        self.criterion = criterion

    @torch.no_grad()
    def match(self, found: Predictions, targets: Targets, mask_costs: Mapping[str, Tensor]) -> Assignment:
        """See :class:`Detector`."""
        return hungarian_assignment({**self.criterion.cost_terms(found, targets), **mask_costs}, targets)

    def normalizers(self, targets: Targets, assignment: Assignment) -> Normalizers:
        """Averages over the processes.

        At least 1 in the whole batch, not in every process as in the releases: so gradients do not depend on the number
        of processes even where a batch has fewer targets than processes.
        """
        counts = whole_batch(targets.counts)
        pairs = assignment.pairs_per_layer()
        if counts is not targets.counts:  # how many pairs other parts of the batch have is known, too
            pairs = sum(min(count, self.num_queries) for count in counts)
        processes = Processes()
        totals = processes.total(
            numbers_to_device([float(sum(counts)), float(pairs)], torch.get_default_dtype(), targets.labels.device)
        )
        return Normalizers(*totals.clamp(min=1) / processes.count)

    def losses(
        self, found: Predictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> list[LossTerm]:
        """See :class:`Detector`."""
        return self.criterion.losses(found, targets, assignment, normalizers)


def focal_class_loss(
    logits: Tensor, labels: Tensor, assignment: Assignment, normalizer: Tensor, alpha: float
) -> Tensor:
    """Focal loss over all queries and classes, where unmatched queries have no positive class.

    Args:
        logits: (N, B, Q, K).
        labels: (sum of counts,).

    Returns:
        (N,): summed over the layer, divided by the normalizer.
    """
    logits = full_precision(logits)
    one_hot = torch.zeros_like(logits)
    places = assignment.layer, assignment.image, assignment.query, labels[assignment.target]
    one_hot.index_put_(places, one_hot.new_ones(()))  # older torch copies a plain 1 from the host, and waits
    return sigmoid_focal_loss(logits, one_hot, alpha).sum((1, 2, 3)) / normalizer
