"""Prints what is installed, what the extension was built for, whether it is in use and right; for bug reports.

    python -m querymask.collect_env

A part that is missing or broken is named, and the rest printed all the same. Where ``import querymask`` itself fails, a
clone's ``python projects/collect_env.py`` tells why.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str]
"""A name and what is known about it."""

PACKAGES = ("torchvision", "numpy", "scipy", "pillow", "opencv-python-headless", "pycocotools", "fvcore", "iopath")

VARIABLES = (
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "DETECTRON2_DATASETS",
    "FORCE_CUDA",
    "OMP_NUM_THREADS",
    "QUERYMASK_REQUIRE_EXTENSION",
    "TORCH_CUDA_ARCH_LIST",
)


VECTOR_INSTRUCTIONS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve", "sve2")

TOLERANCE = 1e-4
"""Of the self-check: float32 against float64, values and gradients relative to 1 or themselves."""


def main() -> int:
    """Prints the report; returns 1 if the self-check failed on a device, else 0."""
    sections = (_querymask, _extension, _system, _torch, _detectron2, _packages, _tools, _environment)
    rows = [row for section in sections for row in _guarded(section)]
    checks = [_check(device) for device in _devices()]
    width = max(len(name) for name, _ in rows + checks)
    print("\n".join(f"{name:<{width}}  {' '.join(text.split())}" for name, text in rows + checks))
    return 0 if all(result.startswith("OK") for _, result in checks) else 1


def self_check(device: str) -> str:
    """Runs the operator with its gradients on a tiny input, and compares with the PyTorch form on CPU in float64.

    Returns:
        "OK" or "WRONG", the form that ran and the largest difference.

    Raises:
        Exception: what the operator or an import raises.
    """
    import torch

    import querymask  # noqa: F401  # where this fails, its parts must not be tried
    from querymask.common import ops
    from querymask.common.ops import extension

    shapes = [(5, 4), (3, 2)]
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(1, 26, 2, 16, generator=generator)
    locations = 1.4 * torch.rand(1, 7, 2, 2, 3, 2, generator=generator) - 0.2
    weights = torch.rand(1, 7, 2, 2, 3, generator=generator)

    def run(function: Callable[..., Any], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in (value, locations, weights)]
        output = function(tensors[0], shapes, *tensors[1:])
        grads = torch.autograd.grad(output.square().sum(), tensors)
        return [tensor.detach().to("cpu", torch.float64) for tensor in (output, *grads)]

    expected = run(ops.multi_scale_deformable_attention_reference, "cpu", torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report tells what serves this device
        actual = run(ops.multi_scale_deformable_attention, device, torch.float32)
    difference = max(((a - e).abs() / (1 + e.abs())).max().item() for a, e in zip(actual, expected, strict=True))
    verdict = "OK" if difference <= TOLERANCE else "WRONG"  # that, for NaN too
    kernels = torch.device(device).type in extension.EXTENSION.device_types
    form = "compiled kernels" if kernels else "the slower PyTorch form"
    return f"{verdict} with {form}, forward and backward, largest difference {difference:.1e}"


def _devices() -> list[str]:
    """What torch can use here: "cpu", "cuda:0", ..."""
    try:
        import torch

        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    except Exception:  # the row of torch tells what is wrong
        return ["cpu"]


def _check(device: str) -> Row:
    name = f"self-check {device}"
    try:
        return name, self_check(device)
    except Exception as error:  # whatever it is, it is the result
        return name, f"{type(error).__name__}: {error}"


def _guarded(section: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of ``section``; if it breaks off, the reason in place of the rest."""
    try:
        yield from section()
    except Exception as error:  # broken installations are what this report is for
        yield section.__name__.strip("_"), f"{type(error).__name__}: {error}"


def _querymask() -> Iterator[Row]:
    import querymask

    yield "querymask", f"{querymask.__version__}, {Path(querymask.__file__).resolve().parent}"


def _extension() -> Iterator[Row]:
    import torch

    import querymask  # noqa: F401  # where this fails, its parts must not be tried
    from querymask.common.ops import extension

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


def _system() -> Iterator[Row]:
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    name, flags = platform.processor() or platform.machine(), []
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.is_file() else ():
        key, _, text = line.partition(":")
        if key.strip() == "model name":
            name = text.strip()
        elif key.strip() in ("flags", "Features"):
            flags = text.split()
    yield "processor", ", ".join([name, f"{os.cpu_count()} cores", *(x for x in VECTOR_INSTRUCTIONS if x in flags)])


def _torch() -> Iterator[Row]:
    import torch

    yield "torch", f"{torch.__version__}, {Path(torch.__file__).parent}"
    if torch.version.cuda is None:
        yield "  CUDA", "none"
    else:  # get_arch_list() would be empty where no GPU is seen
        yield "  CUDA", f"{torch.version.cuda}, architectures {torch._C._cuda_getArchFlags().replace(' ', ', ')}"
    yield "  threads", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "  GPU", "none visible to torch"
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"  GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"


def _detectron2() -> Iterator[Row]:
    from querymask.common import compat

    if not compat.detectron2_available():
        yield "detectron2", "not installed"
        return
    import detectron2

    yield "detectron2", f"{getattr(detectron2, '__version__', 'unknown')}, {Path(detectron2.__file__).parent}"
    yield "  compiled part", "yes" if compat.detectron2_is_compiled() else "no (QueryMask does not need it)"


def _packages() -> Iterator[Row]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _tools() -> Iterator[Row]:
    driver = ["--query-gpu=driver_version", "--format=csv,noheader"]
    tools = ((os.environ.get("CXX", "c++"), ["--version"]), ("nvcc", ["--version"]), ("nvidia-smi", driver))
    for name, options in tools:
        command = name.split()
        if shutil.which(command[0]) is None:
            yield name, "not found"
            continue
        lines = subprocess.run([*command, *options], capture_output=True, text=True).stdout.strip().splitlines()
        yield name, next((line for line in lines if "release" in line), lines[0] if lines else "prints nothing")


def _environment() -> Iterator[Row]:
    for name in VARIABLES:
        if name in os.environ:
            yield f"${name}", os.environ[name]


if __name__ == "__main__":
    sys.exit(main())
