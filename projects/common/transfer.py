"""Copies from the host to the model's device that do not make the host wait for a GPU: those from pinned memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. On a GPU the copy may still be under way, which what is computed from it waits for."""
    if device.type != "cuda" or values.device.type != "cpu" or torch.jit.is_tracing():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def numbers_to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, or sequences of equal length of them, as a tensor on the device. See :func:`to_device`."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def masks_to_device(masks: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Masks (n, H, W) bool on the device; a GPU gets them as bits, an eighth of the bytes. See :func:`to_device`."""
    if device.type != "cuda" or masks.device.type != "cpu" or torch.jit.is_tracing():
        return masks.to(device)
    packed = torch.from_numpy(np.packbits(masks.numpy(), axis=None, bitorder="little"))
    unpacked = to_device(packed, device)[:, None].bitwise_right_shift(_bits(device)).bitwise_and_(1).to(torch.bool)
    return unpacked.flatten()[: masks.numel()].view(masks.shape)


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def instances_to_device(instances: Instances, device: torch.device) -> Instances:
    """The fields that are tensors, boxes or bitmasks on the device, others as they are. See :func:`to_device`."""
    fields = {}
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(to_device(value.tensor, device))
        elif isinstance(value, BitMasks):
            value = BitMasks(masks_to_device(value.tensor, device))
        elif isinstance(value, torch.Tensor):
            value = to_device(value, device)
        fields[name] = value
    return Instances(instances.image_size, **fields)
