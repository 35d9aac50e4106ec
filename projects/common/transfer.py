"""Copies between the host and the model's device that do not make the host wait for a GPU: by way of pinned memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from querymask.common.boxes import unrounded_boxes


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. On a GPU the copy may still be under way, which what is computed from it waits for."""
    if _copies_plainly(values, device):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _copies_plainly(values: torch.Tensor, device: torch.device) -> bool:
    """Whether there is nothing to pin. Nothing that traces needs it, and torch.export stops at it."""
    if device.type != "cuda" or values.device.type != "cpu":
        return True
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


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


def kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep the constants that ``make(*key, dtype, device)`` gives, which every layer would make again in every call.

    What is decorated is called with ``like=``, a tensor of this type and on this device, instead, or with another
    ``dtype=``. Not kept are a tracer's tensors, and those of a CUDA graph, which must not read what is dropped one day.
    """
    keeping = lru_cache(maxsize=64)(torch.inference_mode(False)(make))  # those of inference could not be trained with

    @wraps(make)
    def get(*key: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        plain = type(like) is torch.Tensor and not torch.compiler.is_compiling() and not capturing()
        return (keeping if plain else make)(*key, dtype or like.dtype, like.device)

    return get


@kept
def kept_numbers(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Constants on the device, from tuples of numbers: copied once."""
    return constants_to_device(values, dtype, device)


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


@dataclass
class PackedMasks:
    """Masks of an image as bits, an eighth of the bytes; the field ``gt_masks`` of instances on their way to a GPU.

    Attributes:
        bits: (ceil(n * H * W / 8),) uint8, the first pixel in the lowest bit.
        shape: (n, H, W).
    """

    bits: torch.Tensor
    shape: tuple[int, int, int]

    @classmethod
    def pack(cls, masks: torch.Tensor) -> "PackedMasks":
        """Masks (n, H, W) bool on the host."""
        return cls(torch.from_numpy(np.packbits(masks.numpy(), axis=None, bitorder="little")), tuple(masks.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def pin_memory(self) -> "PackedMasks":
        """The same, from where a copy to a GPU makes nothing wait."""
        return PackedMasks(self.bits.pin_memory(), self.shape)

    def unpack(self, device: torch.device) -> torch.Tensor:
        """(n, H, W) bool on the device. See :func:`to_device`."""
        pixels = to_device(self.bits, device)[:, None].bitwise_right_shift(_bits(device)).bitwise_and_(1).to(torch.bool)
        return pixels.flatten()[: math.prod(self.shape)].view(self.shape)


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def masks_to_device(masks: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Masks (n, H, W) bool on the device; a GPU gets them as bits. See :func:`to_device`."""
    if _copies_plainly(masks, device):
        return masks.to(device)
    return PackedMasks.pack(masks).unpack(device)


def instances_to_device(instances: Instances, device: torch.device) -> Instances:
    """The fields that are tensors, boxes or bitmasks on the device, others as they are. See :func:`to_device`."""
    fields = {}
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = unrounded_boxes(to_device(value.tensor, device))
        elif isinstance(value, BitMasks):
            value = BitMasks(masks_to_device(value.tensor, device))
        elif isinstance(value, PackedMasks):
            value = BitMasks(value.unpack(device))
        elif isinstance(value, torch.Tensor):
            value = to_device(value, device)
        fields[name] = value
    return Instances(instances.image_size, **fields)


def instances_to_host(instances: Instances) -> Instances:
    """Detections on the host; a GPU is waited for once.

    Masks (n, H, W) of a GPU are copied column by column, as run lengths are counted: transposed there, which takes a
    host longer than counting. As bits they would be copied faster, but unpacking costs a host more than that.
    """
    copies = {}
    for name, value in instances.get_fields().items():
        values = value.tensor if isinstance(value, Boxes) else value
        if isinstance(values, torch.Tensor) and values.is_cuda:
            is_mask = values.dtype == torch.bool and values.dim() == 3
            copies[name] = HostCopy(values.transpose(1, 2).contiguous()) if is_mask else HostCopy(values)
    fields = instances.get_fields()
    for name, copied in reversed(copies.items()):  # after the last one, the others are there
        values = copied.read()
        is_mask = values.dtype == torch.bool and values.dim() == 3
        values = values.transpose(1, 2) if is_mask else values
        fields = {**fields, name: Boxes(values) if isinstance(fields[name], Boxes) else values}
    return Instances(instances.image_size, **fields)


class HostBatch(list):
    """Inputs of a model (Detectron2's dictionaries), which a data loader can put into pinned memory."""

    @classmethod
    def packed(cls, batch: Sequence[dict[str, Any]]) -> "HostBatch":
        """The batch with bitmasks as bits."""
        return cls(_with_instances(item, _packed) for item in batch)

    def pin_memory(self) -> "HostBatch":
        """The same, from where copies to a GPU make nothing wait; called by the loader's own thread."""
        batch = HostBatch()
        for item in self:
            item = _with_instances(item, _pinned)
            batch.append({key: x.pin_memory() if isinstance(x, torch.Tensor) else x for key, x in item.items()})
        return batch


def _with_instances(item: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The item with its instances' fields changed."""
    item = dict(item)
    if "instances" in item:
        fields = {name: change(value) for name, value in item["instances"].get_fields().items()}
        item["instances"] = Instances(item["instances"].image_size, **fields)
    return item


def _packed(value: Any) -> Any:
    return PackedMasks.pack(value.tensor) if isinstance(value, BitMasks) else value


def _pinned(value: Any) -> Any:
    if isinstance(value, (Boxes, BitMasks)):
        return type(value)(value.tensor.pin_memory())
    return value.pin_memory() if isinstance(value, (torch.Tensor, PackedMasks)) else value
