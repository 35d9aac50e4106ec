"""What the heads share that EffSeg is compared with: masks for each class, queries fused into the regions' features,
and targets as in Mask R-CNN (EffSeg, https://arxiv.org/abs/2307.01545, section 4.1, and its release).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.common.transfer import numbers_to_device
from querymask.effseg.regions import QueryFusion, Regions, RegionTargets, SegmentationHead, target_coverage


class ClassMaskHead(SegmentationHead):
    """A head with one mask for each pair of query and class.

    Args:
        width: C of maps and queries.
    """

    per_class = True
    mask_size: int
    """S."""
    loss_names: tuple[str, ...] = ("loss_mask",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_fusion = QueryFusion(width)

    def forward(self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions) -> Tensor:
        """Probabilities (n, S, S). See :class:`SegmentationHead`."""
        return self.logits(pyramid, regions).sigmoid()

    def logits(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """Logits (n, S, S) of the regions' masks, in full precision; n may be 0."""
        if not len(regions):
            return full_precision(pyramid.maps[0].new_zeros(0, self.mask_size, self.mask_size))
        return self.predict(pyramid, regions)

    def losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """The losses of ``loss_names``. See :class:`SegmentationHead`."""
        if not len(regions):
            self.follow(pyramid, regions)
            zero = 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
            return dict.fromkeys(self.loss_names, zero)
        return self.compute_losses(pyramid, image_size, regions, targets)

    def fused_features(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """Features of the regions (n, C, 14, 14) with what the queries say about them."""
        features = self.pool(pyramid, regions)
        return features + self.query_fusion(features, regions.queries)

    def follow(self, pyramid: FeaturePyramid, regions: Regions) -> None:
        """What ``compute_losses`` asks the other processes, in one that has no regions."""

    @abstractmethod
    def pool(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """Features of the regions (n, C, 14, 14)."""

    @abstractmethod
    def predict(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """``logits`` of n > 0 regions."""

    @abstractmethod
    def compute_losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """``losses`` of n > 0 regions."""


def class_channels(logits: Tensor, labels: Tensor) -> Tensor:
    """The channel of each region's class.

    Args:
        logits: (n, K, ...).
        labels: (n,).

    Returns:
        (n, ...) in full precision.
    """
    rows = torch.arange(len(labels), device=labels.device)
    return full_precision(logits[rows, labels])


@torch.no_grad()
def mask_targets(
    image_size: tuple[int, int], regions: Regions, targets: RegionTargets, sizes: Sequence[int]
) -> list[Tensor]:
    """The targets' masks cut out at the regions, whose boxes are clipped to the canvas for this.

    Args:
        image_size: (height, width) of the canvas.
        regions: n, of any images.
        targets: theirs.
        sizes: S of the results.

    Returns:
        (n, S, S) bool for each size: the cells of which the mask covers half.
    """
    limit = numbers_to_device([image_size[1], image_size[0]] * 2, regions.boxes.dtype, regions.boxes.device)
    boxes = regions.boxes.detach().clamp(min=0).minimum(limit)
    return [coverage >= 0.5 for coverage in target_coverage(regions, targets, sizes, boxes)]
