"""The operator in the scheme of one thread per channel (``per_channel.cu``), compiled by nvcc when it is needed."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("per_channel.cu")
MAX_LEVELS = 8


class Sizes(ctypes.Structure):
    """As in the source."""

    NAMES = ("batch", "tokens", "heads", "channels", "queries", "levels", "points")
    _fields_ = [(name, ctypes.c_int) for name in NAMES] + [
        (name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width")
    ]


def find_nvcc() -> str | None:
    """CUDA's compiler, on the PATH or where torch would look for it."""
    from torch.utils.cpp_extension import CUDA_HOME

    home = Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
    return shutil.which("nvcc") or (str(home) if home.is_file() else None)


def build() -> Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]:
    """Compile for the card that is here; the result takes the operator's arguments.

    16-bit tensors go through float32, as in the operators that have this scheme.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc, neither on the PATH nor in CUDA_HOME")
    target = Path(tempfile.mkdtemp(), "per_channel.so")
    major, minor = torch.cuda.get_device_capability()
    command = [nvcc, "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", str(SOURCE), "-o"]
    finished = subprocess.run([*command, str(target)], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stdout}{finished.stderr}")
    return wrap(ctypes.CDLL(os.fspath(target)))


def wrap(library: ctypes.CDLL) -> Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]:
    """The library's functions as one differentiable function of tensors."""

    class PerChannel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, shapes: list[tuple[int, int]], *sampling: Tensor) -> Tensor:
            ctx.shapes, ctx.dtypes = shapes, [tensor.dtype for tensor in (value, *sampling)]
            tensors = [tensor.float().contiguous() for tensor in (value, *sampling)]
            ctx.save_for_backward(*tensors)
            batch, _, heads, channels = value.shape
            output = tensors[0].new_empty(batch, sampling[0].shape[1], heads * channels)
            call(library.per_channel_forward, shapes, tensors, [*tensors, output])
            return output.to(value.dtype)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            gradients = [torch.zeros_like(tensors[0]), *map(torch.empty_like, tensors[1:])]
            arguments = [grad_output.float().contiguous(), *tensors, *gradients]
            call(library.per_channel_backward, ctx.shapes, tensors, arguments)
            grad_value, *others = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes))
            return grad_value, None, *others

    return PerChannel.apply


def call(function: Any, shapes: Sequence[tuple[int, int]], inputs: Sequence[Tensor], arguments: list[Tensor]) -> None:
    """Call a function of the library on the current stream.

    Args:
        inputs: value, locations and weights, for their sizes.
    """
    value, locations = inputs[:2]
    batch, tokens, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    sizes = Sizes(batch, tokens, heads, channels, queries, levels, points)
    for level, (height, width) in enumerate(shapes):
        sizes.height[level], sizes.width[level] = height, width
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments]
    stream = torch.cuda.current_stream().cuda_stream if value.is_cuda else None
    if status := function(ctypes.byref(sizes), *pointers, ctypes.c_void_p(stream)):
        raise RuntimeError(f"the kernel could not be launched: CUDA error {status}")
