"""The mask head of Mask R-CNN in place of ISTR's codes (Hu et al. 2021, Table 1a, "mask").

Data flow (n matched or selected queries, K classes, S bins a side of a crop)::

    boxes of a layer, clipped to the image -> crops (n, C, S, S) -> the layer's head -> logits (n, K, 2 S, 2 S)
      -> training: binary cross-entropy of the target's class with its mask inside of the same box
      -> inference: probabilities of the detected class, pasted into the same box
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from querymask.common.detector import Detector
from querymask.common.layers import MaskLayers
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.masks import Bands, paste_masks, pasted_bands
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.transfer import instances_to_device
from querymask.istr.crops import clipped_boxes, crop_at_predictions


@MASK_BRANCH_REGISTRY.register()
class PixelBranch(MaskBranch):
    """Masks of pixels, one for each class, from the detector's pyramid.

    Args:
        width: C of the pyramid.
        num_classes: K.
        num_layers: of the detector, each with a head of its own.
        num_trained_layers: those of them, from the last one on, that have losses.
        pool_size: S.
        weight: of ``loss_mask``.
    """

    sections = ("MASK_BRANCH.PIXEL",)
    needs_boxes = True

    def __init__(
        self,
        *,
        width: int,
        num_classes: int,
        num_layers: int,
        num_trained_layers: int,
        pool_size: int = 14,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.weight = weight
        self.heads = nn.ModuleList(MaskLayers(width, num_classes) for _ in range(num_layers))
        self.heads[: num_layers - num_trained_layers].requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "PixelBranch":
        """What ``MODEL.MASK_BRANCH.PIXEL`` describes, for any detector with boxes."""
        pixel = cfg.MODEL.MASK_BRANCH.PIXEL
        return cls(
            width=detector.width,
            num_classes=detector.num_classes,
            num_layers=detector.num_layers,
            num_trained_layers=detector.num_trained_layers,
            pool_size=pixel.POOL_SIZE,
            weight=pixel.WEIGHT,
        )

    def logits(self, found: Predictions, image: Tensor, query: Tensor, layer: int, labels: Tensor) -> Tensor:
        """Masks (n, 2 S, 2 S) of chosen queries (n,) of a layer for the classes ``labels`` (n,)."""
        assert found.pyramid is not None
        crops = found.pyramid.pool(clipped_boxes(found, image, query, layer), image, self.pool_size)
        logits = self.heads[layer - found.num_layers if layer >= 0 else layer](crops)
        return full_precision(logits[torch.arange(len(labels), device=labels.device), labels])

    def encode(self, targets: Targets, found: Predictions) -> None:
        """Nothing: what a mask is compared with depends on the matched box."""

    def losses(
        self,
        found: Predictions,
        made: None,
        truth: None,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """``loss_mask`` of every layer: binary cross-entropy, its mean over the cells of all matched pairs."""
        number = assignment.pairs_per_layer()
        logits = []
        for layer in range(assignment.num_layers):
            here = slice(layer * number, (layer + 1) * number)
            labels = targets.labels[assignment.target[here]]
            logits.append(self.logits(found, assignment.image[here], assignment.query[here], layer, labels))
        predicted = torch.cat(logits)
        wanted = crop_at_predictions(found, targets, assignment, 2 * self.pool_size).to(predicted.dtype)
        values = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean((1, 2))
        values = assignment.sum_layers(values) / normalizers.pairs
        return loss_terms("loss_mask", values, self.weight, assignment.num_layers)

    def add_masks(
        self, found: Predictions, made: None, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """See :class:`MaskBranch`."""
        detections = instances_to_device(detections, found.hidden.device)
        queries = detections.pred_queries
        images, layer = torch.full_like(queries, image), -1 if layer is None else layer
        maps = self.logits(found, images, queries, layer, detections.pred_classes).sigmoid()
        boxes = clip_boxes_to_image(detections.pred_boxes.tensor, detections.image_size)
        detections.pred_masks = paste_masks(maps, boxes, *detections.image_size, threshold=0.5)
        return detections

    def bands(self, found: Predictions, made: None, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """See :class:`MaskBranch`."""
        images = torch.full_like(queries, image)
        maps = self.logits(found, images, queries, -1, labels).sigmoid()
        return pasted_bands(maps, clipped_boxes(found, images, queries, -1), found.canvas.size[1])
