"""The report for bug reports."""

from pathlib import Path

import torch

from querymask import collect_env
from querymask.common.ops import extension
from querymask.common.ops.extension import Extension


def report(capsys) -> dict[str, str]:
    collect_env.main()
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): text for name, _, text in (line.partition("  ") for line in map(str.strip, lines))}


def test_extension_in_use(capsys):
    rows = report(capsys)
    assert str(extension.EXTENSION.path) in rows["extension"]
    assert extension.EXTENSION.build["torch"] in rows["built for"]
    assert rows["in use"].strip().startswith("on cpu")
    assert torch.__version__ in rows["torch"]


def test_extension_not_in_use(capsys, monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", Extension(None, {}, "there is none. Do this."))
    rows = report(capsys)
    assert rows["extension"].strip() == "not built"
    assert rows["in use"].strip() == "NO: there is none. Do this."


def test_cuda_build(capsys, monkeypatch):
    build = {"torch": "2.15.0", "cuda": "13.0", "cuda_architectures": "8.0/9.0+PTX", "compiler": "g++", "threads": "x"}
    monkeypatch.setattr(extension, "EXTENSION", Extension(Path("_C.so"), build, None))
    rows = report(capsys)
    assert rows["built for"].strip() == "torch 2.15.0, CUDA 13.0, architectures 8.0, 9.0+PTX"
    assert rows["in use"].strip().startswith("on cpu and cuda")


def test_missing_parts(capsys, monkeypatch):
    """Neither Detectron2 nor a compiler nor a package."""
    monkeypatch.setattr("querymask.common.compat.detectron2_available", lambda: False)
    monkeypatch.setattr(collect_env, "PACKAGES", ("querymask-has-no-such-package",))
    monkeypatch.setenv("CXX", "no-such-compiler -flag")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = report(capsys)
    assert rows["detectron2"].strip() == "not installed"
    assert rows["querymask-has-no-such-package"].strip() == "not installed"
    assert rows["no-such-compiler -flag"].strip() == "not found"
    assert rows["$OMP_NUM_THREADS"].strip() == "1"
