"""Padding of batched images, and its masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList


def padding_mask(images: ImageList) -> torch.Tensor:
    """(B, H, W) bool, true on padding."""
    mask = torch.ones(images.tensor.shape[0], *images.tensor.shape[-2:], dtype=torch.bool, device=images.tensor.device)
    for index, (height, width) in enumerate(images.image_sizes):
        mask[index, :height, :width] = False
    return mask


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Nearest-neighbour resize of (B, H, W) bool."""
    return F.interpolate(mask[None].float(), size=tuple(size))[0].to(torch.bool)
