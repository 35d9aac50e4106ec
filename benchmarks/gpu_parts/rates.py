"""How fast a card can move bytes and multiply, for the least times that its work could take."""

import subprocess
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from querymask.common.measuring import device_time


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOPs per second.

    Attributes:
        memory: copies through the card's memory, bytes read and written together.
        l1, l2: reads through the caches.
        products: matrix products, by the type that they are computed in.
        source: where the numbers are from.
    """

    memory: float
    l1: float
    l2: float
    products: dict[str, float]
    source: str


# Memory as measured; 128 bytes a clock and multiprocessor through L1 at 1.755 GHz; the rest as published for the H200
H200 = Rates(
    4.3e12, 29.7e12, 5.5e12, {"fp32": 67e12, "TF32": 494e12, "bf16": 989e12, "fp16": 989e12}, "an H200, as published"
)
L1_BYTES_PER_CLOCK = 128


def measure_rates(mebibytes: int, side: int, repeat: int) -> Rates:
    """What this card reaches: a copy of ``mebibytes`` MiB, and products of square matrices of ``side`` rows.

    L1 is computed from the highest clock, and L2 is the H200's scaled by multiprocessors and clock, as no simple
    program measures them.
    """
    memory = copy_rate(mebibytes, repeat)
    products = {}
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
    ):
        a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        before = set_tf32(tf32)
        products[name] = 2 * side**3 / (device_time(lambda a=a, b=b: a @ b, "cuda", repeat) / 1e3)
        set_tf32(before)
    cycles = torch.cuda.get_device_properties(0).multi_processor_count * highest_clock()
    l1 = L1_BYTES_PER_CLOCK * cycles
    return replace(H200, memory=memory, products=products, l1=l1, l2=H200.l2 * l1 / H200.l1, source="this card")


def copy_rate(mebibytes: int, repeat: int) -> float:
    """Bytes read and written in a second by copies within the card's memory."""
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (device_time(lambda: target.copy_(source), "cuda", repeat) / 1e3)


def highest_clock() -> float:
    """Of the multiprocessors, in Hz; the H200's where nvidia-smi does not tell."""
    try:
        command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
        return 1e6 * float(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 1.755e9


def set_tf32(on: bool) -> bool:
    """Whether products and convolutions of float32 may be rounded to TF32; returns what it was."""
    before = torch.get_float32_matmul_precision() != "highest"
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    return before


def element_size(dtype: torch.dtype) -> int:
    """Bytes."""
    return Tensor.element_size(torch.empty(0, dtype=dtype))
