"""PointRend++: the mask head of PointRend (Kirillov et al., https://arxiv.org/abs/1912.08193) on FQDet's queries.

A coarse mask as in Mask R-CNN is doubled in size several times; each time a small network looks at the points that are
least certain, with the finest map's features there.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from querymask.common.deformable_attention import cell_centres
from querymask.common.layers import MaskLayers
from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.common.transfer import numbers_to_device
from querymask.effseg.heads.class_masks import ClassMaskHead, class_channels
from querymask.effseg.heads.mask_rcnn import mask_loss
from querymask.effseg.heads.points import points_in_boxes, sample_finest, sample_squares
from querymask.effseg.regions import ROI_SIZE, Regions, RegionTargets

NUM_LAYERS = 3


class PointLayers(nn.Module):
    """Logits of points; every layer sees the coarse ones.

    Args:
        width: C.
        num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width + num_classes, width, 1) for _ in range(NUM_LAYERS))
        self.classifier = nn.Conv1d(width + num_classes, num_classes, 1)
        for layer in self.layers:
            c2_msra_fill(layer)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Features (n, C, P), coarse logits (n, K, P) -> logits (n, K, P)."""
        for layer in self.layers:
            fine = layer(torch.cat([fine, coarse], dim=1)).relu()
        return self.classifier(torch.cat([fine, coarse], dim=1))


class PointRendHead(ClassMaskHead):
    """Masks of 28 x 28 cells, doubled for every subdivision: 224 x 224 for three, as in EffSeg's release.

    Args:
        width: C of maps and queries.
        num_classes: K.
        num_points: of each region in training.
        oversampling: so many times as many points are drawn, of which the least certain are taken.
        importance: share of the points that are taken so; the others are uniform.
        subdivisions: how often a mask's size is doubled.
        subdivision_points: cells of each region that are looked at after each doubling.

    Raises:
        ValueError: a number is out of range.
    """

    loss_names = ("loss_mask", "loss_point")

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_points: int = 196,
        oversampling: float = 3,
        importance: float = 0.75,
        subdivisions: int = 3,
        subdivision_points: int = 784,
    ) -> None:
        super().__init__(width)
        if num_points < 1 or subdivision_points < 1 or subdivisions < 0:
            raise ValueError(
                f"num_points ({num_points}) and subdivision_points ({subdivision_points}) must be positive, "
                f"subdivisions ({subdivisions}) must not be negative"
            )
        if oversampling < 1 or not 0 <= importance <= 1:
            raise ValueError(
                f"oversampling must be 1 or more, got {oversampling}; importance must be from 0 to 1, got {importance}"
            )
        self.num_points = num_points
        self.num_candidates = int(num_points * oversampling)
        self.num_uncertain = int(num_points * importance)
        self.subdivisions = subdivisions
        self.subdivision_points = subdivision_points
        self.mask_size = 2 * ROI_SIZE * 2**subdivisions
        self.coarse_layers = MaskLayers(width, num_classes)
        self.point_layers = PointLayers(width, num_classes)

    def pool(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """The finest map at the cells' centres, however large the region."""
        cells = ROI_SIZE, ROI_SIZE
        centres = cell_centres(cells, full_precision(regions.boxes).dtype, regions.boxes.device)
        return sample_finest(pyramid, regions, centres / ROI_SIZE).unflatten(2, cells)

    def predict(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """See :class:`ClassMaskHead`."""
        coarse = self.coarse_layers.run(self.fused_features(pyramid, regions))
        # Only the masks of the regions' classes are kept and doubled: the points get the coarse logits of all classes
        masks = class_channels(coarse, regions.labels)
        for _ in range(self.subdivisions):
            masks = F.interpolate(masks[:, None], scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
            cells = uncertain_cells(masks, self.subdivision_points)
            shares = cell_centres(masks.shape[1:], masks.dtype, masks.device)[cells] / masks.shape[1]
            logits = class_channels(self.classify(pyramid, regions, coarse, shares), regions.labels)
            masks = masks.flatten(1).scatter(1, cells, logits).view_as(masks)
        return masks

    def classify(self, pyramid: FeaturePyramid, regions: Regions, coarse: Tensor, shares: Tensor) -> Tensor:
        """Logits of points.

        Args:
            pyramid: whose finest map is read.
            regions: n of them.
            coarse: logits (n, K, 28, 28).
            shares: (n, P, 2) x, y of the points as shares of the regions' sides.

        Returns:
            (n, K, P).
        """
        return self.point_layers(sample_finest(pyramid, regions, shares), sample_squares(coarse, shares))

    def compute_losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """``loss_mask`` of the coarse masks, as Mask R-CNN's; ``loss_point``, for the points instead of the cells."""
        coarse = self.coarse_layers.run(self.fused_features(pyramid, regions))
        masks = class_channels(coarse, regions.labels)
        shares = self.draw_points(masks.detach(), self._uniform(pyramid, regions))
        logits = class_channels(self.classify(pyramid, regions, coarse, shares), regions.labels)
        wanted = point_targets(regions, targets, shares)
        return {
            "loss_mask": mask_loss(masks, image_size, regions, targets),
            "loss_point": len(regions) * F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype)),
        }

    def follow(self, pyramid: FeaturePyramid, regions: Regions) -> None:
        """See :class:`ClassMaskHead`."""
        self._uniform(pyramid, regions)

    def _uniform(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """Random points (n, candidates + others, 2) that do not depend on how regions are spread over the processes."""
        number = self.num_candidates + self.num_points - self.num_uncertain
        boxes = full_precision(regions.boxes)
        return self.processes.draw(
            lambda rows: boxes.new_empty(rows, number, 2).uniform_(), regions.images, pyramid.num_images
        )

    def draw_points(self, masks: Tensor, uniform: Tensor) -> Tensor:
        """Random points, most of them uncertain.

        Args:
            masks: logits (n, S, S).
            uniform: (n, candidates + others, 2) from 0 to 1: points of which the least certain are taken, and points
                that are all taken.

        Returns:
            (n, P, 2) x, y as shares of the regions' sides.
        """
        candidates, others = uniform[:, : self.num_candidates], uniform[:, self.num_candidates :]
        logits = sample_squares(masks[:, None], candidates)[:, 0]
        chosen = logits.abs().topk(self.num_uncertain, dim=1, largest=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat([uncertain, others], dim=1)


def uncertain_cells(masks: Tensor, count: int) -> Tensor:
    """The cells of each mask whose logits are nearest to zero.

    Args:
        masks: logits (n, S, S).
        count: P, limited by S * S.

    Returns:
        (n, P) numbers of the cells, row by row.
    """
    distance = masks.detach().flatten(1).abs()
    return distance.topk(min(count, distance.shape[1]), dim=1, largest=False).indices


@torch.no_grad()
def point_targets(regions: Regions, targets: RegionTargets, shares: Tensor) -> Tensor:
    """Bilinear reads of the targets' masks, zero beyond the canvas.

    Args:
        regions: n, of any images.
        targets: theirs.
        shares: (n, P, 2) x, y as shares of the regions' sides.

    Returns:
        (n, P) from 0 to 1.
    """
    points = points_in_boxes(regions.boxes, shares)
    wanted = points.new_zeros(points.shape[:2])
    for masks, rows in zip(targets.masks, regions.rows_of_images(len(targets.masks)), strict=True):
        if len(rows):
            shape = numbers_to_device([masks.shape[2], masks.shape[1]], points.dtype, points.device)
            canvas = masks[targets.index[rows], None].to(points.dtype)
            wanted[rows] = sample_squares(canvas, points[rows] / shape)[:, 0]
    return wanted
