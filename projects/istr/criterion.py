"""Matching costs and losses of ISTR's classes and boxes (sections 3.1 and 3.4); those of its masks are in codes.py."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from querymask.common.boxes import generalized_iou
from querymask.common.matching import focal_class_cost, pad_targets, probability_cost
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, Normalizers, Targets
from querymask.common.processes import Processes, whole_batch
from querymask.common.set_criterion import SetCriterion, focal_class_loss
from querymask.common.transfer import numbers_to_device
from querymask.istr.predictions import RecurrentPredictions

CLASSIFIERS = ("sigmoid", "softmax")
SOFTMAX_LOSSES = ("cross_entropy", "focal")


class RecurrentCriterion(SetCriterion):
    """Hungarian matching on class, L1 and GIoU; class, L1 and GIoU losses in every stage.

    Args:
        costs: weights of the matching costs ``class``, ``bbox``, ``giou``.
        weights: weights of ``loss_ce``, ``loss_bbox``, ``loss_giou``.
        classifier: "sigmoid" or "softmax", whose last logit is "no object".
        softmax_loss: of the latter, "cross_entropy" or "focal" (equation 8).
        focal_alpha: alpha of the focal losses.
        no_object_weight: of the cross-entropy.
    """

    def __init__(
        self,
        costs: Mapping[str, float],
        weights: Mapping[str, float],
        *,
        classifier: str = "sigmoid",
        softmax_loss: str = "cross_entropy",
        focal_alpha: float = 0.25,
        no_object_weight: float = 0.1,
    ) -> None:
        if classifier not in CLASSIFIERS:
            raise ValueError(f"MODEL.ISTR.CLASSIFIER is {classifier!r}: choose one of {', '.join(CLASSIFIERS)}")
        if softmax_loss not in SOFTMAX_LOSSES:
            raise ValueError(f"MODEL.ISTR.SOFTMAX_LOSS is {softmax_loss!r}: choose one of {', '.join(SOFTMAX_LOSSES)}")
        super().__init__(weights)
        self.costs = dict(costs)
        self.classifier = classifier
        self.softmax_loss = softmax_loss
        self.focal_alpha = focal_alpha
        self.no_object_weight = no_object_weight

    def cost_terms(self, found: RecurrentPredictions, targets: Targets) -> dict[str, Tensor]:
        """Class, L1 and GIoU costs (N, B, Q, T)."""
        boxes = found.relative_boxes()[:, :, :, None]  # (N, B, Q, 1, 4)
        target_boxes = pad_targets(relative_xyxy(targets, boxes), targets.counts)[None, :, None]  # (1, B, 1, T, 4)
        return {
            "class cost": self.costs["class"] * self.class_cost(found.logits, targets),
            "L1 box cost": self.costs["bbox"] * (boxes - target_boxes).abs().sum(-1),
            "GIoU box cost": -self.costs["giou"] * generalized_iou(boxes, target_boxes),
        }

    def class_cost(self, logits: Tensor, targets: Targets) -> Tensor:
        """The focal cost, or minus the probability (equation 6)."""
        labels = pad_targets(targets.labels, targets.counts)
        if self.classifier == "sigmoid":
            return focal_class_cost(logits, labels, self.focal_alpha)
        return probability_cost(full_precision(logits).softmax(-1), labels)

    def layer_losses(
        self, found: RecurrentPredictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """``loss_ce``, ``loss_bbox`` and ``loss_giou`` of every stage."""
        count = normalizers.targets
        boxes = assignment.select(found.relative_boxes())
        target_boxes = relative_xyxy(targets, boxes)[assignment.target]
        return {
            "loss_ce": self.class_losses(found.logits, targets, assignment, count),
            "loss_bbox": assignment.sum_layers((boxes - target_boxes).abs().sum(-1)) / count,
            "loss_giou": assignment.sum_layers(1 - generalized_iou(boxes, target_boxes)) / count,
        }

    def class_losses(self, logits: Tensor, targets: Targets, assignment: Assignment, count: Tensor) -> Tensor:
        """(N,): focal losses, or DETR's weighted mean of the cross-entropy over the queries of all processes."""
        if self.classifier == "sigmoid":
            return focal_class_loss(logits, targets.labels, assignment, count, self.focal_alpha)
        logits = full_precision(logits)
        no_object = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
        labels[assignment.layer, assignment.image, assignment.query] = targets.labels[assignment.target]
        if self.softmax_loss == "focal":
            return softmax_focal_loss(logits, labels, self.focal_alpha).sum((1, 2)) / count
        weights = logits.new_ones(logits.shape[-1])
        weights[no_object:].fill_(self.no_object_weight)  # older torch copies a number to a single entry, and waits
        values = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), weights, reduction="none").view_as(labels)
        processes = Processes()
        counts = whole_batch(targets.counts)
        pairs = sum(min(found, logits.shape[2]) for found in counts)
        others = len(counts) * logits.shape[2] - pairs
        total = numbers_to_device([pairs + self.no_object_weight * others], logits.dtype, logits.device)
        return values.sum((1, 2)) * processes.count / processes.total(total)


def softmax_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """-a (1 - p)^gamma ln p of the label's probability p, with a = alpha, and 1 - alpha for the last class, no object.

    Args:
        logits: (..., classes).
        labels: (...).

    Returns:
        (...).
    """
    log_p = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    balance = torch.where(labels == logits.shape[-1] - 1, 1 - alpha, alpha)
    return -balance * (1 - log_p.exp()) ** gamma * log_p


def relative_xyxy(targets: Targets, like: Tensor) -> Tensor:
    """(sum of counts, 4) x0, y0, x1, y1 relative to the images without padding."""
    return targets.boxes.to(like.dtype) / targets.sides(like.dtype)
