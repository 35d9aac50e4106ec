"""From the images of a batch to one padded tensor, and the masks of the padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList

from querymask.common.transfer import numbers_to_device, to_device


def batch_images(
    batched_inputs: Sequence[Mapping[str, Any]], mean: torch.Tensor, std: torch.Tensor, size_divisibility: int = 0
) -> ImageList:
    """Normalise images, then pad them with zeros at the right and the bottom to one size.

    Args:
        batched_inputs: Detectron2's model inputs, with ``image`` (3, H, W).
        mean, std: (3, 1, 1), on the model's device.
        size_divisibility: height and width of the batch are multiples of it; 0: the largest height and width.
    """
    images = [(to_device(item["image"], mean.device) - mean) / std for item in batched_inputs]
    batch = ImageList.from_tensors(images, size_divisibility)
    if batch.tensor.device.type == "cpu":  # convolutions on CPU are faster so, and tokens of a map need no copy
        batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
    return batch


@dataclass(frozen=True)
class Canvas:
    """Where the images of a batch lie within its padding, as networks read it.

    Attributes:
        size: (height, width) of the batch.
        padding: (B, H, W) bool, true on padding.
        sides: (B, 4): width, height, width, height of the images without padding.
        padded: false if there is no padding.
    """

    size: tuple[int, int]
    padding: torch.Tensor
    sides: torch.Tensor
    padded: bool

    @classmethod
    def of(cls, images: ImageList) -> "Canvas":
        """That of a batch."""
        size = (images.tensor.shape[-2], images.tensor.shape[-1])
        rows = [[width, height] * 2 for height, width in images.image_sizes]
        dtype = torch.promote_types(images.tensor.dtype, torch.float32)
        return cls(
            size=size,
            padding=padding_mask(images),
            sides=numbers_to_device(rows, dtype, images.tensor.device),
            padded=has_padding(images),
        )


def padding_mask(images: ImageList) -> torch.Tensor:
    """(B, H, W) bool, true on padding."""
    mask = torch.ones(images.tensor.shape[0], *images.tensor.shape[-2:], dtype=torch.bool, device=images.tensor.device)
    for index, (height, width) in enumerate(images.image_sizes):
        mask[index, :height, :width] = False
    return mask


def has_padding(images: ImageList) -> bool:
    """Whether an image is smaller than the batch."""
    return any(tuple(size) != tuple(images.tensor.shape[-2:]) for size in images.image_sizes)


def resize_padding(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Nearest-neighbour resize of a padding mask (B, H, W)."""
    return F.interpolate(mask[None].to(torch.uint8), size=tuple(size))[0].to(torch.bool)
