"""The device, a card or what pretends to be one (tests/pretend_cuda), and how often the host waits for it."""

import collections
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaDeviceSynchronize")


@dataclass(frozen=True)
class Use:
    """How the host uses the device; numbers are None where they could not be found.

    Attributes:
        busy: milliseconds that the device works.
        kernels: and copies that it runs.
        waits: how often the host waits for it.
        lines: of the project, as far as they are known, with how often each of them waits.
    """

    busy: float | None
    kernels: int | None
    waits: int | None
    lines: dict[str, int]


def pretend() -> None:
    """Let torch believe in a card from here on.

    Raises:
        RuntimeError: that cannot be done here.
    """
    folder = str(ROOT / "tests" / "pretend_cuda")
    if folder not in sys.path:
        sys.path.append(folder)
    simulation = importlib.import_module("pretend_cuda")
    simulation.install()
    import querymask  # noqa: F401

    simulation.adopt_querymask()


def observe(run: Callable[[], object], pretended: bool) -> Use:
    """Of one call, which should not be the first one."""
    if pretended:
        with sys.modules["pretend_cuda"].events() as found:
            run()
        lines = collections.Counter(event.line for event in found if event.blocks)
        return Use(None, None, lines.total(), dict(lines.most_common()))
    with sync_warnings() as lines:
        run()
    return Use(*profile(run), dict(lines.most_common()))


@contextmanager
def sync_warnings() -> Iterator[collections.Counter[str]]:
    """Counts the lines of the project at which torch says that an operation waits; not all do say so."""
    lines: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            lines[project_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = note  # type: ignore[assignment]
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


def project_line() -> str:
    """The innermost line of the project on the stack."""
    import querymask

    folder = os.path.dirname(querymask.__file__)  # as the frames name it, which may be a link to ``projects``
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(folder + os.sep)]
    if not own:
        return "outside of the project"
    return f"projects/{os.path.relpath(own[-1].filename, folder)}:{own[-1].lineno}"


def profile(run: Callable[[], object]) -> tuple[float, int, int] | tuple[None, None, None]:
    """The first fields of :class:`Use` of one call; None where the profiler has no access to the card."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()  # or the last kernels would be missing
    events = profiled.events()
    counts = collections.Counter(event.name for event in events)
    if not any(name.startswith("cuda") for name in counts):
        return None, None, None
    on_card = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    milliseconds = sum(event.time_range.elapsed_us() for event in on_card) / 1e3
    # Once here, and the profiler itself waits for the device when it stops
    waits = sum(counts[name] for name in WAITS) - min(counts["cudaDeviceSynchronize"], 2)
    return milliseconds, len(on_card), waits
