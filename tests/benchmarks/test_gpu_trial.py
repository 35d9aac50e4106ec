"""``benchmarks/gpu.py --pretend``: every part runs on a pretended card, at tiny sizes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tool_loader import ROOT, load_tool

MODELS = ("SOLQ", "ISDA", "ISTR", "EffSeg")


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and report of all parts on the pretended card."""
    sys.path.append(str(ROOT / "tests" / "pretend_cuda"))
    pretend_cuda = pytest.importorskip("pretend_cuda")
    if reason := pretend_cuda.missing():
        pytest.skip(f"no pretended GPU: {reason}")
    folder = tmp_path_factory.mktemp("gpu")
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--pretend",
        "--same-process",
        "--minutes",
        "60",
        "--out",
        str(folder / "out"),
    ]
    environment = os.environ | {"DETECTRON2_DATASETS": str(folder / "data"), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    return json.loads((folder / "out" / "results.json").read_text()), (folder / "out" / "report.md").read_text()


def column(part: dict[str, Any], name: str, table: int = 0) -> list[Any]:
    """The cells of a column of a part's table."""
    chosen = part["tables"][table]
    index = chosen["columns"].index(name)
    return [row[index] for row in chosen["rows"]]


def test_every_part_is_done(trial: tuple[dict[str, Any], str]) -> None:
    parts, report = trial
    assert set(parts) == {"setup", *load_tool("gpu", "benchmarks").PARTS}
    for name, part in parts.items():
        assert part["state"] == "done" and not part["failures"], name
        assert f"\n## {name}\n" in report and all(table["rows"] for table in part["tables"]), name
    assert report.startswith("# Pretended GPU\n")


def test_operators_are_measured(trial: tuple[dict[str, Any], str]) -> None:
    """Forms agree with float64 as far as their type allows; those that need a card are skipped by name."""
    parts, report = trial
    errors = {"fp32": 1e-4, "TF32": 1e-4, "bf16": 0.2, "fp16": 0.05}
    for name, forms in (("msda", 5), ("sps", 4)):
        for table in parts[name]["tables"]:
            precision = table["title"].partition("; ")[0].rpartition(", ")[2]
            assert len(table["rows"]) == forms
            for row in table["rows"]:
                if str(row[1]).startswith("skipped"):
                    assert row[0] in ("grid_sample, torch.compile", "one thread per channel")
                    continue
                assert row[1] > 0 and row[2] > 0 and float(row[7]) < errors[precision], (table["title"], row)
    assert "| one thread per channel | skipped: the device is pretended |" in report
    assert column(parts["tests"], "outcome")[0] == "passed" and column(parts["tests"], "number")[0] > 0
    modes = parts["deterministic"]["tables"][0]
    assert {row[2] for row in modes["rows"]} == {"equal"}  # the pretended card computes on the CPU
    assert column(parts["sanitizer"], "outcome")[-1] == "32 calls made"
    assert column(parts["counters"], "kernel") == ["2 calls made", "2 calls made"]


def test_models_are_measured(trial: tuple[dict[str, Any], str]) -> None:
    parts = trial[0]
    eager = parts["models"]["tables"][0]
    assert [row[:2] for row in eager["rows"]] == [[model, name] for model in MODELS for name in ("fp32", "bf16")]
    for row in eager["rows"]:
        cells = dict(zip(eager["columns"], row))
        assert cells["step ms"] > 0 and cells["inference ms"] > 0, row
        assert cells["images/s"] == pytest.approx(2000 / cells["step ms"]), row
    lines = parts["models"]["tables"][1]["rows"]
    for model in MODELS:
        (row,) = [row for row in eager["rows"] if row[:2] == [model, "fp32"]]
        waits = row[eager["columns"].index("waits")]
        assert waits == sum(row[3] for row in lines if row[:2] == [model, "training"])
        assert waits > 0  # the assignment is made by the host
    assert all(str(row[2]).startswith("skipped") for row in parts["compiled"]["tables"][0]["rows"])
    *graphs, effseg = parts["graphs"]["tables"][0]["rows"]
    assert len(graphs) == 6 and all(row[2] > 0 for row in graphs) and str(effseg[2]).startswith("not available")


def test_trainings_run(trial: tuple[dict[str, Any], str]) -> None:
    parts = trial[0]
    assert all(rate > 0 for name in ("loader images/s", "training images/s") for rate in column(parts["loader"], name))
    rows = dict(parts["training"]["tables"][0]["rows"])
    assert rows["iterations"] == 2 and 0 <= rows["box AP50"] <= 100
