"""Reading the reference cases: outputs of the official implementations in float64.

The folder is ``$QUERYMASK_REFERENCE_DIR`` when that is set, else the copy beside this file. Tests run every case that
they find there; a setting of a case that the project does not know must fail by name.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def reference_dir() -> Path:
    """The folder with one sub-folder per subject and ``fixture.py``."""
    return Path(os.environ.get("QUERYMASK_REFERENCE_DIR") or Path(__file__).parent / "golden")


@lru_cache
def load_document(subject: str) -> dict[str, Any]:
    """The whole ``cases.json`` of a subject, e.g. ``"solq"``."""
    with open(reference_dir() / subject / "cases.json") as file:
        return json.load(file)


def load_cases(subject: str, kind: str | None = None) -> dict[str, dict[str, Any]]:
    """The cases of a subject by name, optionally of one kind; empty if the folder lacks the subject."""
    if not (reference_dir() / subject / "cases.json").exists():
        return {}
    cases = load_document(subject)["cases"]
    if isinstance(cases, list):
        cases = {case["name"]: case for case in cases}
    return {name: case for name, case in cases.items() if kind is None or case.get("kind") == kind}


def load_arrays(subject: str, case: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """The expected arrays of a case."""
    return np.load(reference_dir() / subject / case["file"])


def load_manifest(subject: str, name: str) -> dict[str, list[int]]:
    """Keys and shapes of an official checkpoint."""
    with open(reference_dir() / subject / name) as file:
        return json.load(file)


def fixture() -> ModuleType:
    """The module that makes weights, images and targets from names and seeds."""
    path = reference_dir() / "fixture.py"
    if not path.exists():  # a folder of cases alone: the recipe does not change
        path = Path(__file__).parent / "golden" / "fixture.py"
    return _load_module(str(path))


@lru_cache
def _load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_fixture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(actual: Any, expected: np.ndarray, name: str, tolerance: float = 1e-5) -> None:
    """Compare relative to the largest magnitude of the expected array; shapes must agree."""
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if not expected.size:
        return
    scale = max(np.abs(expected).max(), 1e-12)
    error = np.abs(actual - expected).max() / scale
    assert error <= tolerance, (
        f"{name}: off by {error:.2e} of its largest magnitude {scale:.4g} (allowed {tolerance:.0e})"
    )
