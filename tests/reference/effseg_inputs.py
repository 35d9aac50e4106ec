"""What the cases of EffSeg's heads share: inputs by name, and an independent form of pasting."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def make_input(case: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A float64 input of a case."""
    name = f"{case['input_prefix']}.{name}"
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))


def paste(masks: Tensor, boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Bilinear reads of the masks at the canvas' pixel centres, zero outside of them."""
    y, x = (torch.arange(size, dtype=boxes.dtype) + 0.5 for size in canvas)
    x = 2 * (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) - 1
    y = 2 * (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) - 1
    grid = torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], -1)
    return nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
