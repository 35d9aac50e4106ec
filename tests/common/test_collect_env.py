"""The report's self-check, and that the report survives whatever is broken; its rows are tested in tests/ops."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from querymask import collect_env
from querymask.common import ops
from querymask.common.ops import extension
from querymask.common.ops.extension import REMEDY, REQUIRE_VARIABLE, Extension


@pytest.mark.parametrize("device", collect_env._devices())
def test_self_check(device: str) -> None:
    kernels = torch.device(device).type in extension.EXTENSION.device_types
    assert collect_env.self_check(device).startswith("OK with compiled" if kernels else "OK with the slower PyTorch")


def test_self_check_without_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(extension, "EXTENSION", Extension(None, {}, f"there is none. {REMEDY}"))
    monkeypatch.setattr(extension, "_warned", set())
    monkeypatch.delenv(REQUIRE_VARIABLE, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect_env.main() == 0
    assert "OK with the slower PyTorch form" in capsys.readouterr().out

    monkeypatch.setenv(REQUIRE_VARIABLE, "1")
    assert collect_env.main() == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("self-check cpu ")]
    assert "RuntimeError" in line and REMEDY in line


@pytest.mark.parametrize("spoil", [lambda x: 1.001 * x, lambda x: x * float("nan")], ids=["off", "nan"])
def test_wrong_results_are_seen(
    spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    operator = ops.multi_scale_deformable_attention
    monkeypatch.setattr(ops, "multi_scale_deformable_attention", lambda *inputs: spoil(operator(*inputs)))
    assert collect_env.main() == 1
    assert "WRONG with" in capsys.readouterr().out


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
    rows = {name: text.strip() for name, _, text in (line.partition("  ") for line in finished.stdout.splitlines())}
    for name in ("querymask", "extension", "detectron2", "self-check cpu"):
        assert rows[name] == "ImportError: libsomething is missing", finished.stdout + finished.stderr
    assert torch.__version__ in rows["torch"]
    assert finished.returncode == 1 and not finished.stderr
