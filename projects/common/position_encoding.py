"""Sine encodings of positions (Vaswani et al. 2017; for padded maps Carion et al. 2020)."""

import math

import torch

TEMPERATURE = 10000.0


def _frequencies(num_features: int, like: torch.Tensor) -> torch.Tensor:
    """Divisors (num_features,) of the argument: feature 2i (sine) and 2i + 1 (cosine) share one."""
    index = torch.arange(num_features, dtype=like.dtype, device=like.device)
    return TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)


def _interleaved_sine(arguments: torch.Tensor) -> torch.Tensor:
    """Sine of the even and cosine of the odd entries of the last axis."""
    return torch.stack((arguments[..., 0::2].sin(), arguments[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_position_encoding(
    padding_mask: torch.Tensor,
    num_features: int,
    dtype: torch.dtype,
    shift: float = 0.5,
) -> torch.Tensor:
    """Encoding of the cells of a map by their share of the unpadded height and width.

    Columns and rows without a valid cell get arguments of about -3e6: those values mean nothing, and no valid position
    may read them.

    Args:
        padding_mask: (B, H, W) bool, true on padding.
        num_features: channels per axis, an even number.
        dtype: of the result, float32 or float64.
        shift: the position of a cell is its number from 1 on, less this: 0.5, its centre, in Deformable DETR, 0 in
            DETR and in pixel decoders after it.

    Returns:
        (B, H, W, 2 * num_features): the channels of y, then of x.
    """
    valid = ~padding_mask
    y = valid.cumsum(1, dtype=dtype)
    x = valid.cumsum(2, dtype=dtype)
    scale = 2 * math.pi
    y = (y - shift) / (y[:, -1:, :] + 1e-6) * scale
    x = (x - shift) / (x[:, :, -1:] + 1e-6) * scale
    divisors = _frequencies(num_features, y)
    return torch.cat((_interleaved_sine(y[..., None] / divisors), _interleaved_sine(x[..., None] / divisors)), dim=-1)


def sine_box_encoding(boxes: torch.Tensor, num_features: int) -> torch.Tensor:
    """Encoding of normalised boxes (Zhu et al. 2021, two-stage variant).

    Args:
        boxes: (..., 4) cx, cy, w, h in [0, 1].
        num_features: channels per coordinate, an even number.

    Returns:
        (..., 4 * num_features) in the order of the coordinates.
    """
    divisors = _frequencies(num_features, boxes)
    return _interleaved_sine(boxes[..., None] * (2 * math.pi) / divisors).flatten(-2)
