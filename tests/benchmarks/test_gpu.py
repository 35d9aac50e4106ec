"""``benchmarks/gpu.py``: what becomes of faults, of too little time, and without a card."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tool_loader import ROOT, load_tool


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Function (name = what the part does) that gives the script with these parts and a card that has a name."""

    def make(**functions: Callable[..., None]) -> ModuleType:
        script = load_tool("gpu", "benchmarks")
        parts = {name: script.Entry(f"fake.{name}", seconds=5, least=2) for name in functions}
        fake = ModuleType("gpu_parts.fake")
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, "gpu_parts.fake", fake)
        monkeypatch.setattr(script, "PARTS", parts)
        monkeypatch.setattr(script, "prepare", lambda *arguments: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
        return script

    return make


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_part_that_fails_ends_no_other(gpu: Callable[..., ModuleType], tmp_path: Path) -> None:
    def first(part: Any, sizes: Any) -> None:
        row = part.table("Numbers", "name", "value")
        row("one", 1.0)
        with part.attempt("two", row, "two"):
            raise ValueError("no | two\nsecond line")
        row("three", 3)

    def second(part: Any, sizes: Any) -> None:
        raise RuntimeError("the whole part")

    script = gpu(first=first, second=second, third=lambda part, sizes: part.note("was here"))
    assert script.main(["--same-process", "--out", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert [[failure["what"] for failure in found[name]["failures"]] for name in script.PARTS] == [
        ["two"],
        ["second"],
        [],
    ]
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# Card X\n")
    assert "| one | 1 |\n| two | failed: ValueError: no \\| two |\n| three | 3 |" in report
    assert "RuntimeError: the whole part" in report and "was here" in report


def test_resume_and_time(gpu: Callable[..., ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without the time a part is skipped by name; with --resume only what is not done is run."""
    calls: list[str] = []

    def first(part: Any, sizes: Any) -> None:
        calls.append("first")

    def second(part: Any, sizes: Any) -> None:
        row = part.table("Rows", "name", "value")
        part.end = 0.0
        if not part.is_over(row, "slow"):
            calls.append("second")

    script = gpu(first=first, second=second)
    assert script.main(["--same-process", "--out", str(tmp_path), "--minutes", "0.01"]) == 0
    assert calls == [] and {results(tmp_path)[name]["state"] for name in ("first", "second")} == {"skipped"}
    assert "| first | skipped: it takes about 5 s, at least 2, and " in (tmp_path / "report.md").read_text()
    for _ in range(2):
        assert script.main(["--same-process", "--out", str(tmp_path), "--resume"]) == 0
    assert calls == ["first"]
    second_part = results(tmp_path)["second"]
    assert second_part["state"] == "incomplete"
    assert second_part["tables"][0]["rows"] == [["slow", "skipped: the time is up"]]
    assert "first: done before" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs(
    gpu: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = gpu(dies=lambda part, sizes: None, hangs=lambda part, sizes: None)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\nprint('last words', flush=True)\nos.abort() if 'dies' in sys.argv else time.sleep(60)"
    )
    monkeypatch.setattr(script, "__file__", str(worker))
    monkeypatch.setattr(script, "GRACE", -5)
    assert script.main(["--out", str(tmp_path), "--minutes", "0.1"]) == 1
    found = results(tmp_path)
    assert {found[name]["state"] for name in ("dies", "hangs")} == {"failed"}
    assert found["dies"]["reason"] == "its process ended with status -6"
    assert found["hangs"]["reason"] == "it was stopped"
    assert {found[name]["failures"][0]["text"] for name in ("dies", "hangs")} == {"last words\n"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "torch sees no GPU here. A trial run without one: --pretend" in finished.stdout
    assert set(results(tmp_path)) == {"setup"}


def test_packages_from_a_folder(tmp_path: Path) -> None:
    load_tool("gpu", "benchmarks")
    from gpu_parts.environment import add_to_path

    with pytest.raises(FileNotFoundError, match="there is no wheel and no package detectron2 in it"):
        add_to_path(None, [tmp_path])
