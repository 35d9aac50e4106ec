"""Whether the kernels are right: the operators' tests, and a few calls under compute-sanitizer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_parts.results import Part
from gpu_parts.sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
PARTS = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
FOUND = 9
"""Exit status of compute-sanitizer that says it has found something."""


def execute(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """The exit status of a command, None if it took too long, and what it wrote."""
    environment = os.environ | {"QUERYMASK_REQUIRE_EXTENSION": "1"} | variables
    try:
        found = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return found.returncode, found.stdout.decode(errors="replace")


def run_tests(part: Part, sizes: Sizes) -> None:
    """The tests of the operators on the card, by pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "--tb=short", "-p", "no:cacheprovider"]
    variables = {}
    if sizes.pretended:
        command = [*command, "-k", "test_pixel_centres", "-p", "pretend_plugin"]
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "pretend_cuda"), *sys.path])
        part.note("One test on the pretended card.")
    else:
        command = [*command, "-k", "cuda"]
        part.note("Those with `cuda` in their name; with CPU kernels, the same tests run elsewhere.")
    status, output = execute(command, max(part.time_left(), 1), **variables)
    row = part.table("pytest", "outcome", "number")
    for number, outcome in re.findall(r"(\d+)(?:/\d+)? (passed|failed|error|skipped|xfailed|deselected)", output):
        row(outcome, int(number))
    if status is None:
        part.fail("pytest", f"it was stopped when its time was up\n{output[-4000:]}")
    elif status != 0:
        part.fail("pytest", output[-20000:])


def run_sanitizer(part: Part, sizes: Sizes) -> None:
    """Calls of every kernel at odd sizes under compute-sanitizer; without it, the calls alone."""
    row = part.table("compute-sanitizer", "tool", "outcome")
    calls = [sys.executable, "-m", "gpu_parts.sanitized"]
    # Without torch's pool of memory, every tensor's end is the end of an allocation
    variables = {"PYTHONPATH": os.pathsep.join([str(PARTS), *sys.path]), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in TOOLS:
        if sizes.pretended or not os.access(program, os.X_OK):
            row(tool, "skipped: " + ("the device is pretended" if sizes.pretended else "there is no compute-sanitizer"))
            continue
        if part.is_over(row, tool):
            continue
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *calls]
        status, output = execute(command, part.time_left(), **variables)
        if status is None:
            row(tool, f"stopped when its time was up, after {len(re.findall('^done: ', output, re.M))} calls")
        elif status == 0:
            row(tool, f"nothing found in {len(re.findall('^done: ', output, re.M))} calls")
        elif status == FOUND:
            row(tool, "found something")
            part.fail(tool, output[:20000])
        else:
            row(tool, f"failed with status {status}")
            part.fail(tool, output[-20000:])
    if sizes.pretended:
        from gpu_parts import sanitized

        row("none", f"{sanitized.main()} calls made")
