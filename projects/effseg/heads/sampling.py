"""Bilinear reads of single points of feature maps, each from a map of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from querymask.common.precision import full_precision
from querymask.common.transfer import numbers_to_device


class MapSampler:
    """The cells of all maps as the rows of one table, from which every point is a weighted sum of four.

    So any mixture of maps is read at once, nothing depends on how many points a map has, and the four neighbours are
    not stored. Gradients go to the maps and, through the weights, to the points.

    Args:
        maps: (B, C, H_l, W_l), fine to coarse.
        image_size: (height, width) of the padded images, which the maps cover.
    """

    def __init__(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> None:
        cells = [x.shape[0] * x.shape[2] * x.shape[3] for x in maps]
        # (L, 3): height, width, first row
        self._geometry = numbers_to_device(
            [(x.shape[2], x.shape[3], sum(cells[:i])) for i, x in enumerate(maps)], torch.int64, maps[0].device
        )
        self._image_size = image_size
        self._rows = torch.cat([full_precision(x).permute(0, 2, 3, 1).flatten(0, 2) for x in maps])

    def __call__(self, points: Tensor, images: Tensor, levels: Tensor) -> Tensor:
        """Read the maps as ``grid_sample`` without aligned corners does; cells beyond the border count as zero.

        Args:
            points: (m, 2) x, y in pixels of the padded images.
            images, levels: (m,) numbers of their images and maps.

        Returns:
            (m, C) in float32 or, where the maps have it, float64.
        """
        height, width, first_row = self._geometry[levels].unbind(1)
        x = points[:, 0] / self._image_size[1] * width - 0.5
        y = points[:, 1] / self._image_size[0] * height - 0.5
        near = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for nan
        x, y = torch.where(near, x, -1), torch.where(near, y, -1)  # where no cell is read
        left, upper = x.detach().floor(), y.detach().floor()
        first_row = first_row + images * height * width
        rows, weights = [], []
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = upper.long() + dy, left.long() + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & near
            share_y = y - upper if dy else 1 - (y - upper)
            share_x = x - left if dx else 1 - (x - left)
            rows.append(torch.where(inside, first_row + row * width + column, 0))
            weights.append(share_y * share_x * inside)
        return F.embedding_bag(
            torch.stack(rows, 1),
            self._rows,
            mode="sum",
            per_sample_weights=torch.stack(weights, 1).to(self._rows.dtype),
        )
