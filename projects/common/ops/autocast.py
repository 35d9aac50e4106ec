"""Autocast for the PyTorch forms, as ``at::autocast`` does it for the kernels."""

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Those that autocast knows: torch.amp.is_autocast_available cannot be exported before 2.7 and compiled in 2.11."""


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast asks for on a type of device; None where it is off."""
    if device in DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor`` in ``dtype``; float64, other than floating-point numbers, and None stay."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
