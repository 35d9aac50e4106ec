"""Matching cost and loss of ISDA's classes; those of its masks are in ``kernels.py``."""

from torch import Tensor

from querymask.common.matching import focal_class_cost, pad_targets, probability_cost
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, Normalizers, Predictions, Targets
from querymask.common.set_criterion import SetCriterion, focal_class_loss

CLASS_COSTS = ("focal", "probability")


class ClassCriterion(SetCriterion):
    """A class cost and the focal loss in every layer.

    Args:
        cost: weight of the matching cost.
        weight: of ``loss_cls``.
        focal_alpha: alpha of the focal cost and loss.
        class_cost: "focal", or "probability": minus that of the target's class.
    """

    def __init__(self, cost: float, weight: float, focal_alpha: float = 0.25, class_cost: str = "focal") -> None:
        if class_cost not in CLASS_COSTS:
            raise ValueError(f"MODEL.ISDA.CLASS_COST is {class_cost!r}: choose one of {', '.join(CLASS_COSTS)}")
        super().__init__({"loss_cls": weight})
        self.cost = cost
        self.class_cost = class_cost
        self.focal_alpha = focal_alpha

    def cost_terms(self, found: Predictions, targets: Targets) -> dict[str, Tensor]:
        """The class cost (N, B, Q, T)."""
        labels = pad_targets(targets.labels, targets.counts)
        if self.class_cost == "focal":
            cost = focal_class_cost(found.logits, labels, self.focal_alpha, eps=1e-12)
        else:
            cost = probability_cost(full_precision(found.logits).sigmoid(), labels)
        return {"class cost": self.cost * cost}

    def layer_losses(
        self, found: Predictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """``loss_cls`` of every layer."""
        loss = focal_class_loss(found.logits, targets.labels, assignment, normalizers.pairs, self.focal_alpha)
        return {"loss_cls": loss}
