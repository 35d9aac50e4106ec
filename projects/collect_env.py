"""Prints what is installed, what the extension was built for, and whether it is in use; for bug reports.

    python -m querymask.collect_env

A part that is missing is named, and the rest printed all the same.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import querymask
from querymask.common import compat
from querymask.common.ops import extension

PACKAGES = ("torchvision", "numpy", "scipy", "pillow", "opencv-python-headless", "pycocotools", "fvcore", "iopath")

VARIABLES = (
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "DETECTRON2_DATASETS",
    "FORCE_CUDA",
    "OMP_NUM_THREADS",
    extension.REQUIRE_VARIABLE,
    "TORCH_CUDA_ARCH_LIST",
)


def main() -> None:
    """Prints the report."""
    rows = [("querymask", f"{querymask.__version__}, {Path(querymask.__file__).parent}")]
    rows += [*_extension(), *_torch(), *_detectron2(), *_packages(), *_tools(), *_environment()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))


def _extension() -> Iterator[tuple[str, str]]:
    found = extension.EXTENSION
    yield "extension", str(found.path or "not built")
    if found.build:
        build = found.build
        cuda = "CPU only"
        if build["cuda"] != "none":
            cuda = f"CUDA {build['cuda']}, architectures {build['cuda_architectures'].replace('/', ', ')}"
        yield "  built for", f"torch {build['torch']}, {cuda}"
        yield "  built with", f"{build['compiler']}, threads: {build['threads']}"
    if found.error is None:
        kinds = sorted(found.device_types - {"meta"})
        yield "  in use", f"on {' and '.join(kinds)}; CPU instructions: {torch.backends.cpu.get_cpu_capability()}"
    else:
        yield "  in use", f"NO: {found.error}"


def _torch() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    yield "torch", f"{torch.__version__}, {Path(torch.__file__).parent}"
    yield "  CUDA", torch.version.cuda or "none"
    yield "  threads", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "  GPU", "none visible to torch"
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"  GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"


def _detectron2() -> Iterator[tuple[str, str]]:
    if not compat.detectron2_available():
        yield "detectron2", "not installed"
        return
    import detectron2

    yield "detectron2", f"{getattr(detectron2, '__version__', 'unknown')}, {Path(detectron2.__file__).parent}"
    yield "  compiled part", "yes" if compat.detectron2_is_compiled() else "no (QueryMask does not need it)"


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _tools() -> Iterator[tuple[str, str]]:
    for name, option in ((os.environ.get("CXX", "c++"), "--version"), ("nvcc", "--version"), ("nvidia-smi", "-L")):
        command = name.split()
        if shutil.which(command[0]) is None:
            yield name, "not found"
            continue
        lines = subprocess.run([*command, option], capture_output=True, text=True).stdout.strip().splitlines()
        yield name, next((line for line in lines if "release" in line), lines[0] if lines else "prints nothing")


def _environment() -> Iterator[tuple[str, str]]:
    for name in VARIABLES:
        if name in os.environ:
            yield f"${name}", os.environ[name]


if __name__ == "__main__":
    main()
