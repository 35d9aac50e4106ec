"""ISDA's matching costs and losses."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from querymask.common.losses import dice_loss
from querymask.common.matching import Assignment, Targets, focal_class_cost, pad_targets
from querymask.common.precision import full_precision, without_autocast
from querymask.common.processes import Processes
from querymask.common.set_criterion import Normalizers, SetCriterion, by_layer, focal_class_loss
from querymask.isda.masks import mask_logits

MASK_LOSSES = ("dice", "iou")


@dataclass
class ISDAOutput:
    """Predictions of all decoder layers.

    Attributes:
        logits: (N, B, Q, K).
        kernels: (N, B, Q, C) position-aware kernels.
        mask_features: (B, C, h, w).
        references: (B, Q, 2) reference points x, y in [0, 1] of the unpadded image, the same for all layers.
    """

    logits: torch.Tensor
    kernels: torch.Tensor
    mask_features: torch.Tensor
    references: torch.Tensor


def soft_iou(intersection: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU of soft masks: ``intersection`` is the sum of their product, ``a`` and ``b`` are their sums."""
    return intersection / (a + b - intersection + 1e-6)


class ISDACriterion(SetCriterion):
    """Hungarian matching on class and soft mask IoU; focal loss and a mask loss in every layer.

    ``Targets.fields`` holds ``masks`` (n, h, w), soft targets at the resolution of the mask features. Sums run over the
    whole padded map: padding counts as background.

    Args:
        costs: weights of the matching costs ``class`` and ``mask``.
        weights: weights of ``loss_cls`` and ``loss_mask``.
        focal_alpha: alpha of the focal loss and of the class cost.
        mask_loss: "dice" with squared denominators (the release), or "iou": one minus the IoU that the matching uses
            (the text of the paper).
    """

    def __init__(
        self,
        costs: Mapping[str, float],
        weights: Mapping[str, float],
        focal_alpha: float = 0.25,
        mask_loss: str = "dice",
    ) -> None:
        if mask_loss not in MASK_LOSSES:
            raise ValueError(f"MODEL.ISDA.MASK_LOSS is {mask_loss!r}: choose one of {MASK_LOSSES}")
        super().__init__(weights)
        self.costs = dict(costs)
        self.focal_alpha = focal_alpha
        self.mask_loss = mask_loss

    def cost_terms(self, outputs: ISDAOutput, targets: Targets) -> dict[str, torch.Tensor]:
        """Class and mask costs (N, B, Q, T)."""
        labels = pad_targets(targets.labels, targets.counts)
        class_cost = focal_class_cost(outputs.logits, labels, self.focal_alpha, eps=1e-12)
        masks = pad_targets(targets.fields["masks"], targets.counts).flatten(2)  # (B, T, h * w)
        features = full_precision(outputs.mask_features).flatten(2)
        sizes = masks.sum(-1)[:, None]
        ious = []
        with without_autocast(features.device):
            for kernels in full_precision(outputs.kernels):  # a layer at a time: its masks are the largest tensor here
                probabilities = (kernels @ features).sigmoid_()
                intersection = probabilities @ masks.transpose(1, 2)
                ious.append(soft_iou(intersection, probabilities.sum(-1, keepdim=True), sizes))
        return {
            "class cost": self.costs["class"] * class_cost,
            "mask cost": self.costs["mask"] * (1 - torch.stack(ious)),
        }

    def layer_losses(
        self, outputs: ISDAOutput, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, dict[int, torch.Tensor]]:
        """``loss_cls`` and ``loss_mask`` of every layer."""
        count = normalizers.pairs
        class_loss = focal_class_loss(outputs.logits, targets.labels, assignment, count, self.focal_alpha)
        probabilities = self.matched_masks(outputs, targets, assignment)
        truth = targets.fields["masks"][assignment.target]
        if self.mask_loss == "dice":
            mask_loss = dice_loss(probabilities, truth, eps=2e-3)
        else:
            sums = ((probabilities * truth).sum((1, 2)), probabilities.sum((1, 2)), truth.sum((1, 2)))
            mask_loss = 1 - soft_iou(*sums)
        return {
            "loss_cls": by_layer(class_loss),
            "loss_mask": by_layer(assignment.sum_layers(mask_loss) / (count + 1e-5 / Processes().count)),
        }

    def matched_masks(self, outputs: ISDAOutput, targets: Targets, assignment: Assignment) -> torch.Tensor:
        """Probabilities (N * n, h, w) of the matched pairs' masks alone, in the assignment's order."""
        num_queries = outputs.logits.shape[2]
        pairs = [min(count, num_queries) for count in targets.counts]  # of an image, in every layer
        kernels = assignment.select(outputs.kernels).unflatten(0, (assignment.num_layers, -1))
        logits = [mask_logits(k, features) for k, features in zip(kernels.split(pairs, 1), outputs.mask_features)]
        return full_precision(torch.cat(logits, dim=1).flatten(0, 1)).sigmoid()
