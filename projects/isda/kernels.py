"""ISDA's masks: position-aware kernels of queries, applied to one map of mask features (Ying et al. 2022, section 3.2).

Data flow (B images, Q queries, C width, N decoder layers, n matched or selected queries)::

    P2..P5 -> mask feature head -> mask features (B, C, h, w)
    hidden states (N, B, Q, C) -> kernel head, positions appended -> kernels (N, B, Q, C)
      -> training: soft IoU of all queries' masks as a cost, then a mask loss per layer
      -> inference: masks of the selected queries, scores times maskness
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor

from querymask.common.boxes import inverse_sigmoid
from querymask.common.detector import Detector
from querymask.common.finer_levels import FinerLevels
from querymask.common.layers import MLP
from querymask.common.losses import dice_loss
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.masks import Bands
from querymask.common.matching import pad_targets
from querymask.common.precision import full_precision, without_autocast
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.processes import Processes
from querymask.common.transfer import instances_to_device
from querymask.isda.mask_features import MaskFeatureHead
from querymask.isda.masks import apply_kernels, enlarged_bands, maskness, reduce_masks, resize_probabilities

KERNEL_POSITIONS = ("logit", "point", "none")
MASK_LOSSES = ("dice", "iou")
MASK_STRIDES = (2, 4, 8)
COARSEST_STRIDE = 32
"""Of the levels that mask features are made of."""


@dataclass(frozen=True)
class Kernels:
    """What all masks of a batch are made of.

    Attributes:
        kernels: (N, B, Q, C).
        features: (B, C, h, w).
    """

    kernels: Tensor
    features: Tensor


@MASK_BRANCH_REGISTRY.register()
class KernelBranch(MaskBranch):
    """Masks by dynamic convolution.

    Args:
        width: C.
        strides: of the detector's pyramid.
        shapes: of the backbone's maps.
        kernel_fcs: hidden layers of the kernel head.
        kernel_positions: what the last two entries of a kernel are: the "logit" of its position, the "point", or
            "none": the kernel head makes all entries.
        mask_stride: image size over that of the mask features.
        mask_feature_dim: channels inside the mask feature head.
        mask_positions: coordinate channels in the mask feature head.
        cost: weight of the matching cost, 0 for none.
        weight: of ``loss_mask``.
        mask_loss: "dice" with squared denominators (the release), or "iou": one minus the IoU that the matching uses
            (the text of the paper). Sums run over the whole padded map: padding counts as background.
        maskness_threshold: probabilities above it count for a mask's score; None: scores are those of the classes.
        mask_threshold: foreground of the final masks.
        points: masks are compared with targets, in the matching and in the loss, at so many random cells of the mask
            features, as Mask2Former's are at points (Cheng et al. 2022, section 3.3); 0: at all.
    """

    sections = ("MASK_BRANCH.KERNEL",)

    def __init__(
        self,
        *,
        width: int,
        strides: Sequence[int],
        shapes: Mapping[str, ShapeSpec],
        kernel_fcs: int,
        kernel_positions: str,
        mask_stride: int,
        mask_feature_dim: int,
        mask_positions: bool,
        cost: float = 3.0,
        weight: float = 3.0,
        mask_loss: str = "dice",
        maskness_threshold: float | None = 0.5,
        mask_threshold: float = 0.5,
        points: int = 0,
    ) -> None:
        for key, value, choices in (
            ("POSITIONS", kernel_positions, KERNEL_POSITIONS),
            ("MASK_STRIDE", mask_stride, MASK_STRIDES),
            ("LOSS", mask_loss, MASK_LOSSES),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.MASK_BRANCH.KERNEL.{key} is {value!r}: choose one of {choices}")
        super().__init__()
        self.kernel_positions = kernel_positions
        self.mask_stride = mask_stride
        self.cost = cost
        self.weight = weight
        self.mask_loss = mask_loss
        self.maskness_threshold = maskness_threshold
        self.mask_threshold = mask_threshold
        self.points = points
        self.finer_levels = FinerLevels(shapes, strides, max(mask_stride, 4), width)
        self.strides = [s for s in self.finer_levels.strides if mask_stride <= s <= COARSEST_STRIDE]
        self.size_divisibility = self.strides[-1]
        self.mask_features = MaskFeatureHead(width, self.strides, mask_stride, mask_feature_dim, width, mask_positions)
        self.kernel_embed = MLP(width, width, width if kernel_positions == "none" else width - 2, kernel_fcs + 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "KernelBranch":
        """What ``MODEL.MASK_BRANCH.KERNEL`` describes, for any detector; no cost where its matching asks none."""
        kernel = cfg.MODEL.MASK_BRANCH.KERNEL
        return cls(
            width=detector.width,
            strides=detector.strides,
            shapes=shapes,
            kernel_fcs=kernel.NUM_FCS,
            kernel_positions=kernel.POSITIONS,
            mask_stride=kernel.MASK_STRIDE,
            mask_feature_dim=kernel.MASK_FEATURE_DIM,
            mask_positions=kernel.MASK_POSITIONS,
            cost=0.0 if detector.static_matching else kernel.COST_WEIGHT,
            weight=kernel.WEIGHT,
            mask_loss=kernel.LOSS,
            maskness_threshold=kernel.MASKNESS_THRESHOLD if kernel.MASKNESS else None,
            mask_threshold=kernel.MASK_THRESHOLD,
            points=kernel.POINTS,
        )

    def forward(self, found: Predictions) -> Kernels:
        """Kernels of all queries, and the mask features."""
        pyramid = self.finer_levels(found)
        maps = [x for x, stride in zip(pyramid.maps, pyramid.strides, strict=True) if stride in self.strides]
        return Kernels(self.make_kernels(found.hidden, found.positions()), self.mask_features(maps))

    def make_kernels(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Position-aware kernels.

        Args:
            hidden: (N, B, Q, C).
            positions: (N, B, Q, 2) or (1, B, Q, 2) in [0, 1].

        Returns:
            (N, B, Q, C).
        """
        kernels = full_precision(self.kernel_embed(hidden))
        if self.kernel_positions == "none":
            return kernels
        if self.kernel_positions == "logit":
            positions = inverse_sigmoid(positions)
        return torch.cat((kernels, positions.expand(*kernels.shape[:-1], 2)), dim=-1)

    def encode(self, targets: Targets, found: Predictions) -> Tensor:
        """(sum of counts, h, w): soft targets at the resolution of the mask features."""
        assert found.canvas is not None
        height, width = (side // self.mask_stride for side in found.canvas.size)
        dtype = full_precision(found.logits).dtype
        return torch.cat([reduce_masks(x, self.mask_stride, (height, width), dtype) for x in targets.masks])

    def costs(self, found: Predictions, made: Kernels, truth: Tensor, targets: Targets) -> dict[str, Tensor]:
        """One minus the soft IoU of every query's mask with every target's."""
        if not self.cost:
            return {}
        made, truth = self._at_points(made, truth)
        masks = pad_targets(truth, targets.counts).flatten(2)  # (B, T, h * w)
        features = full_precision(made.features).flatten(2)
        sizes = masks.sum(-1)[:, None]
        products, sums = [], []
        with without_autocast(features.device):
            for kernels in full_precision(made.kernels):  # a layer at a time: its masks are the largest tensor here
                probabilities = (kernels @ features).sigmoid_()
                products.append(intersections(probabilities, masks))
                sums.append(probabilities.sum(-1, keepdim=True))
        return {"mask cost": self.cost * (1 - soft_iou(torch.stack(products), torch.stack(sums), sizes))}

    def losses(
        self,
        found: Predictions,
        made: Kernels,
        truth: Tensor,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """``loss_mask`` of every layer."""
        made, truth = self._at_points(made, truth)
        probabilities = self.matched_masks(made, assignment)
        wanted = truth[assignment.target]
        if self.mask_loss == "dice":
            values = dice_loss(probabilities, wanted, eps=2e-3)
        else:
            sums = ((probabilities * wanted).sum((1, 2)), probabilities.sum((1, 2)), wanted.sum((1, 2)))
            values = 1 - soft_iou(*sums)
        values = assignment.sum_layers(values) / (normalizers.pairs + 1e-5 / Processes().count)
        return loss_terms("loss_mask", values, self.weight, assignment.num_layers)

    def _at_points(self, made: Kernels, truth: Tensor) -> tuple[Kernels, Tensor]:
        """Mask features (B, C, 1, P) and targets (n, 1, P) at the same random cells; whole ones without points."""
        cells = truth.shape[1] * truth.shape[2]
        if not 0 < self.points < cells:
            return made, truth
        chosen = torch.randint(cells, (self.points,), device=truth.device)
        return replace(made, features=made.features.flatten(2)[:, :, None, chosen]), truth.flatten(1)[:, None, chosen]

    def matched_masks(self, made: Kernels, assignment: Assignment) -> Tensor:
        """Probabilities (N * n, h, w) of the matched pairs' masks alone, in the assignment's order."""
        kernels = assignment.select(made.kernels).unflatten(0, (assignment.num_layers, assignment.pairs_per_layer()))
        pairs = assignment.pairs_of_images(len(made.features))
        of_images = zip(kernels.split(pairs, 1), made.features, strict=True)
        logits = torch.cat([apply_kernels(own, features) for own, features in of_images], dim=1)
        return full_precision(logits.flatten(0, 1)).sigmoid()

    def add_masks(
        self, found: Predictions, made: Kernels, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """Masks, and scores times maskness, which is 0 for an empty mask."""
        detections = instances_to_device(detections, made.features.device)
        kernels = made.kernels[-1 if layer is None else layer, image, detections.pred_queries]
        probabilities = full_precision(apply_kernels(kernels, made.features[image])).sigmoid()
        if self.maskness_threshold is not None:
            detections.scores = detections.scores * maskness(probabilities, self.maskness_threshold)
        detections.pred_masks = resize_probabilities(
            probabilities,
            self.mask_stride,
            tuple(found.image_sizes[image]),
            detections.image_size,
            self.mask_threshold,
        )
        return detections

    def bands(self, found: Predictions, made: Kernels, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """See :class:`MaskBranch`."""
        logits = apply_kernels(made.kernels[-1, image, queries], made.features[image])
        return enlarged_bands(full_precision(logits).sigmoid(), self.mask_stride)


def intersections(masks: Tensor, others: Tensor) -> Tensor:
    """Sums of the products of every two soft masks of an image, (B, Q, T) of (B, Q, pixels) and (B, T, pixels).

    In parts of the pixels: one sum of all of them for a few numbers would keep few multiprocessors of a GPU busy.
    """
    parts = math.gcd(masks.shape[-1], 64)
    products = [
        torch.bmm(a.unflatten(-1, (parts, -1)).transpose(0, 1), b.unflatten(-1, (parts, -1)).permute(1, 2, 0))
        for a, b in zip(masks, others)
    ]
    return torch.stack(products).sum(1)


def soft_iou(intersection: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """IoU of soft masks: ``intersection`` is the sum of their product, ``a`` and ``b`` are their sums."""
    return intersection / (a + b - intersection + 1e-6)
