"""Sine encodings against loops written from the formulas."""

import math

import pytest
import torch

from querymask.common.position_encoding import sine_box_encoding, sine_position_encoding


def slow_sine(argument: float, num_features: int) -> list[float]:
    """sin, cos, sin, cos, ... of the argument divided by 10000^(2 floor(c / 2) / num_features)."""
    values = []
    for c in range(num_features):
        angle = argument / 10000 ** (2 * (c // 2) / num_features)
        values.append(math.sin(angle) if c % 2 == 0 else math.cos(angle))
    return values


def make_mask(valid: list[tuple[int, int]], height: int, width: int) -> torch.Tensor:
    mask = torch.ones(len(valid), height, width, dtype=torch.bool)
    for b, (h, w) in enumerate(valid):
        mask[b, :h, :w] = False
    return mask


def encode(mask: torch.Tensor, num_features: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, W, 2 * num_features) of one map."""
    return sine_position_encoding([mask], num_features, dtype).unflatten(1, mask.shape[1:])


def test_position_encoding_of_several_maps() -> None:
    """One after the other, each as if it were alone."""
    masks = [make_mask([(5, 7), (2, 4)], 5, 7), make_mask([(2, 3), (1, 2)], 2, 3)]
    encoding = sine_position_encoding(masks, 6, torch.float64, shift=0.0)
    alone = [sine_position_encoding([mask], 6, torch.float64, shift=0.0) for mask in masks]
    assert torch.equal(encoding, torch.cat(alone, dim=1)) and encoding.shape == (2, 5 * 7 + 2 * 3, 12)


def test_position_encoding() -> None:
    """(cell + 0.5) / valid size * 2 pi, first of y, then of x."""
    valid = [(5, 7), (3, 7), (2, 4)]
    encoding = encode(make_mask(valid, 5, 7), 6, torch.float64)
    assert encoding.shape == (3, 5, 7, 12) and encoding.dtype == torch.float64
    for b, (height, width) in enumerate(valid):
        for i in range(height):
            for j in range(width):
                y = (i + 0.5) / (height + 1e-6) * 2 * math.pi
                x = (j + 0.5) / (width + 1e-6) * 2 * math.pi
                expected = slow_sine(y, 6) + slow_sine(x, 6)
                assert encoding[b, i, j].tolist() == pytest.approx(expected, abs=1e-12)


def test_position_encoding_does_not_depend_on_padding() -> None:
    alone = encode(make_mask([(3, 4)], 3, 4), 8, torch.float64)
    padded = encode(make_mask([(3, 4)], 6, 9), 8, torch.float64)
    assert torch.equal(padded[:, :3, :4], alone)


def test_position_encoding_in_single_precision() -> None:
    """Near float64's on valid cells; finite also where there is nothing but padding."""
    mask = make_mask([(5, 7), (2, 4)], 5, 7)
    single = encode(mask, 6, torch.float32)
    assert single.dtype == torch.float32 and torch.isfinite(single).all()
    double = encode(mask, 6, torch.float64)
    assert (single - double)[~mask].abs().max() < 1e-5


def test_box_encoding() -> None:
    boxes = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    encoding = sine_box_encoding(boxes, 10)
    assert encoding.shape == (2, 3, 40)
    for b in range(2):
        for q in range(3):
            expected = [v for value in boxes[b, q].tolist() for v in slow_sine(value * 2 * math.pi, 10)]
            assert encoding[b, q].tolist() == pytest.approx(expected, abs=1e-12)
