"""Feature pyramids, read at boxes (RoIAlign, He et al. 2017; levels as in Lin et al. 2017) and at points.

The cells of all maps are the rows of one table, and whatever is read is a weighted sum of rows: of four for a point, of
4 * samples^2 for a bin. Any mixture of levels and images is read at once, and nothing depends on how many of each there
are, which on a GPU the host would have to wait for, as it does at every call of Detectron2's ``ROIPooler``. Results are
equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision
from querymask.common.transfer import kept, kept_numbers


class LevelRule(NamedTuple):
    """Which level a box is read from: floor(level + log2(side / ``side`` + margin)), within the pyramid.

    Attributes:
        side: square root of the area, in pixels, of a box that goes to ``level``; twice the side, one level higher.
        level: whose stride is 2 ** level.
        margin: against rounding.
    """

    side: float
    level: int
    margin: float


CANONICAL_LEVELS = LevelRule(224, 4, 1e-8)
"""As in Detectron2."""
ADAPTIVE = 0
"""Number of samples: as many as a bin has pixels of the map."""


class FeaturePyramid:
    """Maps of one width whose strides are consecutive powers of two.

    Args:
        maps: (B, C, H_l, W_l), fine to coarse.
        strides: in pixels.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
        self.maps = list(maps)
        self.levels = [stride.bit_length() - 1 for stride in strides]
        if [2**level for level in self.levels] != list(strides) or self.levels != list(
            range(self.levels[0], self.levels[0] + len(maps))
        ):
            raise ValueError(f"the strides of a pyramid must be consecutive powers of two, not {list(strides)}")
        self.strides = list(strides)
        self._found_geometry: Tensor | None = None
        self._found_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, levels: slice) -> "FeaturePyramid":
        """Some of the levels."""
        return FeaturePyramid(self.maps[levels], self.strides[levels])

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.maps[0])

    def of_image(self, image: int) -> "FeaturePyramid":
        """That of one image, which is image 0 then."""
        return self if self.num_images == 1 else FeaturePyramid([x[image : image + 1] for x in self.maps], self.strides)

    # No cached_property, at whose lock torch.compile stops before Python 3.12

    @property
    def _geometry(self) -> Tensor:
        """(L, 4): height, width, first row, stride."""
        if self._found_geometry is None:
            sizes = [(x.shape[2], x.shape[3]) for x in self.maps]
            cells = [x.shape[0] * height * width for x, (height, width) in zip(self.maps, sizes, strict=True)]
            rows = [(*size, sum(cells[:i]), self.strides[i]) for i, size in enumerate(sizes)]
            self._found_geometry = kept_numbers(tuple(rows), like=self.maps[0], dtype=torch.int64)
        return self._found_geometry

    @property
    def _rows(self) -> Tensor:
        if self._found_rows is None:
            rows = [full_precision(x).permute(0, 2, 3, 1).flatten(0, 2) for x in self.maps]
            self._found_rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        return self._found_rows

    def level_of(self, boxes: Tensor, rule: LevelRule = CANONICAL_LEVELS) -> Tensor:
        """Index (n,) of the map for each box (n, 4) x0, y0, x1, y1 in pixels."""
        boxes = full_precision(boxes.detach())
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(rule.level + torch.log2(area.sqrt() / rule.side + rule.margin))
        return level.nan_to_num().clamp(self.levels[0], self.levels[-1]).long() - self.levels[0]

    # ---- At boxes -------------------------------------------------------------------------------------------------

    def pool(
        self, boxes: Tensor, images: Tensor, size: int, samples: int = 2, rule: LevelRule = CANONICAL_LEVELS
    ) -> Tensor:
        """Cut boxes out at a fixed size, without gradient to the boxes.

        Bins are averages of ``samples`` x ``samples`` bilinear samples; half-pixel aligned. A sample beyond the outer
        pixel counts as zero. Boxes are not rounded to the type of the maps: bfloat16 has steps of 4 pixels from 512 on.

        Args:
            boxes: (n, 4) x0, y0, x1, y1 in pixels; may reach beyond the image.
            images: (n,) image of each box.
            size: bins a side.
            samples: samples a side of a bin, or ``ADAPTIVE``, for which the host must know how many boxes a level has.
            rule: of the levels.

        Returns:
            (n, C, size, size) in full precision.
        """
        boxes, levels = full_precision(boxes.detach()), self.level_of(boxes, rule)
        if samples == ADAPTIVE:
            return self._pool_adaptively(boxes, images, size, levels)
        geometry = self._geometry[levels]
        height, width, first_row, stride = geometry.unbind(1)
        low, high = (boxes / stride[:, None] - 0.5).view(-1, 2, 2).flip(2).unbind(1)  # y, x
        cells, weights = _samples(low, high, geometry[:, :2], size, samples)
        (rows, columns), (row_weights, column_weights) = cells.unbind(1), weights.unbind(1)
        # (n, bin row, bin column, row sample, column sample)
        offset = (first_row + images * height * width)[:, None, None]
        index = (offset + rows * width[:, None, None])[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        pooled = self._weighted_rows(index.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2))
        return pooled.view(len(boxes), size, size, pooled.shape[1]).permute(0, 3, 1, 2)

    def _pool_all_adaptively(self, boxes: Tensor, images: Tensor, size: int, levels: Tensor) -> Tensor:
        pooled = full_precision(self.maps[0]).new_zeros(())
        for level, (feature, stride) in enumerate(zip(self.maps, self.strides, strict=True)):
            own = levels == level
            rois = torch.cat([images[:, None].to(boxes.dtype), boxes.where(own[:, None], 0)], dim=1)
            crops = roi_align(full_precision(feature), rois, size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled + crops.where(own[:, None, None, None], 0)
        return pooled

    @exportable(_pool_all_adaptively, compiled=True)
    def _pool_adaptively(self, boxes: Tensor, images: Tensor, size: int, levels: Tensor) -> Tensor:
        pooled = full_precision(self.maps[0]).new_zeros(len(boxes), self.maps[0].shape[1], size, size)
        for rows, feature, stride in zip(group_rows(levels, len(self)), self.maps, self.strides, strict=True):
            feature = full_precision(feature)
            rois = torch.cat([images[rows, None].to(boxes.dtype), boxes[rows]], dim=1).to(feature.dtype)
            crops = roi_align(feature, rois, size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_copy(0, rows, crops)
        return pooled

    # ---- At points ------------------------------------------------------------------------------------------------

    def sample(
        self, points: Tensor, images: Tensor, levels: Tensor | int = 0, extent: tuple[int, int] | None = None
    ) -> Tensor:
        """Bilinear reads of single points; cells beyond the border count as zero, as in ``grid_sample``.

        Gradients go to the maps and, through the weights, to the points.

        Args:
            points: (m, 2) x, y in pixels.
            images: (m,) image of each point.
            levels: (m,) index of its map, or one for all.
            extent: (height, width) in pixels that every map covers; None: as many as its cells have.

        Returns:
            (m, C) in full precision.
        """
        geometry = self._geometry[levels].expand(len(points), 4)
        (height, width, first_row, stride), sizes = geometry.unbind(1), geometry[:, :2]
        place = full_precision(points).flip(1)  # y, x
        if extent is None:
            place = place / stride[:, None] - 0.5
        else:
            place = place / kept_numbers(tuple(extent), like=place) * sizes - 0.5
        near = ((place > -1) & (place < sizes)).all(1)  # false for nan
        place = torch.where(near[:, None], place, -1)  # where no cell is read
        first = place.detach().floor()
        cells = first.long()[..., None] + torch.arange(2, device=place.device)  # (m, axis, neighbour)
        inside = (cells >= 0) & (cells < sizes[..., None]) & near[:, None, None]
        share = place - first
        shares = torch.stack((1 - share, share), dim=-1) * inside
        rows = (first_row + images * height * width)[:, None] + cells[:, 0] * width[:, None]
        both = inside[:, 0, :, None] & inside[:, 1, None]
        index = torch.where(both, rows[:, :, None] + cells[:, 1, None], 0)
        weights = shares[:, 0, :, None] * shares[:, 1, None]
        return self._weighted_rows(index.flatten(1), weights.flatten(1))

    def _weighted_rows(self, index: Tensor, weights: Tensor) -> Tensor:
        """(m, k) numbers of rows and their weights -> (m, C)."""
        return _sum_rows(self._rows, index, weights.to(self._rows.dtype))


def _sum_rows_by_products(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None] @ table[index])[:, 0]


@exportable(_sum_rows_by_products)
def _sum_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def group_rows(numbers: Tensor, count: int) -> list[Tensor]:
    """The rows of every number, found with a single wait for the device: one ``nonzero`` for each would be as many.

    Args:
        numbers: (n,) from 0 to ``count`` - 1.
        count: of groups.

    Returns:
        for every number the rows (n_i,) that have it, ascending.
    """
    sizes = (numbers[:, None] == torch.arange(count, device=numbers.device)).sum(0).tolist()
    return list(numbers.argsort(stable=True).split(sizes))


@kept
def _steps(size: int, samples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, samples): 0.5, 1.5, ..., row by row."""
    return torch.arange(size * samples, dtype=dtype, device=device).view(size, samples) + 0.5


def _samples(low: Tensor, high: Tensor, extent: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Cells and weights of the samples along each axis.

    Args:
        low, high: (n, 2) ends of the boxes in cells, where cell i has its centre at i.
        extent: (n, 2) number of cells.

    Returns:
        cells (n, 2, size, 2 * samples) and their weights, whose sum over a bin is 1 inside the map.
    """
    extent = extent[..., None, None]
    last = extent - 1
    sides = ((high - low) / (size * samples))[..., None, None]
    position = low[..., None, None] + _steps(size, samples, like=low) * sides
    inside = (position >= -1) & (position <= extent)
    position = position.nan_to_num().clamp(min=0).minimum(last.to(position.dtype))
    cell = position.long()
    fraction = position - cell
    cells = torch.cat((cell, (cell + 1).minimum(last)), dim=-1)
    weights = torch.cat((1 - fraction, fraction), dim=-1) / samples
    return cells, weights * torch.cat((inside, inside), dim=-1)
