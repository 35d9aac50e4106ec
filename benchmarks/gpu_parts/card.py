"""What the card is, what this Python has to use it with, and the rates that bounds are computed from."""

import shutil
import subprocess
from dataclasses import asdict
from typing import Any

import torch

from gpu_parts.per_channel import find_nvcc
from gpu_parts.rates import H200, Rates, measure_rates
from gpu_parts.results import Part, Results
from gpu_parts.sizes import Sizes
from querymask.common.measuring import machine


def run(part: Part, sizes: Sizes) -> None:
    """Tables of facts and of rates; the rates are kept for the other parts."""
    properties = torch.cuda.get_device_properties(0)
    fact = part.table("What it is", "", "")
    fact("device", torch.cuda.get_device_name())
    fact("compute capability", f"{properties.major}.{properties.minor}")
    fact("multiprocessors", properties.multi_processor_count)
    fact("memory, GiB", properties.total_memory / 2**30)
    fact("CUDA of torch", torch.version.cuda)
    fact("cuDNN", None if sizes.pretended else torch.backends.cudnn.version())
    for name, value in smi().items():
        fact(f"nvidia-smi: {name}", value)
    fact("nvcc", find_nvcc() or "not found")
    fact("compute-sanitizer", shutil.which("compute-sanitizer") or "not found")
    fact("measured with", machine("cuda"))

    rates = measure_rates(sizes.copy_mebibytes, sizes.product_side, min(sizes.repeat, 20))
    part.record["rates"] = asdict(rates)
    row = part.table("Rates", "", "this card", "H200, as published")
    row("memory, TB/s", rates.memory / 1e12, H200.memory / 1e12)
    row("L1, TB/s (from its highest clock)", rates.l1 / 1e12, H200.l1 / 1e12)
    row("L2, TB/s (as the H200's, scaled like L1)", rates.l2 / 1e12, H200.l2 / 1e12)
    for name, rate in rates.products.items():
        row(f"products in {name}, TFLOP/s", rate / 1e12, H200.products[name] / 1e12)


def smi() -> dict[str, Any]:
    """What nvidia-smi tells of the first card; empty where it is missing."""
    keys = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "ecc.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(keys, found.stdout.strip().split(", "))) if found.returncode == 0 else {}


def known_rates(results: Results) -> Rates:
    """Those that the part ``card`` has found; without it the H200's."""
    rates = results.parts.get("card", {}).get("rates")
    return Rates(**rates) if rates else H200
