"""RefineMask++: the mask head of RefineMask (Zhang et al., https://arxiv.org/abs/2104.08569) on FQDet's queries.

Data flow (n regions, C width of a stage)::

    P2 -> semantic convolutions on the whole map
    RoIAlign (n, C, 14, 14) + what the query says -> instance convolutions -> features of stage 0
    stages 0, 1, 2 of 14, 28, 56 cells a side, each half as wide as the one before:
      features -> logits of the region's class
      features, semantic features at the cells' centres and probabilities -> fused features, twice the size
    -> logits of stage 3, 56 cells a side, doubled: 112
    mask: from stage 1 on, logits of a stage where the mask of the stage before has its boundary, elsewhere that mask
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from querymask.common.deformable_attention import cell_centres
from querymask.common.layers import Recomputable
from querymask.common.precision import full_precision, without_autocast
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.heads.class_masks import ClassMaskHead, class_channels, mask_targets
from querymask.effseg.heads.points import sample_finest
from querymask.effseg.regions import ROI_SIZE, STRIDES, Regions, RegionTargets, pool_regions

DILATIONS = (1, 3, 5)
FIRST_MERGED = 1  # the stage whose mask is the first to be refined
MERGED_WIDTH, TRAINED_WIDTH = 1, 2  # of the boundaries where masks are replaced, and where they are trained
RESPONSE = 0.1  # share of the neighbours on the other side that makes a cell boundary


class BranchFusion(nn.Module):
    """Convolutions of several dilations and the mean over the region, summed and mixed."""

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in dilations)
        self.merge = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, S, S) -> the same."""
        total = x.mean((2, 3), keepdim=True)
        for branch in self.branches:
            total = total + branch(x).relu()
        return self.merge(total)


