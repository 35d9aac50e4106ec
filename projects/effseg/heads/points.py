"""Reading maps at points of regions, which are given as shares of the region's sides.

Letters: n regions, P points of each, C channels, S side of a square. Detectron2's functions for PointRend do the same,
but in float32 only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from querymask.common.precision import full_precision
from querymask.common.transfer import numbers_to_device
from querymask.effseg.regions import Regions


def cell_centres(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size * size, 2) x, y of the centres of a square's cells, row by row, from 0 to 1."""
    centres = (torch.arange(size, dtype=dtype, device=device) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def points_in_boxes(boxes: Tensor, shares: Tensor) -> Tensor:
    """From shares to pixels, without gradient to the boxes.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in pixels.
        shares: (n, P, 2), or (P, 2) for the same in every box.

    Returns:
        (n, P, 2) in pixels.
    """
    boxes = full_precision(boxes.detach())[:, None]
    return boxes[..., :2] + shares.to(boxes.dtype) * (boxes[..., 2:] - boxes[..., :2])


def sample_map(feature: Tensor, regions: Regions, shares: Tensor, stride: int) -> Tensor:
    """Bilinear reads of a map, each region from its image; cells beyond the border count as zero.

    Args:
        feature: (B, C, H, W).
        regions: n of them.
        shares: (n, P, 2) or (P, 2).
        stride: pixels a side of a cell.

    Returns:
        (n, C, P) in full precision.
    """
    feature = full_precision(feature)
    extent = stride * numbers_to_device([feature.shape[3], feature.shape[2]], feature.dtype, feature.device)
    grid = 2 * points_in_boxes(regions.boxes, shares).to(feature.dtype) / extent - 1
    if len(feature) == 1:
        return _read(feature, grid)
    sampled = feature.new_zeros(len(grid), feature.shape[1], grid.shape[1])
    for image, rows in enumerate(regions.rows_of_images(len(feature))):
        if len(rows):
            sampled = sampled.index_copy(0, rows, _read(feature[image : image + 1], grid[rows]))
    return sampled


def _read(feature: Tensor, grid: Tensor) -> Tensor:
    """(1, C, H, W), (n, P, 2) -> (n, C, P)."""
    return F.grid_sample(feature, grid[None], align_corners=False)[0].transpose(0, 1)


def sample_squares(squares: Tensor, shares: Tensor) -> Tensor:
    """Bilinear reads of one square for each region; cells beyond the border count as zero.

    Args:
        squares: (n, C, S, S), which cover the regions.
        shares: (n, P, 2).

    Returns:
        (n, C, P) in full precision.
    """
    squares = full_precision(squares)
    return F.grid_sample(squares, 2 * shares[:, None].to(squares.dtype) - 1, align_corners=False)[:, :, 0]
