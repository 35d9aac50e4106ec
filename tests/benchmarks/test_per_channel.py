"""The scheme of one thread per channel, which the operator is compared with on a card, computes the same as it does."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tool_loader import load_tool

from querymask.common.ops import multi_scale_deformable_attention

load_tool("msda", "benchmarks")  # its folder can be imported from after it
from gpu_parts import per_channel  # noqa: E402


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_output_and_gradients(tmp_path: Path) -> None:
    """Its kernels, with a thread of the host for every thread of a block."""
    text = per_channel.SOURCE.read_text().replace("cuda_runtime.h", "one_thread_each.h").replace("= 512", "= 8")
    text = text.replace("extern __shared__ float shares[]", "static float shares[64]")
    text, launches = re.subn(
        r"(\w+)<<<(\w+), ([^,]+), .*?>>>\(\s*([^;]*)\);", r"launch(\2, \3, [=] { \1(\4); });", text
    )
    assert launches == 2
    source, library = tmp_path / "per_channel.cpp", tmp_path / "per_channel.so"
    source.write_text(text)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{Path(__file__).parent}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    function = per_channel.wrap(ctypes.CDLL(str(library)))

    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3, 6)]
    value = torch.randn(2, 38, 3, 7, generator=generator).requires_grad_()
    locations = (torch.rand(2, 3, 3, 2, 2, 2, generator=generator) * 1.6 - 0.3).requires_grad_()  # some are outside
    weights = torch.rand(2, 3, 3, 2, 2, generator=generator).requires_grad_()
    leaves = (value, locations, weights)
    output, expected = (form(value, shapes, *leaves[1:]) for form in (function, multi_scale_deformable_attention))
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn(output.shape, generator=generator)
    gradients, exact = (torch.autograd.grad(found, leaves, grad_output) for found in (output, expected))
    for gradient, right in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


def test_source_compiles(tmp_path: Path) -> None:
    nvcc = per_channel.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    target = tmp_path / "per_channel.so"
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-arch=sm_90", str(per_channel.SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    assert library.per_channel_forward and library.per_channel_backward
