"""What measurements on a machine share: time, peak memory, and on what they were measured."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from querymask.common.ops.extension import EXTENSION

L2_BYTES = 256 << 20
"""More than the caches of any GPU hold."""
HIGHEST_CLOCK = 2e9
"""Of GPUs, in Hz; a slower one only waits longer."""


def median_time(run: Callable[[], object], device: str, repeat: int, warmup: int = 3) -> float:
    """Median milliseconds of one run after some for warming up."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeat):
        if device == "cuda":
            times.append(event_time(run))
        else:
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            begin = clock()
            run()
            times.append(1e3 * (clock() - begin))
    return statistics.median(times)


def device_time(run: Callable[[], object], device: str, repeat: int, warmup: int = 3) -> float:
    """Median milliseconds that the device works on one run, which must not wait for it; on the CPU :func:`median_time`.

    A GPU is kept busy until the host has called all of the run, which is otherwise what small operators are timed by,
    and finds nothing in its caches.
    """
    if device != "cuda":
        return median_time(run, device, repeat, warmup)
    host = calling_time(run, max(warmup, 1))
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(repeat):
        flush.zero_()
        torch.cuda._sleep(int(HIGHEST_CLOCK * (2 * host + 1e-4)))
        times.append(event_time(run))
    return statistics.median(times)


def event_time(run: Callable[[], object]) -> float:
    """Milliseconds of the GPU from what it was given before the run to the run's end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def calling_time(run: Callable[[], object], repeat: int) -> float:
    """The longest seconds that the host takes for one run but the first, without what the GPU takes."""
    times = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return max(times[1:])


def peak_memory(run: Callable[[], object], device: str) -> float:
    """MiB that one run takes at its peak beyond what was there before.

    On the CPU it is read off the resident set, which memory that other models have left in the process makes too low.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if platform.system() != "Linux":
        return float("nan")
    libc = ctypes.CDLL(None)
    m_mmap_threshold = -3
    # Freed blocks are given back at once, so that the resident set is what is in use
    libc.mallopt(m_mmap_threshold, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 2**10


@dataclass(frozen=True)
class PassCosts:
    """Milliseconds of a forward pass and of one with its backward pass, and MiB at their peaks."""

    forward: float
    both: float
    forward_memory: float
    both_memory: float


def pass_costs(
    forward: Callable[[], object], both: Callable[[], object], device: str, repeat: int, warmup: int = 3
) -> tuple[float, float, float, float]:
    """The fields of :class:`PassCosts`, on a GPU its own time (:func:`device_time`)."""
    times = [device_time(run, device, repeat, warmup) for run in (forward, both)]
    return *times, peak_memory(forward, device), peak_memory(both, device)


def resident(field: str) -> int:
    """A field of the process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine(device: str) -> str:
    """The device, the number of threads, and what was measured with."""
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        where = f"{models[0] if models else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
        clock = "CPU time" if torch.get_num_threads() == 1 else "wall time"
        where += f", {torch.get_num_threads()} thread(s), {clock}"
    built = EXTENSION.error or ", ".join(f"{key} {text}" for key, text in EXTENSION.build.items())
    return f"{where}. torch {torch.__version__}. Extension: {built}."
