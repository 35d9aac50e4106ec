"""Runs the CUDA kernels on the CPU in every way there is, for whoever changes one. See README.md.

python tests/cuda_on_cpu/check_kernels.py                          # results only
python tests/cuda_on_cpu/check_kernels.py --orders 5 --races --sanitizers
python tests/cuda_on_cpu/check_kernels.py msda,bfloat16 --csrc ../other/csrc
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import msda_cases
import sps_cases
import torch
from kernel_build import REPOSITORY, VARIANTS, Builder, missing
from kernel_mistakes import MISTAKES, Mistake, find, missing_texts
from kernel_simulation import Simulation

SUBJECTS = {"msda": msda_cases, "sps": sps_cases}
FAILURES = 3  # what a process ends with whose cases failed, but that did not crash
EXTRA_VARIANTS = [name for name in VARIANTS if name != "plain"]


def wanted_cases(words: list[str]) -> list[tuple[str, Callable[[], None]]]:
    """Cases whose name has all parts of one of the words, as ``msda,float32``; all where there is no word."""
    cases = [(f"{subject}-{name}", run) for subject, module in SUBJECTS.items() for name, run in module.cases()]
    return [(name, run) for name, run in cases if not words or any(all(p in name for p in w.split(",")) for w in words)]


def orders_of(number: int) -> list[tuple[str, int]]:
    return [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(number))][:number]


def run_cases(library: Path, orders: int, words: list[str], stop: bool) -> int:
    """Runs the cases with the library in this process. Returns the number of failures."""
    torch.set_num_threads(1)
    simulation = Simulation(library)
    cases, failures, begin = wanted_cases(words), 0, time.time()
    for order, seed in orders_of(orders):
        for name, run in cases:
            simulation.set_order(order, seed)
            print(f"case {name} ({order} {seed})", flush=True)
            problems = []
            try:
                run()
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}".partition("\nException raised from")[0]]
            problems += simulation.take_findings()
            failures += bool(problems)
            for problem in problems[:6]:
                print(f"FAILED {name} ({order} {seed}): {problem}", flush=True)
            if problems and stop:
                return failures
        print(f"  {order} {seed}: {len(cases)} cases in {time.time() - begin:.0f} s, {failures} failures", flush=True)
    return failures


def sanitizer_environment() -> dict[str, str]:
    """The sanitizers must be loaded before Python's own libraries."""
    names = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan")]
    libraries = [subprocess.run(["g++", name], capture_output=True, text=True).stdout.strip() for name in names]
    options = "detect_leaks=0:detect_stack_use_after_return=0:detect_odr_violation=0"
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


def run_variant(library: Path, variant: str, orders: int, words: list[str], quiet: bool = False) -> list[str]:
    """Runs cases in a process of its own, so that a crash is a failure, too. Returns the failures.

    ``quiet``: prints nothing, and stops at the first failure.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if variant == "sanitizers":
        environment |= sanitizer_environment()
    command = [sys.executable, __file__, "--library", str(library), "--orders", str(orders), *words]
    command += ["--stop"] if quiet else []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    case, done, failures, latest, reason = "none", 0, [], time.time(), ""
    with subprocess.Popen(command, env=environment, **streams) as process:
        for line in map(str.rstrip, process.stdout):
            if line.startswith("case "):
                case, done = line.removeprefix("case "), done + 1
            elif line.startswith("FAILED "):
                failures.append(line)
            elif not ("ERROR: " in reason or "runtime error: " in reason):  # of a sanitizer
                reason = line or reason
            if not quiet and (not line.startswith("case ") or time.time() - latest > 20):
                print(line if not line.startswith("case ") else f"  {done} cases, now {case}", flush=True)
                latest = time.time()
    if process.returncode not in (0, FAILURES):
        failures.append(f"FAILED {case}: the process ended with {process.returncode}: {reason}")
    return failures


def find_mistakes(csrc: Path, arch: int, words: list[str]) -> list[str]:
    """Plants mistakes whose name has one of the words. Returns those that no case finds."""
    if outdated := missing_texts(csrc):
        raise SystemExit(f"kernel_mistakes.py replaces texts that {csrc} no longer has: {outdated}. Write them anew.")

    names = [name for name in MISTAKES if not words or any(word in name for word in words)]
    with TemporaryDirectory() as folder:

        def failures(mistake: Mistake) -> list[str]:
            builder = Builder(csrc, mistake.variant, arch, mistake.edit)
            builder.precompile(Path(folder))
            return run_variant(builder.build(), mistake.variant, 3, list(mistake.cases), quiet=True)

        missed = find(failures, names)
    print(f"\n{len(names) - len(missed)} of {len(names)} mistakes are found", *missed, sep="\n  not found: ")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="CASE", help="only cases with all of these words, e.g. msda,float32"
    )
    parser.add_argument("--csrc", type=Path, default=REPOSITORY / "csrc", help="the sources, of any working tree")
    parser.add_argument("--arch", type=int, default=900, help="compute capability times 100: 900, 800 or 750")
    parser.add_argument("--orders", type=int, default=1, help="of threads: forward, reverse, then random ones")
    parser.add_argument("--fused", action="store_true", help="also with multiply-adds that are rounded once")
    parser.add_argument("--races", action="store_true", help="also with a search for races")
    parser.add_argument(
        "--sanitizers", action="store_true", help="also with the address and undefined-behaviour sanitizers"
    )
    parser.add_argument("--mistakes", action="store_true", help="plant mistakes: are they found?")
    parser.add_argument("--no-plain", action="store_true", help="not without any of these")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # in the process of one variant
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        failures = run_cases(arguments.library, arguments.orders, arguments.words, arguments.stop)
        sys.exit(FAILURES if failures else 0)
    if reason := missing():
        parser.error(reason)
    if arguments.mistakes:
        sys.exit(bool(find_mistakes(arguments.csrc, arguments.arch, arguments.words)))
    if not wanted_cases(arguments.words):
        parser.error(f"no case has the words {arguments.words}")
    variants = ([] if arguments.no_plain else ["plain"]) + [name for name in EXTRA_VARIANTS if getattr(arguments, name)]
    results = {}
    for variant in variants:
        begin = time.time()
        print(f"{variant}: building", flush=True)
        library = Builder(arguments.csrc, variant, arguments.arch).build()
        print(f"{variant}: built in {time.time() - begin:.0f} s, {library.name}", flush=True)
        results[variant] = run_variant(library, variant, arguments.orders, arguments.words)
    print()
    for variant, failures in results.items():
        print(f"{variant}: {len(failures) or 'no'} failures")
        for failure in failures:
            print(f"  {failure}")
    sys.exit(any(results.values()))


if __name__ == "__main__":
    main()
