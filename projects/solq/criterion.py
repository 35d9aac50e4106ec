"""Matching costs and losses of Deformable DETR, which are those of SOLQ's classes and boxes (section 4.1)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from querymask.common.boxes import generalized_iou, to_centres, to_corners
from querymask.common.matching import focal_class_cost, pad_targets
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, Normalizers, Targets
from querymask.common.set_criterion import SetCriterion, focal_class_loss
from querymask.common.transfer import numbers_to_device
from querymask.solq.predictions import DETRPredictions


class DETRCriterion(SetCriterion):
    """Hungarian matching on class, L1 and GIoU; focal, L1 and GIoU losses in every layer.

    Args:
        costs: weights of the matching costs ``class``, ``bbox``, ``giou``.
        weights: weights of ``loss_ce``, ``loss_bbox``, ``loss_giou``.
        focal_alpha: alpha of the focal loss and of the class cost.
    """

    def __init__(self, costs: Mapping[str, float], weights: Mapping[str, float], focal_alpha: float = 0.25) -> None:
        super().__init__(weights)
        self.costs = dict(costs)
        self.focal_alpha = focal_alpha

    def cost_terms(self, found: DETRPredictions, targets: Targets) -> dict[str, Tensor]:
        """Class, L1 and GIoU costs (N, B, Q, T)."""
        labels = pad_targets(targets.labels, targets.counts)
        boxes = full_precision(found.boxes)[:, :, :, None]  # (N, B, Q, 1, 4)
        target_boxes = pad_targets(relative_cxcywh(targets, boxes), targets.counts)[None, :, None]  # (1, B, 1, T, 4)
        giou = generalized_iou(to_corners(boxes), to_corners(target_boxes))
        return {
            "class cost": self.costs["class"] * focal_class_cost(found.logits, labels, self.focal_alpha),
            "L1 box cost": self.costs["bbox"] * (boxes - target_boxes).abs().sum(-1),
            "GIoU box cost": -self.costs["giou"] * giou,
        }

    def layer_losses(
        self, found: DETRPredictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """``loss_ce``, ``loss_bbox`` and ``loss_giou`` of every layer."""
        count = normalizers.targets
        boxes = assignment.select(full_precision(found.boxes))
        target_boxes = relative_cxcywh(targets, boxes)[assignment.target]
        giou = generalized_iou(to_corners(boxes), to_corners(target_boxes))
        return {
            "loss_ce": focal_class_loss(found.logits, targets.labels, assignment, count, self.focal_alpha),
            "loss_bbox": assignment.sum_layers((boxes - target_boxes).abs().sum(-1)) / count,
            "loss_giou": assignment.sum_layers(1 - giou) / count,
        }


def relative_cxcywh(targets: Targets, like: Tensor) -> Tensor:
    """(sum of counts, 4) cx, cy, w, h relative to the images without padding."""
    return to_centres(targets.boxes.to(like.dtype)) / targets.sides(like.dtype)


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor, assignment: Assignment) -> Tensor:
    """Percentage of the last layer's matched queries whose best class is wrong; 100 without targets. For logging."""
    n = assignment.pairs_per_layer()
    if not n:
        return logits.new_full((), 100.0)
    predicted = assignment.select(logits)[-n:].argmax(-1)
    return 100 - 100 * (predicted == labels[assignment.target[-n:]]).to(logits.dtype).mean()


@torch.no_grad()
def cardinality_error(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean difference of the number of targets and the number of queries whose best class is not the last one.

    A left-over of DETR that the release logs; with sigmoid classifiers it says little.

    Args:
        logits: (N, B, Q, K).

    Returns:
        (N,)
    """
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (predicted - numbers_to_device(counts, torch.int64, logits.device)).abs().to(logits.dtype).mean(-1)
