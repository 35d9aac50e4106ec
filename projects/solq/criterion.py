"""SOLQ's matching costs and losses (sections 3.4 and 4.1 of the paper)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from querymask.common.boxes import cxcywh_to_xyxy, generalized_iou
from querymask.common.losses import dice_loss
from querymask.common.mask_coding import MaskCoding
from querymask.common.matching import Assignment, Targets, focal_class_cost, pad_targets
from querymask.common.precision import full_precision
from querymask.common.set_criterion import Normalizers, SetCriterion, by_layer, focal_class_loss
from querymask.solq.sqr import SeparateMasks, separate_mask_losses

VECTOR_LOSSES = ("l1", "l2_dice")
VECTOR_LOSS_REDUCTIONS = ("mean", "local_mean", "sum")
_DICE_EPS = 1e-5


@dataclass
class SOLQOutput:
    """Predictions of all decoder layers.

    Attributes:
        logits: (N, B, Q, K).
        boxes: (N, B, Q, 4) cx, cy, w, h relative to the unpadded image.
        hidden: (N, B, Q, C) what the vector head reads.
        vector_head: hidden states (..., C) -> mask vectors (..., K), None without mask branch. It runs on matched or
            selected queries only.
        coding: of the vectors, None without mask branch; needed where targets have no ``vectors`` or the loss decodes.
        masks: of the last layer in the SQR baseline, which has no vectors.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    hidden: torch.Tensor
    vector_head: nn.Module | None = None
    coding: MaskCoding | None = None
    masks: SeparateMasks | None = None