class FusionStage(Recomputable):
    """Fuses features of regions with semantic features and the mask so far; half as wide afterwards.

    Args:
        width: C of the regions' features.
        semantic_width: of the semantic features.
        dilations: of the fusion.
    """

    def __init__(self, width: int, semantic_width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.semantic = nn.Conv2d(semantic_width, width, 1)
        self.reduce = nn.Conv2d(2 * width + 1, width, 1)
        self.fusion = BranchFusion(width, dilations)
        self.narrow = nn.Conv2d(width, width // 2 - 1, 1)

    def forward(self, features: Tensor, logits: Tensor, semantic: Tensor, regions: Regions) -> Tensor:
        """Fuse.

        Args:
            features: (n, C, S, S).
            logits: (n, S, S) of the regions' masks.
            semantic: (B, C', H, W) features of P2's cells.
            regions: n of them.

        Returns:
            (n, C / 2, S, S).
        """
        size = features.shape[2]
        shares = cell_centres((size, size), logits.dtype, logits.device) / size
        own = FeaturePyramid([self.semantic(semantic).relu()], STRIDES[:1])
        sampled = sample_finest(own, regions, shares).unflatten(2, (size, size))
        mask = logits.sigmoid()[:, None]
        fused = self.reduce(torch.cat([features, sampled, mask], dim=1)).relu()
        fused = self.fusion(fused).relu()
        return torch.cat([self.narrow(fused).relu(), mask], dim=1)


class RefineMaskHead(ClassMaskHead):
    """Masks of 112 x 112 cells for three stages.

    Args:
        width: C of maps and queries, and of stage 0: a multiple of 2 ** num_stages, at least 2 of it.
        num_classes: K; the last stage has one mask for all.
        num_stages: whose features are fused.
        num_instance_convs, num_semantic_convs: 3x3 convolutions before.
        dilations: of the fusion.
        loss_weights: of the stages, the last included.

    Raises:
        ValueError: no stage, a width that cannot be halved so often, or not a weight for every stage.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_stages: int = 3,
        num_instance_convs: int = 2,
        num_semantic_convs: int = 4,
        dilations: Sequence[int] = DILATIONS,
        loss_weights: Sequence[float] = (0.5, 0.75, 0.75, 1.0),
    ) -> None:
        super().__init__(width)
        if num_stages < 1:
            raise ValueError(f"num_stages must be positive, not {num_stages}")
        if width % 2**num_stages or width < 2 * 2**num_stages:
            raise ValueError(
                f"width must be a multiple of 2 ** num_stages = {2**num_stages}, and at least twice it, not {width}"
            )
        if len(loss_weights) != num_stages + 1:
            raise ValueError(f"loss_weights must have {num_stages + 1} entries, got {list(loss_weights)}")
        self.loss_weights = tuple(loss_weights)
        self.mask_size = ROI_SIZE * 2**num_stages
        self.instance_convs, self.semantic_convs = (
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count))
            for count in (num_instance_convs, num_semantic_convs)
        )
        widths = [width // 2**number for number in range(num_stages + 1)]
        self.stages = nn.ModuleList(FusionStage(w, width, dilations) for w in widths[:-1])
        self.classifiers = nn.ModuleList(nn.Conv2d(w, num_classes, 1) for w in widths[:-1])
        self.classifiers.append(nn.Conv2d(widths[-1], 1, 1))
        for part in (self.instance_convs, self.semantic_convs, self.stages, self.classifiers):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    c2_msra_fill(layer)

    def pool(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """See :class:`ClassMaskHead`."""
        return pool_regions(pyramid, regions)

    def predict(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """See :class:`ClassMaskHead`."""
        stages = self.predict_stages(pyramid, regions)
        mask = stages[FIRST_MERGED]
        for finer in stages[FIRST_MERGED + 1 :]:
            mask = merge_masks(mask, finer)
        return mask

    def forward(self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions) -> Tensor:
        """Probabilities (n, S, S). See :class:`SegmentationHead`."""
        if pyramid.num_images > 1 and len(regions):  # semantic features of other images would be made for nothing
            pyramid = pyramid.of_image(int(regions.images[0]))
            regions = replace(regions, images=torch.zeros_like(regions.images))
        return super().forward(pyramid, image_size, regions)

    def predict_stages(self, pyramid: FeaturePyramid, regions: Regions) -> list[Tensor]:
        """Logits (n, S, S) of every stage before they are merged: S is 14, 28, 56, 112 for three stages."""
        semantic = pyramid.maps[0]
        for conv in self.semantic_convs:
            semantic = conv(semantic).relu()
        features = self.fused_features(pyramid, regions)
        for conv in self.instance_convs:
            features = conv(features).relu()
        masks = []
        for number, (stage, classifier) in enumerate(zip(self.stages, self.classifiers), 1):
            masks.append(class_channels(classifier(features), regions.labels))
            features = stage.run(features, masks[-1], semantic, regions)
            if number < len(self.stages):
                features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        with without_autocast(features.device):  # logits are thousands at first: its initial weights are above one
            mask = self.classifiers[-1](full_precision(features))[:, 0]
        masks.append(resize(mask, 2 * mask.shape[1]))
        return masks

    def compute_losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """``loss_mask``: binary cross-entropy of the stages, the later ones near boundaries only."""
        stages = self.predict_stages(pyramid, regions)
        wanted = mask_targets(image_size, regions, targets, [stage.shape[1] for stage in stages])
        sums, counts = [], []
        for number, (logits, target) in enumerate(zip(stages, wanted)):
            loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
            if number <= FIRST_MERGED:
                sums.append(loss.sum())
                counts.append(torch.full((), loss.numel(), dtype=torch.int64, device=loss.device))
                merged = logits.detach()
                continue
            region = boundary(merged >= 0, TRAINED_WIDTH) | boundary(wanted[number - 1], TRAINED_WIDTH)
            region = resize_binary(region, logits.shape[1])
            sums.append((loss * region).sum())
            counts.append(region.sum())
            merged = merge_masks(merged, logits.detach())
        weighted = torch.stack([weight * total for weight, total in zip(self.loss_weights, sums, strict=True)])
        factors = self._normalizers(len(regions), torch.stack(counts))
        return {"loss_mask": (weighted * factors.to(weighted.dtype)).sum()}

    def follow(self, pyramid: FeaturePyramid, regions: Regions) -> None:
        """See :class:`ClassMaskHead`."""
        self._normalizers(0, torch.zeros(len(self.loss_weights), dtype=torch.int64, device=pyramid.maps[0].device))

    def _normalizers(self, regions: int, cells: Tensor) -> Tensor:
        """Regions over the cells (stages,) that have a loss, of all processes."""
        counts = self.processes.total(torch.cat([cells.new_full((1,), regions), cells]))
        return counts[0] / counts[1:].clamp(min=1)


def merge_masks(coarse: Tensor, fine: Tensor) -> Tensor:
    """The fine mask at the boundary of the coarse one, which is kept elsewhere.

    Args:
        coarse: logits (n, S, S).
        fine: logits (n, 2 S, 2 S).

    Returns:
        Logits (n, 2 S, 2 S).
    """
    size = fine.shape[1]
    at_boundary = resize_binary(boundary(coarse >= 0, MERGED_WIDTH), size)
    return torch.where(at_boundary, fine, resize(coarse, size))


def boundary(masks: Tensor, width: int) -> Tensor:
    """Cells with enough neighbours on the other side of the mask; beyond the square is background.

    The square of a cell's neighbours has a side of 2 width + 1, and more than a tenth of it must differ from the cell.
    RefineMask writes this as the responses of a Laplacian to the mask and to its complement.

    Args:
        masks: (n, S, S) bool.
        width: in cells.

    Returns:
        (n, S, S) bool.
    """
    inside = F.avg_pool2d(masks[:, None].float(), 2 * width + 1, stride=1, padding=width)[:, 0]
    return torch.where(masks, 1 - inside, inside) > RESPONSE


def resize(masks: Tensor, size: int) -> Tensor:
    """(n, S, S) -> (n, size, size), the corners' centres staying in place."""
    return F.interpolate(masks[:, None], size=(size, size), mode="bilinear", align_corners=True)[:, 0]


def resize_binary(masks: Tensor, size: int) -> Tensor:
    """As :func:`resize`, for bool."""
    return resize(masks.float(), size) >= 0.5
