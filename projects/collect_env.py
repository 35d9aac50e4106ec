"""Prints what is installed, what QueryMask's extension was built for, whether it is in use, and whether it computes.

    python -m querymask.collect_env

``python projects/collect_env.py`` does the same where ``import querymask`` itself fails, and says why. Exit status 1 if
the operator fails its check on a device.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, str]
"""A name and what is known about it."""

# The name to import, and that of the distribution where the module does not tell its version
LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "pycocotools": "pycocotools",
    "fvcore": "fvcore",
}

VARIABLES = {
    "QUERYMASK_REQUIRE_EXTENSION": "1 turns the fall-back to PyTorch into an error",
    "DETECTRON2_DATASETS": "folder of the data sets, default ./datasets",
    "OMP_NUM_THREADS": "CPU threads of a process",
    "CUDA_VISIBLE_DEVICES": "the GPUs to use",
    "ATEN_CPU_CAPABILITY": "lowers the vector instructions in use",
    "FORCE_CUDA": "building: 1 makes CUDA kernels although no GPU is seen",
    "TORCH_CUDA_ARCH_LIST": "building: architectures of the CUDA kernels",
    "CUDA_HOME": "building: the CUDA toolkit",
    "CXX": "building: the C++ compiler",
    "MAX_JOBS": "building: files compiled at a time",
}

VECTOR_INSTRUCTIONS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve", "sve2")

TOLERANCE = 1e-4
"""Of the self-check: float32 kernels against the PyTorch form in float64, values around 1."""


def collect() -> tuple[dict[str, list[Row]], bool]:
    """Returns the report by section, and whether the operator computes rightly on every device. Raises nothing."""
    check = [_row(device, lambda device=device: self_check(device)) for device in devices()]
    report = {
        "System": [
            ("operating system", platform.platform()),
            ("Python", f"{platform.python_version()}, {sys.executable}"),
            _row("processor", _processor),
            _row("C++ compiler", lambda: _tool(os.environ.get("CXX", "c++"))),
            _row("CUDA compiler", _nvcc),
            _row("NVIDIA driver", _driver),
        ],
        "Libraries": [
            _row("torch", _torch),
            _row("CPU use of torch", _torch_cpu),
            _row("CUDA of torch", _torch_cuda),
            *[_row(device, lambda device=device: _gpu(device)) for device in devices() if device.startswith("cuda")],
            _row("torchvision", lambda: _library("torchvision")),
            _row("Detectron2", _detectron2),
            *[_row(distribution, lambda name=name: _library(name)) for name, distribution in LIBRARIES.items()],
        ],
        "QueryMask": [_row("version", _querymask), *_extension()],
        "Environment": [(name, os.environ.get(name, f"not set ({use})")) for name, use in VARIABLES.items()],
        "Self-check of multi-scale deformable attention, forward and backward": check,
    }
    return report, all(result.startswith("OK") for _, result in check)


def format_report(report: dict[str, list[Row]]) -> str:
    """Lays ``report`` out as text, in two columns."""
    width = max(len(name) for rows in report.values() for name, _ in rows)
    lines = []
    for title, rows in report.items():
        lines += [title, "-" * len(title)]
        lines += [f"{name:{width}}  {' '.join(text.split())}" for name, text in rows]
        lines.append("")
    return "\n".join(lines[:-1])


def devices() -> list[str]:
    """The devices of every type that torch can use here: "cpu", "cuda:0", ..."""
    try:
        import torch

        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    except Exception:  # the row of torch says what is wrong
        return ["cpu"]


def self_check(device: str) -> str:
    """Runs the operator with its gradients on a tiny input, and compares with the PyTorch form on CPU in float64.

    Returns:
        "OK" or "wrong", the form that ran and the largest difference.

    Raises:
        Exception: what the operator, torch or the import raises.
    """
    import torch

    from querymask.common import ops

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
        warnings.simplefilter("ignore")  # that PyTorch serves this device is in the report
        actual = run(ops.multi_scale_deformable_attention, device, torch.float32)
    difference = max(((a - e).abs() / (1 + e.abs())).max().item() for a, e in zip(actual, expected, strict=True))
    verdict = "OK" if difference <= TOLERANCE else "wrong"  # "wrong" for NaN, too
    return f"{verdict}: {_form(device)}, largest difference {difference:.1e}"


def _row(name: str, describe: Callable[[], str]) -> Row:
    """A row whose text is ``describe()``, or the error that it raised."""
    try:
        return name, describe()
    except Exception as error:  # whatever is broken here belongs into the report, and the other rows as well
        return name, f"{type(error).__name__}: {error}"


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _tool(name: str) -> str:
    """Path and version of a compiler; a wrapper may stand before it ("ccache g++")."""
    path = shutil.which(name.split()[-1])
    return "not found" if path is None else f"{path}: {_run([path, '--version']).splitlines()[0]}"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # torch's order in a build
    path = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if path is None:
        return "not found"
    return f"{path}: {next(line for line in _run([path, '--version']).splitlines() if 'release' in line)}"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not found"
    return _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]


def _processor() -> str:
    name, flags = platform.processor() or platform.machine(), []
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            key, _, text = line.partition(":")
            if key.strip() == "model name":
                name = text.strip()
            elif key.strip() in ("flags", "Features"):
                flags = text.split()
    elif sys.platform == "darwin":
        name = _run(["sysctl", "-n", "machdep.cpu.brand_string"])
    found = " ".join(flag for flag in VECTOR_INSTRUCTIONS if flag in flags)
    return f"{name}, {os.cpu_count()} cores" + (f", {found}" if found else "")


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {Path(torch.__file__).parent}"


def _torch_cpu() -> str:
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _torch_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "none"
    architectures = torch._C._cuda_getArchFlags()  # get_arch_list() is empty where no GPU is seen
    return f"{torch.version.cuda} ({architectures}), {torch.cuda.device_count()} GPUs seen"


def _gpu(device: str) -> str:
    import torch

    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, capability {properties.major}.{properties.minor}, {memory:.1f} GiB"


def _library(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    module = importlib.import_module(name)
    return getattr(module, "__version__", None) or importlib.metadata.version(LIBRARIES.get(name, name))


def _detectron2() -> str:
    if importlib.util.find_spec("detectron2") is None:
        return "not installed: only querymask.common.ops can be used (docs/installation.md)"
    import detectron2

    from querymask.common import compat

    part = "compiled part" if compat.detectron2_is_compiled() else "without its compiled part, which is not needed"
    return f"{detectron2.__version__}, {part}, {Path(detectron2.__file__).parent}"


def _querymask() -> str:
    import querymask

    return f"{querymask.__version__}, {Path(querymask.__file__).resolve().parent}"


def _extension() -> list[Row]:
    try:
        from querymask.common.ops.extension import EXTENSION
    except Exception as error:
        return [("extension", f"not looked for: {type(error).__name__}: {error}")]
    build = ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in EXTENSION.build.items())
    return [
        ("extension", str(EXTENSION.path or "none")),
        ("built for", build or "unknown"),
        ("in use", "yes" if EXTENSION.error is None else f"no: {EXTENSION.error}"),
        *[(f"serves {device}", _form(device)) for device in devices()],
    ]


def _form(device: str) -> str:
    from querymask.common.ops.extension import EXTENSION

    return "compiled kernels" if device.split(":")[0] in EXTENSION.device_types else "PyTorch form (slower)"


def main() -> int:
    """Prints the report; returns 1 if the self-check failed, else 0."""
    report, sound = collect()
    print(format_report(report))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
