"""What stays in full precision under autocast: positions, mask codings, matching costs and losses."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations compute in the types of their inputs."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
