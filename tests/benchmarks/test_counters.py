"""The part of ``benchmarks/gpu.py`` that reads the card's counters, on what Nsight Compute wrote of an H200."""

import json
from pathlib import Path

import pytest
from tool_loader import load_tool

load_tool("gpu", "benchmarks")  # its folder can be imported from after it
from gpu_parts import counters  # noqa: E402
from gpu_parts.results import Part, Results  # noqa: E402
from gpu_parts.sizes import CARD  # noqa: E402

KERNELS = {
    "0": "void forward_kernel<c10::BFloat16, float, unsigned int, 8, 4>(Geometry, const T1 *, T1 *)",
    "1": "void <unnamed>::backward_features_kernel<float>(<unnamed>::Product, const long *, int, int, float *)",
}
METRICS = (
    ("Elapsed Cycles", "cycle", "239,907", "309,496"),
    ("Memory Throughput", "%", "77.59", "59.19"),
    ("DRAM Throughput", "%", "12.94", "7.51"),
    ("Duration", "ns", "122,432", "170,656"),
    ("L1/TEX Cache Throughput", "%", "81.56", "49.88"),
    ("L2 Cache Throughput", "%", "30.72", "59.19"),
    ("SM Active Cycles", "cycle", "227,266.27", "296,935.61"),
    ("Issue Slots Busy", "%", "62.71", "29.35"),
    ("Memory Throughput", "byte/s", "622,189,231,573.44", "361,408,588,036.75"),
    ("Achieved Occupancy", "%", "44.71", "12.07"),
)
FOUND = [
    ["forward_kernel<BFloat16, float, unsigned int, 8, 4>", 122.432, 62.71, 81.56, 30.72, 12.94, 44.71, 94.7310],
    ["backward_features_kernel<float>", 170.656, 29.35, 49.88, 59.19, 7.51, 12.07, 95.9417],
]


def written() -> str:
    """A log and a table."""
    names = ["ID", "Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule Name"]
    lines = ["==PROF== Connected to process 562", names]
    for place, (number, kernel) in enumerate(KERNELS.items()):
        lines += [[number, kernel, "", name, unit, values[place], ""] for name, unit, *values in METRICS]
        lines += [[number, kernel, "SpeedOfLight", "", "", "", "SOLBottleneck"]]
    lines += ["==PROF== Disconnected from process 562"]
    return "\n".join(line if isinstance(line, str) else ",".join(f'"{cell}"' for cell in line) for line in lines)


def test_read() -> None:
    for (name, values), (expected, *cells) in zip(counters.read(written()), FOUND, strict=True):
        assert name == expected and values == pytest.approx(cells)


@pytest.mark.parametrize("fault", [None, "status", "no kernel", "time"])
def test_run(fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands in for Nsight Compute, and what it may do wrong."""
    program, output = tmp_path / "ncu", tmp_path / "output"
    output.write_text("==WARNING== No kernels were profiled." if fault == "no kernel" else written())
    ending = {"status": "exit 3", "time": "exec sleep 60"}.get(fault or "", "exit 0")
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {output}\n{ending}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    results = Results(tmp_path / "out")
    part = Part(results, "counters", 40)
    monkeypatch.setattr(part, "time_left", lambda: 1.0 if fault == "time" else 40.0)
    counters.run(part, CARD)
    part.finish()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["counters"]
    (table,) = found["tables"]
    if fault is None:
        assert [row[:2] for row in table["rows"]] == [[name, row[0]] for name in ("msda", "sps") for row in FOUND]
        assert not found["failures"] and "gpu_parts.counters sps" in (tmp_path / "arguments").read_text()
    else:
        assert len(found["failures"]) == 2
        reason = {"status": "status 3", "no kernel": "No kernels were profiled", "time": "its time was up"}[fault]
        assert reason in str(found["failures"])
