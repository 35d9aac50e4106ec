"""The report on the installation: it tells what is there, and survives whatever is broken."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import querymask
from querymask import collect_env
from querymask.common import ops
from querymask.common.ops import extension
from querymask.common.ops.extension import REMEDY, REQUIRE_VARIABLE, Extension


def flat(report: dict[str, list[collect_env.Row]]) -> dict[str, str]:
    return {name: text for rows in report.values() for name, text in rows}


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "EXTENSION", Extension(None, {}, f"there is no extension here. {REMEDY}"))
    monkeypatch.setattr(extension, "_warned", set())
    monkeypatch.delenv(REQUIRE_VARIABLE, raising=False)


def test_tells_versions_paths_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/some/where")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    report, sound = collect_env.collect()
    rows = flat(report)
    assert sound
    assert torch.__version__ in rows["torch"]
    assert (
        querymask.__version__ in rows["version"] and str(Path(querymask.__file__).resolve().parent) in rows["version"]
    )
    assert rows["DETECTRON2_DATASETS"] == "/some/where"
    assert rows["TORCH_CUDA_ARCH_LIST"].startswith("not set")
    assert rows["C++ compiler"] == "not found"
    assert rows["cpu"].startswith("OK")
    assert not [text for text in rows.values() if "Error" in text]
    lines = collect_env.format_report(report).splitlines()
    for name, text in rows.items():
        assert any(line.startswith(f"{name} ") and line.endswith(text) for line in lines)


@pytest.mark.skipif(extension.EXTENSION.error is not None, reason="the extension is not built")
def test_tells_what_the_extension_was_built_for() -> None:
    rows = flat(collect_env.collect()[0])
    assert rows["extension"] == str(extension.EXTENSION.path)
    assert f"torch {extension.EXTENSION.build['torch']}" in rows["built for"]
    assert extension.EXTENSION.build["compiler"] in rows["built for"]
    assert rows["in use"] == "yes"
    assert rows["serves cpu"] == "compiled kernels"


@pytest.mark.usefixtures("without_extension")
def test_tells_why_the_extension_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, sound = collect_env.collect()
    rows = flat(report)
    assert sound
    assert rows["extension"] == "none"
    assert rows["in use"] == f"no: there is no extension here. {REMEDY}"
    assert rows["serves cpu"].startswith("PyTorch")
    assert rows["cpu"].startswith("OK: PyTorch")

    monkeypatch.setenv(REQUIRE_VARIABLE, "1")
    report, sound = collect_env.collect()
    assert not sound
    assert flat(report)["cpu"].startswith("RuntimeError") and REQUIRE_VARIABLE in flat(report)["cpu"]


@pytest.mark.parametrize("spoil", [lambda x: 1.001 * x, lambda x: x * float("nan")], ids=["off", "nan"])
def test_wrong_results_are_seen(
    spoil: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    operator = ops.multi_scale_deformable_attention
    monkeypatch.setattr(ops, "multi_scale_deformable_attention", lambda *inputs: spoil(operator(*inputs)))
    assert collect_env.self_check("cpu").startswith("wrong")
    assert collect_env.main() == 1
    assert "wrong: " in capsys.readouterr().out


def test_survives_a_detectron2_that_does_not_import(tmp_path: Path) -> None:
    """Started by its path, since ``import querymask`` fails."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('libsomething is missing')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        [sys.executable, collect_env.__file__],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    rows = {line[:27].strip(): line[27:].strip() for line in finished.stdout.splitlines()}
    assert rows["Detectron2"].endswith("libsomething is missing"), finished.stdout + finished.stderr
    assert rows["extension"].endswith("libsomething is missing")
    assert torch.__version__ in rows["torch"]
    assert finished.returncode == 1 and not finished.stderr
