"""What bounds the kernels, by the card's own counters: calls of the operators under Nsight Compute.

The calls that are counted, of one operator: python -m gpu_parts.counters msda
"""

import csv
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_parts.checks import execute
from gpu_parts.results import Part
from gpu_parts.sizes import Sizes

PARTS = Path(__file__).resolve().parents[1]
OPERATORS = ("msda", "sps")
KERNELS = "regex:forward_kernel|backward_|joined_kernel"
COUNTERS = {
    "issue slots": "Issue Slots Busy",
    "L1": "L1/TEX Cache Throughput",
    "L2": "L2 Cache Throughput",
    "memory": "DRAM Throughput",
    "warps resident": "Achieved Occupancy",
}
"""Names of percentages, and Nsight Compute's."""

Counted = tuple[str, tuple[float, ...]]
"""A kernel's name; its microseconds, ``COUNTERS`` and, in percent, how long multiprocessors work on average."""


def run(part: Part, sizes: Sizes) -> None:
    """Time and counters of the operators' main kernels, both passes in fp32 (SPS: TF32) and bf16."""
    part.note(
        f"Single calls with cold caches: MSDA of an encoder layer at {sizes.images[0]} with {sizes.batch} images, SPS "
        f"with {sizes.active} active cells, as in `benchmarks/`. Percent of what the card can do; of L1 while the "
        "multiprocessors work. At work: the multiprocessors, on average, of the time."
    )
    row = part.table("Counters", "operator", "kernel", "us", *COUNTERS, "at work")
    program = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    for operator in OPERATORS:
        if sizes.pretended:
            row(operator, f"{make_calls(operator, sizes)} calls made")
        elif not os.access(program, os.X_OK):
            row(operator, "skipped: there is no Nsight Compute (ncu)")
        elif not part.is_over(row, operator):
            with part.attempt(operator, row, operator):
                for kernel, cells in count(program, operator, part.time_left()):
                    row(operator, kernel, *cells)


def count(program: str, operator: str, seconds: float) -> list[Counted]:
    """What ``read`` finds of an operator.

    Raises:
        RuntimeError: Nsight Compute failed, took longer than that, or saw no kernel.
    """
    options = ["--clock-control", "none", "--profile-from-start", "off", "--set", "full", "--page", "details", "--csv"]
    command = [program, *options, "-k", KERNELS, sys.executable, "-m", "gpu_parts.counters", operator]
    status, output = execute(command, seconds, PYTHONPATH=os.pathsep.join([str(PARTS), *sys.path]))
    found = list(read(output)) if status == 0 else []
    if not found:
        ending = "was stopped when its time was up" if status is None else f"ended with status {status} and no counters"
        raise RuntimeError(f"{program} {ending}\n{output[-20000:]}")
    return found


def read(output: str) -> Iterator[Counted]:
    """What is counted of each kernel.

    Args:
        output: what ``ncu --page details --csv`` writes.
    """
    calls: dict[str, dict[str, str]] = {}
    for line in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        call = calls.setdefault(line["ID"], {"name": line["Kernel Name"]})
        if line["Metric Name"]:
            # Some names occur in several units; times are in nanoseconds
            call.setdefault(
                f"{line['Metric Name']} {line['Metric Unit']}".strip(), line["Metric Value"].replace(",", "")
            )
    for call in calls.values():
        name = re.sub(r"^void |<?unnamed>::|\w+::", "", call["name"].partition("(")[0])
        percentages = [float(call[f"{counter} %"]) for counter in COUNTERS.values()]
        at_work = 100 * float(call["SM Active Cycles cycle"]) / float(call["Elapsed Cycles cycle"])
        yield name, (float(call["Duration ns"]) / 1e3, *percentages, at_work)


def make_calls(operator: str, sizes: Sizes) -> int:
    """Make the calls of an operator, the second time between the marks of the profiler; returns how many."""
    import torch

    calls = list((msda_calls if operator == "msda" else sps_calls)(sizes))
    for marked in (False, True):
        torch.cuda.synchronize()
        if marked and not sizes.pretended:
            torch.cuda.profiler.start()
        for call in calls:
            call()
        torch.cuda.synchronize()
        if marked and not sizes.pretended:
            torch.cuda.profiler.stop()
    return len(calls)


def msda_calls(sizes: Sizes) -> Iterator[Callable[[], object]]:
    """Both passes of an encoder layer."""
    import msda
    import torch

    from querymask.common.ops import multi_scale_deformable_attention

    for dtype in (torch.float32, torch.bfloat16):
        value, levels, locations, weights = msda.Case(sizes.images[0], None, sizes.batch).make(dtype, "cuda")
        inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]

        def call(inputs: list[torch.Tensor] = inputs, levels: list[tuple[int, int]] = levels) -> object:
            output = multi_scale_deformable_attention(inputs[0], levels, *inputs[1:])
            return torch.autograd.grad(output, inputs, torch.ones_like(output))

        yield call


def sps_calls(sizes: Sizes) -> Iterator[Callable[[], object]]:
    """Both passes of a convolution."""
    import sps
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    form = sps.FORMS["this operator"]
    for dtype in (torch.float32, torch.bfloat16):
        case = sps.Case(sizes.active, sizes.channels[0], 1, dtype, "cuda")
        inputs = [tensor.requires_grad_() for tensor in form.inputs(case)]

        def call(case: sps.Case = case, inputs: list[torch.Tensor] = inputs) -> object:
            output = form.run(case, *inputs)
            return torch.autograd.grad(output, inputs, torch.ones_like(output))

        yield call


if __name__ == "__main__":
    from gpu_parts.sizes import CARD

    make_calls(sys.argv[1], CARD)
