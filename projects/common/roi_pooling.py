"""RoIAlign on a feature pyramid as one weighted sum of cells (He et al. 2017; levels as in Lin et al. 2017).

Detectron2's ``ROIPooler`` sorts boxes by level, which on a GPU makes the host wait at every call, and gives
channels-first crops. Here the cells of all maps are the rows of one table, each bin is the sum of 4 * samples^2 rows,
and nothing depends on how many boxes a level has. Results are equal.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from querymask.common.precision import full_precision
from querymask.common.transfer import constants_to_device

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
"""A box of this side (pixels) goes to the level of stride 2 ** 4; twice the side, one level higher."""


class FeaturePyramid:
    """Maps of one width whose strides are consecutive powers of two.

    Args:
        maps: (B, C, H_l, W_l), fine to coarse.
        strides: in pixels.
    """

    def __init__(self, maps: Sequence[torch.Tensor], strides: Sequence[int]) -> None:
        self.maps = list(maps)
        self.levels = [stride.bit_length() - 1 for stride in strides]
        if [2**level for level in self.levels] != list(strides) or self.levels != list(
            range(self.levels[0], self.levels[0] + len(maps))
        ):
            raise ValueError(f"the strides of a pyramid must be consecutive powers of two, not {list(strides)}")
        self.strides = list(strides)

    @cached_property
    def _geometry(self) -> torch.Tensor:
        """(L, 4): height, width, first row, stride."""
        sizes = [(x.shape[2], x.shape[3]) for x in self.maps]
        cells = [x.shape[0] * height * width for x, (height, width) in zip(self.maps, sizes, strict=True)]
        rows = [(*size, sum(cells[:i]), self.strides[i]) for i, size in enumerate(sizes)]
        return constants_to_device(rows, torch.int64, self.maps[0].device)

    @cached_property
    def _rows(self) -> torch.Tensor:
        return torch.cat([full_precision(x).permute(0, 2, 3, 1).flatten(0, 2) for x in self.maps])

    def level_of(self, boxes: torch.Tensor) -> torch.Tensor:
        """Index of the map for each box: floor(4 + log2(sqrt(area) / 224 + 1e-8)), within the pyramid.

        Args:
            boxes: (n, 4) XYXY in pixels.
        """
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / CANONICAL_SIZE + 1e-8))
        return level.nan_to_num().clamp(self.levels[0], self.levels[-1]).long() - self.levels[0]

    def pool(self, boxes: torch.Tensor, images: torch.Tensor, size: int, samples: int = 2) -> torch.Tensor:
        """Cut boxes out at a fixed size, without gradient to the boxes.

        Bins are averages of ``samples`` x ``samples`` bilinear samples; half-pixel aligned. A sample beyond the outer
        pixel counts as zero.

        Args:
            boxes: (n, 4) XYXY in pixels; may reach beyond the image.
            images: (n,) image of each box.
            size: bins a side.
            samples: samples a side of a bin.

        Returns:
            (n, size * size, C), bins in row-major order.
        """
        boxes = full_precision(boxes.detach())
        height, width, first_row, stride = self._geometry[self.level_of(boxes)].unbind(1)
        corners = boxes / stride[:, None] - 0.5
        rows, row_weights = _samples(corners[:, 1], corners[:, 3], height, size, samples)
        columns, column_weights = _samples(corners[:, 0], corners[:, 2], width, size, samples)
        # (n, bin row, bin column, row sample, column sample)
        offset = (first_row + images * height * width)[:, None, None]
        index = (offset + rows * width[:, None, None])[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        per_bin = index.shape[3] * index.shape[4]
        pooled = F.embedding_bag(
            index.reshape(-1, per_bin),
            self._rows,
            mode="sum",
            per_sample_weights=weights.reshape(-1, per_bin).to(self._rows.dtype),
        )
        return pooled.view(len(boxes), size * size, self._rows.shape[1])


def _samples(
    low: torch.Tensor, high: torch.Tensor, extent: torch.Tensor, size: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells and weights of the samples along one axis.

    Args:
        low, high: (n,) ends of the boxes in cells, where cell i has its centre at i.
        extent: (n,) number of cells.

    Returns:
        cells (n, size, 2 * samples) and their weights, whose sum over a bin is 1 inside the map.
    """
    extent = extent[:, None, None]
    steps = torch.arange(size * samples, dtype=low.dtype, device=low.device).view(size, samples) + 0.5
    position = low[:, None, None] + steps * ((high - low) / (size * samples))[:, None, None]
    inside = (position >= -1) & (position <= extent)
    position = position.nan_to_num().clamp(min=0).minimum((extent - 1).to(position.dtype))
    cell = position.long()
    fraction = position - cell
    cells = torch.cat((cell, (cell + 1).minimum(extent - 1)), dim=-1)
    weights = torch.cat((1 - fraction, fraction), dim=-1) / samples
    return cells, weights * torch.cat((inside, inside), dim=-1)
