"""Matching cost and loss of ISDA's classes; those of its masks are in ``kernels.py``."""

from torch import Tensor

from querymask.common.matching import focal_class_cost, pad_targets
from querymask.common.predictions import Assignment, Normalizers, Predictions, Targets
from querymask.common.set_criterion import SetCriterion, focal_class_loss


class ClassCriterion(SetCriterion):
    """Focal cost and focal loss in every layer.

    Args:
        cost: weight of the matching cost.
        weight: of ``loss_cls``.
        focal_alpha: alpha of both.
    """

    def __init__(self, cost: float, weight: float, focal_alpha: float = 0.25) -> None:
        super().__init__({"loss_cls": weight})
        self.cost = cost
        self.focal_alpha = focal_alpha

    def cost_terms(self, found: Predictions, targets: Targets) -> dict[str, Tensor]:
        """The class cost (N, B, Q, T)."""
        labels = pad_targets(targets.labels, targets.counts)
        return {"class cost": self.cost * focal_class_cost(found.logits, labels, self.focal_alpha, eps=1e-12)}

    def layer_losses(
        self, found: Predictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """``loss_cls`` of every layer."""
        loss = focal_class_loss(found.logits, targets.labels, assignment, normalizers.pairs, self.focal_alpha)
        return {"loss_cls": loss}
