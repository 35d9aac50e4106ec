"""Finds, checks and loads the compiled extension ``querymask._C``, and says why where it cannot.

The library carries a text with what it was built from. It is read out of the file before loading, because a library
built for another torch fails with an undefined symbol at best.
"""

import importlib.machinery
import json
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

REQUIRE_VARIABLE = "QUERYMASK_REQUIRE_EXTENSION"
"""Environment variable: ``1`` turns the fall-back to PyTorch into an error."""

REMEDY = "Build it with `pip install -e . --no-build-isolation` in a clone (docs/installation.md)."

_BUILD_INFO = re.compile(rb"querymask-build(\{[^{}\0]*\})\0")


@dataclass(frozen=True)
class Extension:
    """What became of the extension.

    Attributes:
        path: its file; None if there is none for this Python.
        build: what it was built from: ``torch``, ``cuda``, ``cuda_architectures``, ``compiler``, ``threads``; empty if
            unknown.
        error: why it is not loaded, with the remedy; None if it is.
    """

    path: Path | None
    build: dict[str, str]
    error: str | None

    @property
    def device_types(self) -> frozenset[str]:
        """The types of device that the loaded kernels serve."""
        if self.error is not None:
            return frozenset()
        return frozenset({"cpu", "meta"} if self.build["cuda"] == "none" else {"cpu", "meta", "cuda"})


def find_library(folder: Path) -> Path | None:
    """Returns the extension for the running Python in ``folder``, or None."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / f"_C{suffix}").is_file():
            return path
    return None


def read_build(path: Path) -> dict[str, str]:
    """Returns what the library at ``path`` was built from, without loading it; empty if the file does not say."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _BUILD_INFO.search(content)
        return json.loads(found.group(1)) if found else {}


def incompatibility(build: dict[str, str], torch_version: str, torch_cuda: str | None) -> str | None:
    """Says why a library built from ``build`` must not be loaded into this torch, or returns None.

    PyTorch keeps its C++ interface within a minor version, CUDA its runtime within a major one.
    """

    def leading(version: str, parts: int) -> list[str]:
        return version.split("+")[0].split(".")[:parts]

    if not build:
        return f"the library was not built by this project's setup.py. {REMEDY}"
    if leading(build["torch"], 2) != leading(torch_version, 2):
        return f"it was built for torch {build['torch']}, but torch {torch_version} is running. {REMEDY}"
    if build["cuda"] != "none" and leading(build["cuda"], 1) != leading(torch_cuda or "none", 1):
        return f"it was built with CUDA {build['cuda']}, but torch is built for CUDA {torch_cuda}. {REMEDY}"
    return None


def load(folder: Path) -> Extension:
    """Loads the extension in ``folder``, which registers ``torch.ops.querymask``. Raises nothing: see ``error``."""
    path = find_library(folder)
    if path is None:
        return Extension(None, {}, f"there is no extension for this Python in {folder}. {REMEDY}")
    try:
        build = read_build(path)
        error = incompatibility(build, torch.__version__, torch.version.cuda)
        if error is None:
            from querymask import _C  # noqa: F401
    except (ImportError, OSError, ValueError) as failure:
        return Extension(path, {}, f"{path} cannot be loaded ({failure}). {REMEDY}")
    return Extension(path, build, error and f"{path} does not fit: {error}")


EXTENSION = load(Path(__file__).resolve().parents[2])


def provides(operators: Sequence[str]) -> bool:
    """Whether the extension is in use and has these operators in ``torch.ops.querymask``.

    One that lacks some is not used any more, even for what it has: its kernels may differ from the present ones.
    """
    global EXTENSION
    missing = [name for name in operators if not hasattr(torch.ops.querymask, name)]
    if EXTENSION.error is None and missing:
        reason = f"it was built from older sources, without {', '.join(missing)}. {REMEDY}"
        EXTENSION = replace(EXTENSION, error=f"{EXTENSION.path} does not fit: {reason}")
    return EXTENSION.error is None


_reference_only = False
_warned: set[str] = set()


@contextmanager
def reference_only() -> Iterator[None]:
    """Within it, every operator runs its pure PyTorch form (for export and comparison), without a warning."""
    global _reference_only
    previous, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = previous


def use_kernels(device: torch.device) -> bool:
    """Whether the compiled kernels serve ``device``; if not, warns once, with the reason and the remedy.

    Raises:
        RuntimeError: they do not, and ``QUERYMASK_REQUIRE_EXTENSION=1`` forbids the fall-back.
    """
    if _reference_only:
        return False
    if device.type in EXTENSION.device_types:
        return True
    if EXTENSION.error is not None:
        reason = f"QueryMask's extension is not in use: {EXTENSION.error}"
    else:
        reason = f"QueryMask's extension has no kernels for {device.type} devices"
        reason += f": it was built without CUDA. {REMEDY}" if device.type == "cuda" else "."
    if os.environ.get(REQUIRE_VARIABLE, "0") not in ("", "0"):
        raise RuntimeError(f"{reason} {REQUIRE_VARIABLE} is set, so the slower PyTorch form is not used instead.")
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{reason} The same results are computed by PyTorch, more slowly.", stacklevel=4)
    return False
