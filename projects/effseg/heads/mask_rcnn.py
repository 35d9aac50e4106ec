"""Mask R-CNN++: the mask head of Mask R-CNN (He et al., https://arxiv.org/abs/1703.06870) on FQDet's queries."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from querymask.common.layers import MaskLayers
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.heads.class_masks import ClassMaskHead, class_channels, mask_targets
from querymask.effseg.regions import ROI_SIZE, Regions, RegionTargets, pool_regions


class MaskRCNNHead(ClassMaskHead):
    """Masks of 28 x 28 cells.

    Args:
        width: C of maps and queries.
        num_classes: K.
    """

    mask_size = 2 * ROI_SIZE

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width)
        self.layers = MaskLayers(width, num_classes)

    def pool(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """See :class:`ClassMaskHead`."""
        return pool_regions(pyramid, regions)

    def predict(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """See :class:`ClassMaskHead`."""
        return class_channels(self.layers.run(self.fused_features(pyramid, regions)), regions.labels)

    def compute_losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """``loss_mask``: binary cross-entropy, the mean over the cells summed over the regions."""
        return {"loss_mask": mask_loss(self.predict(pyramid, regions), image_size, regions, targets)}


def mask_loss(logits: Tensor, image_size: tuple[int, int], regions: Regions, targets: RegionTargets) -> Tensor:
    """Binary cross-entropy of masks (n, S, S), the mean over the cells summed over the regions."""
    (wanted,) = mask_targets(image_size, regions, targets, [logits.shape[1]])
    return len(logits) * F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))
