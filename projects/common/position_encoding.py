"""Sine encodings of positions (Vaswani et al. 2017; for padded maps Carion et al. 2020)."""

import math
from collections.abc import Sequence

import torch

from querymask.common.transfer import kept

TEMPERATURE = 10000.0


@kept
def _frequencies(num_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Divisors (num_features,) of the argument: feature 2i (sine) and 2i + 1 (cosine) share one."""
    index = torch.arange(num_features, dtype=dtype, device=device)
    return TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)


def _interleaved_sine(arguments: torch.Tensor) -> torch.Tensor:
    """Sine of the even and cosine of the odd entries of the last axis."""
    return torch.stack((arguments[..., 0::2].sin(), arguments[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_position_encoding(
    padding_masks: Sequence[torch.Tensor],
    num_features: int,
    dtype: torch.dtype,
    shift: float = 0.5,
) -> torch.Tensor:
    """Encoding of the cells of maps by their share of the unpadded height and width.

    Columns and rows without a valid cell get arguments of about -3e6: those values mean nothing, and no valid position
    may read them.

    Args:
        padding_masks: L masks (B, H_l, W_l) bool, true on padding.
        num_features: channels per axis, an even number.
        dtype: of the result, float32 or float64.
        shift: the position of a cell is its number from 1 on, less this: 0.5, its centre, in Deformable DETR, 0 in
            DETR and in pixel decoders after it.

    Returns:
        (B, S, 2 * num_features) of the cells of all maps, row-major: the channels of y, then of x.
    """
    numbers, lengths = [], []
    for mask in padding_masks:
        valid = ~mask
        y, x = valid.cumsum(1, dtype=dtype), valid.cumsum(2, dtype=dtype)
        numbers.append(torch.stack((y, x), dim=-1).flatten(1, 2))
        lengths.append(torch.stack((y[:, -1, None].expand_as(y), x[..., -1, None].expand_as(x)), dim=-1).flatten(1, 2))
    shares = (torch.cat(numbers, dim=1) - shift) / (torch.cat(lengths, dim=1) + 1e-6) * (2 * math.pi)
    return _interleaved_sine(shares[..., None] / _frequencies(num_features, like=shares)).flatten(-2)


def sine_box_encoding(boxes: torch.Tensor, num_features: int) -> torch.Tensor:
    """Encoding of normalised boxes (Zhu et al. 2021, two-stage variant).

    Args:
        boxes: (..., 4) cx, cy, w, h in [0, 1].
        num_features: channels per coordinate, an even number.

    Returns:
        (..., 4 * num_features) in the order of the coordinates.
    """
    divisors = _frequencies(num_features, like=boxes)
    return _interleaved_sine(boxes[..., None] * (2 * math.pi) / divisors).flatten(-2)
