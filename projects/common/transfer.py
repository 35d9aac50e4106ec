"""Copies between the host and the model's device that do not make the host wait for a GPU: by way of pinned memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from querymask.common.boxes import unrounded_boxes


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. On a GPU the copy may still be under way, which what is computed from it waits for."""
    if device.type != "cuda" or values.device.type != "cpu" or torch.jit.is_tracing():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def numbers_to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, or sequences of equal length of them, as a tensor on the device. See :func:`to_device`."""
    return to_device(torch.tensor(values, dtype=dtype), device)


_captures = 0


@contextmanager
def capture() -> Iterator[None]:
    """Inside, a CUDA graph is captured: see :func:`constants_to_device`."""
    global _captures
    _captures += 1
    try:
        yield
    finally:
        _captures -= 1


def capturing() -> bool:
    """Whether inside of :func:`capture`."""
    return _captures > 0


def constants_to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """:func:`numbers_to_device` of numbers that follow from the shapes of tensors alone.

    While a CUDA graph is captured they become part of it: nothing can be copied to it from the host.
    """
    if not capturing():
        return numbers_to_device(values, dtype, device)
    numbers = torch.tensor(values, dtype=dtype)
    constants = torch.empty_like(numbers, device=device)
    for place, number in zip(constants.view(-1).split(1), numbers.flatten().tolist(), strict=True):
        place.fill_(number)
    return constants


class HostCopy:
    """A tensor on its way to the host.

    Args:
        values: on any device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values.detach()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> torch.Tensor:
        """The tensor on the host; waits unless the GPU is done with it already."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return self._values


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
            value = unrounded_boxes(to_device(value.tensor, device))
        elif isinstance(value, BitMasks):
            value = BitMasks(masks_to_device(value.tensor, device))
        elif isinstance(value, torch.Tensor):
            value = to_device(value, device)
        fields[name] = value
    return Instances(instances.image_size, **fields)