class SOLQCriterion(SetCriterion):
    """Hungarian matching on class, L1 and GIoU; focal, L1, GIoU and mask-vector losses in every layer.

    ``Targets.fields`` holds ``boxes`` (cx, cy, w, h, normalised) and, with a mask branch, some of ``vectors`` (n, K),
    missing where the coding is random; ``crops`` (n, S, S) bool, which those and the loss "l2_dice" need; ``masks``
    (n, H, W) bool for the SQR baseline.

    Args:
        costs: weights of the matching costs ``class``, ``bbox``, ``giou``.
        weights: weights of ``loss_ce``, ``loss_bbox``, ``loss_giou``; for the SQR baseline also of ``loss_mask``,
            ``loss_dice``.
        focal_alpha: alpha of the focal losses.
        vector_weight: coefficient inside ``loss_vector``.
        vector_start_layer: first layer with a vector loss; the last layer always has one.
        vector_loss: "l1" distance of vectors, or "l2_dice": squared distance by entry plus the dice loss of the
            decoded mask, both summed over the pairs and divided by the number of targets.
        vector_reduction: of "l1": "mean" over matched pairs and entries, "local_mean" the same within each process, as
            the release has it, "sum": sum over entries divided by the number of targets.
    """

    def __init__(
        self,
        costs: Mapping[str, float],
        weights: Mapping[str, float],
        focal_alpha: float = 0.25,
        vector_weight: float = 3.0,
        vector_start_layer: int = 0,
        vector_loss: str = "l1",
        vector_reduction: str = "mean",
    ) -> None:
        if vector_loss not in VECTOR_LOSSES:
            raise ValueError(f"MODEL.SOLQ.VECTOR_LOSS is {vector_loss!r}: choose one of {VECTOR_LOSSES}")
        if vector_reduction not in VECTOR_LOSS_REDUCTIONS:
            raise ValueError(
                f"MODEL.SOLQ.VECTOR_LOSS_REDUCTION is {vector_reduction!r}: choose one of {VECTOR_LOSS_REDUCTIONS}"
            )
        if vector_loss == "l2_dice" and vector_reduction != "mean":
            raise ValueError(
                f"MODEL.SOLQ.VECTOR_LOSS_REDUCTION is {vector_reduction!r}, but VECTOR_LOSS 'l2_dice' has one form "
                "only: set it 'mean'"
            )
        super().__init__({**weights, "loss_vector": 1.0})
        self.costs = dict(costs)
        self.focal_alpha = focal_alpha
        self.vector_weight = vector_weight
        self.vector_start_layer = vector_start_layer
        self.vector_loss = vector_loss
        self.vector_reduction = vector_reduction

    def cost_terms(self, outputs: SOLQOutput, targets: Targets) -> dict[str, torch.Tensor]:
        """Class, L1 and GIoU costs (N, B, Q, T); masks do not take part."""
        labels = pad_targets(targets.labels, targets.counts)
        target_boxes = pad_targets(targets.fields["boxes"], targets.counts)[None, :, None]  # (1, B, 1, T, 4)
        boxes = full_precision(outputs.boxes)[:, :, :, None]  # (N, B, Q, 1, 4)
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        return {
            "class cost": self.costs["class"] * focal_class_cost(outputs.logits, labels, self.focal_alpha),
            "L1 box cost": self.costs["bbox"] * (boxes - target_boxes).abs().sum(-1),
            "GIoU box cost": -self.costs["giou"] * giou,
        }

    def layer_losses(
        self, outputs: SOLQOutput, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, dict[int, torch.Tensor]]:
        """``loss_ce``, ``loss_bbox``, ``loss_giou`` and those of the mask branch, of every layer that has them."""
        count = normalizers.targets
        boxes = assignment.select(full_precision(outputs.boxes))
        target_boxes = targets.fields["boxes"][assignment.target]
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        losses = {
            "loss_ce": by_layer(focal_class_loss(outputs.logits, targets.labels, assignment, count, self.focal_alpha)),
            "loss_bbox": by_layer(assignment.sum_layers((boxes - target_boxes).abs().sum(-1)) / count),
            "loss_giou": by_layer(assignment.sum_layers(1 - giou) / count),
        }
        if outputs.vector_head is not None:
            losses["loss_vector"] = self.vector_losses(outputs, targets, assignment, normalizers)
        if outputs.masks is not None:
            found = separate_mask_losses(outputs.masks, targets.fields["masks"], assignment, count, self.focal_alpha)
            losses.update({name: {assignment.num_layers - 1: value} for name, value in found.items()})
        return losses

    def vector_losses(
        self, outputs: SOLQOutput, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[int, torch.Tensor]:
        """Distance of predicted and true mask vectors, by layer."""
        first = min(self.vector_start_layer, assignment.num_layers - 1)
        number = assignment.num_layers - first
        start = first * assignment.pairs_per_layer()
        target = assignment.target[start:]
        predicted = full_precision(outputs.vector_head(assignment.select(outputs.hidden)[start:]))
        truth = self.target_vectors(outputs, targets, target).to(predicted.dtype)
        length = truth.shape[-1]
        if self.vector_loss == "l2_dice":
            assert outputs.coding is not None
            crops = targets.fields["crops"][target].to(predicted.dtype)
            dice = dice_loss(outputs.coding.decode(predicted), crops, eps=_DICE_EPS)
            values = (predicted - truth).square().sum(-1) / length + dice
            values = values.view(number, -1).sum(1) / normalizers.targets
        else:
            sums = (predicted - truth).abs().sum(-1).view(number, -1).sum(1)
            if self.vector_reduction == "sum":
                values = sums / normalizers.targets
            elif self.vector_reduction == "mean":
                values = sums / (normalizers.pairs * length)
            else:
                values = sums / (max(assignment.pairs_per_layer(), 1) * length)
        return {first + i: self.vector_weight * value for i, value in enumerate(values.unbind())}

    @torch.no_grad()
    def target_vectors(self, outputs: SOLQOutput, targets: Targets, target: torch.Tensor) -> torch.Tensor:
        """Vectors of the targets (n,): (n, K). A random coding draws anew for every layer, as the release does."""
        if "vectors" in targets.fields:
            return targets.fields["vectors"][target]
        assert outputs.coding is not None
        return outputs.coding.encode(targets.fields["crops"][target])
