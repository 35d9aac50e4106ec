"""Anchors of FQDet (Picron et al., https://arxiv.org/abs/2210.02318), and boxes relative to them.

Letters: A anchors. Anchors are (cx, cy, w, h) in pixels of the padded image. They are ordered by level, fine to coarse,
then by row, column and shape; shapes by size, then by aspect ratio.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from querymask.common.boxes import to_corners
from querymask.common.deformable_attention import SpatialShapes, of_tokens, token_centres
from querymask.common.transfer import constants_to_device, kept, kept_numbers

SIZES_PER_OCTAVE = 3
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width
ANCHORS_PER_CELL = SIZES_PER_OCTAVE * len(ASPECT_RATIOS)
BASE_SIDE = 4  # of the smallest square anchor, in cells
MAX_LOG_SCALE = (
    62.5  # a predicted side is at most exp of this times the anchor's: no more than a guard against overflow
)


@kept
def _cell_sizes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(9, 2) widths and heights of one cell's anchors, in cells."""
    octaves = torch.arange(SIZES_PER_OCTAVE, dtype=dtype, device=device) / SIZES_PER_OCTAVE
    aspects = constants_to_device(ASPECT_RATIOS, dtype, device)
    widths = BASE_SIDE * torch.exp2(octaves)[:, None] / aspects.sqrt()
    return torch.stack([widths, aspects * widths], dim=-1).view(-1, 2)


def make_anchors(shapes: SpatialShapes, levels: Sequence[int], like: Tensor) -> Tensor:
    """The anchors of all cells, not clipped, those on padding included.

    Args:
        shapes: (height, width) of each map.
        levels: l for each map, whose cells have sides of 2^l pixels.
        like: of the device and the type of the result, at least float32.

    Returns:
        (A, 4), A being the sum of H_l * W_l * 9.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = token_centres(shapes, like=like, dtype=dtype)[:, None].expand(-1, ANCHORS_PER_CELL, -1)
    sizes = _cell_sizes(like=like, dtype=dtype).expand_as(centres)
    sides = kept_numbers(tuple((2.0**level,) for level in levels), like=like, dtype=dtype)
    return (of_tokens(sides, shapes)[:, None] * torch.cat([centres, sizes], dim=-1)).flatten(0, 1)


def apply_deltas(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1) from anchors and (dx, dy, dw, dh): shifts in sides of the anchor, logs of scales.

    Args:
        anchors, deltas: (..., 4).

    Returns:
        (..., 4), not clipped.
    """
    centres = anchors[..., :2] + deltas[..., :2] * anchors[..., 2:]
    sizes = anchors[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return to_corners(torch.cat([centres, sizes], dim=-1))


def encode_deltas(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The deltas that :func:`apply_deltas` turns into ``boxes``.

    Args:
        anchors: (..., 4) cx, cy, w, h.
        boxes: (..., 4) cx, cy, w, h, of positive size.
    """
    shifts = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    return torch.cat([shifts, (boxes[..., 2:] / anchors[..., 2:]).log()], dim=-1)
