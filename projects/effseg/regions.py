"""What the segmentation heads of FQDet share: regions, their features, and the interface of a head.

Letters: n regions, B images, C width of maps and queries, S side of a mask.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from querymask.common.masks import mask_coverage
from querymask.common.precision import full_precision
from querymask.common.processes import Processes
from querymask.common.pyramid import ADAPTIVE, FeaturePyramid, LevelRule, group_rows

ROI_SIZE = 14
"""Cells a side of a region at first."""
LEVEL_RULE = LevelRule(56, 2, 1e-6)
"""A region of less than twice this side (pixels) is read from P2; each doubling goes one map up."""
STRIDES = (4, 8, 16, 32)
"""Of the pyramid that heads read, P2 to P5."""


@dataclass(frozen=True)
class Regions:
    """Boxes that get masks.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the network's input, not clipped.
        images: (n,) numbers of their images.
        queries: (n, C) after the decoder's last layer.
        labels: (n,) classes, which heads with a mask for each class ask for.
        real: (n,) bool, false where a region only fills the number up and must take nothing from others; None: all are.
    """

    boxes: Tensor
    images: Tensor
    queries: Tensor
    labels: Tensor
    real: Tensor | None = None
    _rows: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def rows_of_images(self, count: int) -> list[Tensor]:
        """The rows (n_i,) of every image, ascending; found once.

        Args:
            count: of images.
        """
        if count not in self._rows:
            self._rows[count] = group_rows(self.images, count)
        return self._rows[count]

    def __getitem__(self, rows: Tensor) -> "Regions":
        return Regions(self.boxes[rows], self.images[rows], self.queries[rows], self.labels[rows])


@dataclass(frozen=True)
class RegionTargets:
    """Ground truth of regions.

    Attributes:
        masks: (T, H, W) bool on the padded canvas, for every image.
        index: (n,) number of each region's target within its image.
    """

    masks: Sequence[Tensor]
    index: Tensor


@torch.no_grad()
def target_coverage(
    regions: Regions, targets: RegionTargets, sizes: Sequence[int], boxes: Tensor | None = None
) -> list[Tensor]:
    """How much of each cell of a region the mask of its target covers.

    Args:
        regions: n, of any images.
        targets: theirs.
        sizes: cells a side.
        boxes: (n, 4) in place of the regions' own.

    Returns:
        (n, size, size) in [0, 1] for every size.
    """
    boxes = full_precision(regions.boxes if boxes is None else boxes)
    coverage = [boxes.new_zeros(len(regions), size, size) for size in sizes]
    for masks, rows in zip(targets.masks, regions.rows_of_images(len(targets.masks)), strict=True):
        if len(rows):
            masks = masks.to(boxes.dtype)
            for result, size in zip(coverage, sizes):
                result[rows] = mask_coverage(masks, boxes[rows], size, targets.index[rows])
    return coverage


@torch.no_grad()
def target_at_centres(regions: Regions, targets: RegionTargets, sizes: Sequence[int]) -> list[Tensor]:
    """Whether the centre of each cell of a region is in the mask of its target, which ends with the canvas.

    Args:
        regions, targets, sizes: as in :func:`target_coverage`.

    Returns:
        (n, size, size) bool for every size.
    """
    boxes = full_precision(regions.boxes)
    found = [torch.zeros(len(regions), size, size, dtype=torch.bool, device=boxes.device) for size in sizes]
    for masks, rows in zip(targets.masks, regions.rows_of_images(len(targets.masks)), strict=True):
        if not len(rows):
            continue
        x0, y0, x1, y1 = boxes[rows].unbind(1)
        for result, size in zip(found, sizes):
            shares = (torch.arange(size, dtype=boxes.dtype, device=boxes.device) + 0.5) / size
            pixels, inside = [], []
            for low, high, extent in ((y0, y1, masks.shape[1]), (x0, x1, masks.shape[2])):
                place = low[:, None] + shares * (high - low)[:, None]
                inside.append((place >= 0) & (place < extent))
                pixels.append(torch.where(inside[-1], place, 0).long())
            read = masks[targets.index[rows, None, None], pixels[0][:, :, None], pixels[1][:, None]]
            result[rows] = read & inside[0][:, :, None] & inside[1][:, None]
    return found


def pool_regions(pyramid: FeaturePyramid, regions: Regions) -> Tensor:
    """RoIAlign with adaptive sampling, each region on its own level: (n, C, 14, 14) in full precision."""
    return pyramid.pool(regions.boxes, regions.images, ROI_SIZE, ADAPTIVE, LEVEL_RULE)


class QueryFusion(nn.Module):
    """What the query says about each cell of its region; to be added to the features (EffSeg, section 3.2).

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.fuse = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """(n, C, S, S), (n, C) -> (n, C, S, S)."""
        query = self.query(queries)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.fuse(torch.cat([query, features], dim=1))


class SegmentationHead(nn.Module):
    """Masks for regions.

    Attributes:
        per_class: masks depend on the labels, so every pair of query and class is a region; else every query is one.
        processes: whose regions are one batch in training.
    """

    per_class: bool
    processes: Processes = Processes()

    @abstractmethod
    def forward(self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions) -> Tensor:
        """Probabilities (n, S, S) of the regions' masks, the regions being those of one image.

        Args:
            pyramid: P2 to P5.
            image_size: (height, width) of the padded images.
            regions: n of them; n may be 0.
        """

    @abstractmethod
    def losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """Weighted losses of matched regions of all images together; zeros with a gradient if there is none.

        Summed over the processes they are those of the whole batch. All of ``processes`` must call this together.

        Args:
            pyramid, image_size: as in ``forward``.
            regions: n matched queries, with the classes of their targets, ordered by image.
            targets: theirs.
        """
