"""Ten minutes on a card: checks the kernels, measures operators and models, trains; one folder of results.

    python benchmarks/gpu.py [--minutes 10] [--parts PART ...] [--out FOLDER] [--resume] [--detectron2 PATH ...]
    python benchmarks/gpu.py --pretend          # without a card: does everything run?

Needs torch, this checkout and Detectron2, no network: Detectron2 and what it needs may be a folder of packages or of
wheels (`--detectron2`). The kernels are built first if they are not there. Each part runs in a process of its own, so
that a fault on the card ends no other, and saves what it finds row by row: FOLDER/results.json, FOLDER/report.md. What
the time does not allow is skipped by name, and done by the same command with --resume. The exit status is 1 if anything
has failed. docs/gpu.md says more.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.environment import prepare
from gpu_parts.results import Part, Results

GRACE = 30
"""Seconds that a part may take longer than it was told."""


@dataclass(frozen=True)
class Entry:
    """A part.

    Attributes:
        function: module of ``gpu_parts`` and its function.
        seconds: about how long it takes on an H100 (an estimate for the parts that docs/gpu.md says so of).
        least: with fewer seconds left it is not begun; one that can stop after any row needs only a few.
    """

    function: str
    seconds: int
    least: int


PARTS = {
    "card": Entry("card.run", 10, 10),
    "tests": Entry("checks.run_tests", 40, 40),
    "msda": Entry("operators.run_msda", 140, 20),
    "sps": Entry("operators.run_sps", 25, 15),
    "deterministic": Entry("operators.run_deterministic", 20, 15),
    "models": Entry("models.run_eager", 200, 30),
    "graphs": Entry("models.run_graphs", 30, 20),
    "training": Entry("training.run_quick", 250, 150),
    "loader": Entry("training.run_loader", 60, 30),
    "sanitizer": Entry("checks.run_sanitizer", 40, 40),
    "counters": Entry("counters.run", 60, 40),
    "compiled": Entry("models.run_compiled", 400, 90),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), metavar="FOLDER", help="default: output/gpu")
    parser.add_argument("--minutes", type=float, default=10, help="in all; default: 10")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--resume", action="store_true", help="keep the parts that FOLDER has complete results of")
    parser.add_argument("--detectron2", nargs="+", type=Path, default=[], metavar="PATH", help="folders or wheels")
    parser.add_argument("--pretend", action="store_true", help="on a simulated card with tiny sizes")
    parser.add_argument("--same-process", action="store_true", help="no process for each part")
    parser.add_argument("--worker", choices=list(PARTS), help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # for it
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    start = time.monotonic()
    args = parse_arguments(arguments)
    if args.worker:
        return work(args, args.worker, Results(args.out), args.seconds)
    results = Results(args.out, args.resume)
    setup = Part(results, "setup", 60 * args.minutes)
    with setup.attempt("setup"):
        if (missing := prepare(setup, args.detectron2, args.pretend)) is not None:
            setup.fail("setup", missing)
    setup.finish()
    if setup.record["failures"]:
        return 1
    for name in args.parts:
        if args.resume and results.parts.get(name, {}).get("state") == "done":
            print(f"{name}: done before")
            continue
        left = 60 * args.minutes - (time.monotonic() - start)
        entry = PARTS[name]
        if left < entry.least:
            reason = f"it takes about {entry.seconds} s, at least {entry.least}, and {max(left, 0):.0f} are left"
            results.put(name, state="skipped", reason=reason, failures=[])
            print(f"{name}: skipped: {reason}")
            continue
        print(f"{name}: about {entry.seconds} s, {left:.0f} s are left", flush=True)
        if args.same_process:
            work(args, name, results, left)
        else:
            start_worker(args, name, results, left)
    failed = results.failed
    print(f"{args.out / 'report.md'}: " + (f"failures in {', '.join(failed)}" if failed else "no failures"))
    return 1 if failed else 0


def work(args: argparse.Namespace, name: str, results: Results, seconds: float) -> int:
    """Run a part in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    part = Part(results, name, seconds)
    with part.attempt(name):
        from gpu_parts import device, sizes

        if args.pretend:
            device.pretend()
        import torch

        part.record["device"] = torch.cuda.get_device_name()
        module, function = PARTS[name].function.split(".")
        chosen = sizes.TRIAL if args.pretend else sizes.CARD
        getattr(importlib.import_module(f"gpu_parts.{module}"), function)(part, chosen)
    part.finish()
    return 1 if part.record["failures"] else 0


def start_worker(args: argparse.Namespace, name: str, results: Results, seconds: float) -> None:
    """Run a part in a process of its own, and see that it ends."""
    command = [sys.executable, __file__, "--worker", name, "--seconds", str(seconds), "--out", str(args.out)]
    process = subprocess.Popen(
        command + ["--pretend"] * args.pretend,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all that it starts can be ended with it
    )
    assert process.stdout is not None
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds + GRACE, kill)
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    timer.cancel()
    results.read()
    record = results.parts.get(name, {})
    if record.get("state") == "running" or not record:
        what = "it was stopped" if killed.is_set() else f"its process ended with status {status}"
        failures = record.get("failures", []) + [{"what": what, "text": "".join(lines[-60:])}]
        results.put(name, state="failed", reason=what, failures=failures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.exit(1)
