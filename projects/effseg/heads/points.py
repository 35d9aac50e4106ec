"""Reading at points of regions, which are given as shares of the region's sides.

Letters: n regions, P points of each, C channels, S side of a square. Detectron2's functions for PointRend do the same,
but in float32 only.
"""

import torch.nn.functional as F
from torch import Tensor

from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.regions import Regions


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


def sample_finest(pyramid: FeaturePyramid, regions: Regions, shares: Tensor) -> Tensor:
    """Bilinear reads of the finest map, each region from its image; cells beyond the border count as zero.

    Args:
        pyramid: its first map is read.
        regions: n of them.
        shares: (n, P, 2) or (P, 2).

    Returns:
        (n, C, P) in full precision.
    """
    points = points_in_boxes(regions.boxes, shares)
    images = regions.images[:, None].expand(points.shape[:2])
    return pyramid.sample(points.flatten(0, 1), images.flatten()).unflatten(0, points.shape[:2]).transpose(1, 2)


def sample_squares(squares: Tensor, shares: Tensor) -> Tensor:
    """Bilinear reads of one square for each region; cells beyond the border count as zero.

    Unlike a pyramid's maps, which all regions share, squares are read by nobody else: there is nothing to lay out.

    Args:
        squares: (n, C, S, S), which cover the regions.
        shares: (n, P, 2).

    Returns:
        (n, C, P) in full precision.
    """
    squares = full_precision(squares)
    return F.grid_sample(squares, 2 * shares[:, None].to(squares.dtype) - 1, align_corners=False)[:, :, 0]
