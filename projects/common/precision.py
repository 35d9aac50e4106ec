"""Mixed precision: the type that autocast computes in, and what stays in full precision under it: positions, sums along
the layers of transformers, mask codings, matching costs and losses.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from querymask.common.ops.autocast import autocast_type

PRECISIONS: dict[str, torch.dtype | None] = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str, device: str) -> torch.dtype:
    """The type that ``SOLVER.AMP.PRECISION`` names.

    Args:
        precision: "bf16", "fp16", or "auto": bf16 where the device computes in it, else fp16.
        device: such as "cuda" or "cpu".

    Raises:
        ValueError: there is no such precision, or the device does not compute in it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    kind = torch.device(device).type
    if kind == "cpu" and precision == "fp16":
        raise ValueError("SOLVER.AMP.PRECISION is 'fp16', which training on a CPU does not have: set it bf16 or auto")
    has_bf16 = kind != "cuda" or _gpu_has_bf16(torch.device(device))
    if precision == "bf16" and not has_bf16:
        raise ValueError(
            f"SOLVER.AMP.PRECISION is 'bf16', which {torch.cuda.get_device_name(device)} does not compute in: set it "
            "fp16 or auto"
        )
    return PRECISIONS[precision] or (torch.bfloat16 if has_bf16 else torch.float16)


def _gpu_has_bf16(device: torch.device) -> bool:
    """Whether it computes in bf16; ``torch.cuda.is_bf16_supported`` is also true of GPUs that emulate it, slowly."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations compute in the types of their inputs."""
    if autocast_type(device.type) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
