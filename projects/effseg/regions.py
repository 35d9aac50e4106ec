"""What the segmentation heads of FQDet share: regions, their features, and the interface of a head.

Letters: n regions, B images, C width of maps and queries, S side of a mask.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from querymask.common.precision import full_precision
from querymask.common.processes import Processes
from querymask.effseg.grouping import group_rows

ROI_SIZE = 14
"""Cells a side of a region at first."""
CANONICAL_SIDE = 56
"""A region of less than twice this side (pixels) is read from the finest map; each doubling goes one map up."""
NUM_MAPS = 4
"""Maps that heads read: P2 to P5."""


@dataclass(frozen=True)
class Regions:
    """Boxes that get masks.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the network's input, not clipped.
        images: (n,) numbers of their images.
        queries: (n, C) after the decoder's last layer.
        labels: (n,) classes, which heads with a mask for each class ask for.
    """

    boxes: Tensor
    images: Tensor
    queries: Tensor
    labels: Tensor
    _rows: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def levels(self) -> Tensor:
        """(n,) index of the map of each region: 0 is P2."""
        sides = full_precision(self.boxes.detach())
        sides = ((sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])).sqrt()
        return torch.floor(torch.log2(sides / CANONICAL_SIDE + 1e-6)).nan_to_num().clamp(0, NUM_MAPS - 1).long()

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


def pool_regions(maps: Sequence[Tensor], regions: Regions, size: int = ROI_SIZE) -> Tensor:
    """RoIAlign with adaptive sampling, half-pixel aligned, each region on its own map, without gradient to the boxes.

    Boxes must not be rounded to the type of the maps: bfloat16 has steps of 4 pixels from 512 on.

    Args:
        maps: P2, P3, ... (B, C, H_l, W_l), of which the first ``NUM_MAPS`` are read.
        regions: n of them.
        size: cells a side.

    Returns:
        (n, C, size, size) in full precision.
    """
    boxes = full_precision(regions.boxes.detach())
    rows_of_levels = group_rows(regions.levels, NUM_MAPS)
    pooled = full_precision(maps[0]).new_zeros(len(regions), maps[0].shape[1], size, size)
    for level, (rows, feature) in enumerate(zip(rows_of_levels, map(full_precision, maps))):
        rois = torch.cat([regions.images[rows, None].to(boxes.dtype), boxes[rows]], dim=1)
        crops = roi_align(feature, rois.to(feature.dtype), size, 0.25 / 2**level, sampling_ratio=0, aligned=True)
        pooled = pooled.index_copy(0, rows, crops)
    return pooled


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
    def forward(self, maps: Sequence[Tensor], image_size: tuple[int, int], regions: Regions) -> Tensor:
        """Probabilities (n, S, S) of the regions' masks, the regions being those of one image.

        Args:
            maps: P2, P3, ... (B, C, H_l, W_l).
            image_size: (height, width) of the padded images.
            regions: n of them; n may be 0.
        """

    @abstractmethod
    def losses(
        self, maps: Sequence[Tensor], image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """Weighted losses of matched regions of all images together; zeros with a gradient if there is none.

        Summed over the processes they are those of the whole batch. All of ``processes`` must call this together.

        Args:
            maps, image_size: as in ``forward``.
            regions: n matched queries, with the classes of their targets, ordered by image.
            targets: theirs.
        """
