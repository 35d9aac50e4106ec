"""Cases of the sparse convolution for the simulated kernels, against the PyTorch twin in float64."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from kernel_simulation import at_offset, check_close, check_deterministic
from torch import Tensor

from querymask.common.ops import sparse_conv2d_reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDICES = {"int32": torch.int32, "int64": torch.int64}
NAMES = ("output", "grad_features", "grad_weight", "grad_bias")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def make_inputs(
    dtype: torch.dtype,
    rows: int = 30,
    regions: int = 2,
    size: tuple[int, int] = (6, 7),
    active: int = 23,
    channels: tuple[int, int] = (8, 8),
    kernel_size: tuple[int, int] = (3, 3),
    bias: bool = True,
    index: str = "int32",
    cells_index: str | None = None,
    seed: int = 0,
) -> Inputs:
    """Features, index map, cells (the last region's corners first), weight, bias, gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    index_map = torch.randint(max(rows, 1), (regions, *size), generator=generator)
    cells = torch.stack([torch.randint(max(n, 1), (active,), generator=generator) for n in (regions, *size)], 1)
    corners = torch.tensor([[regions - 1, y, x] for y in (0, size[0] - 1) for x in (0, size[1] - 1)])
    cells[:4] = corners[:active]
    inputs, outputs = channels
    weight = normal(outputs, inputs, *kernel_size) / math.sqrt(max(1, inputs * math.prod(kernel_size)))
    return (
        *(normal(rows, inputs), index_map.to(INDICES[index]), cells.to(INDICES[cells_index or index])),
        *(weight, normal(outputs) if bias else None, normal(active, outputs)),
    )


def run_kernels(inputs: Inputs, dilation: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients of the simulated kernels."""
    features, index_map, cells, weight, bias, grad = inputs
    operators = torch.ops.querymask_simulated
    output = operators.sps(features, index_map, cells, weight, bias, list(dilation))
    return [output, *operators.sps_backward(grad, features, index_map, cells, weight, list(dilation))]


def random_case(
    dtype: torch.dtype,
    dilation: tuple[int, ...] = (1, 1),
    offsets: Sequence[int] = (0,) * 6,
    slack: float | None = None,
    **sizes,
) -> None:
    inputs = [
        tensor if tensor is None else at_offset(tensor, offset)
        for tensor, offset in zip(make_inputs(dtype, **sizes), offsets)
    ]
    features, index_map, cells, weight, bias, grad = inputs
    actual = run_kernels(inputs, dilation)
    exact = [tensor.double().clone().requires_grad_() for tensor in (features, weight)]
    exact_bias = (weight.new_zeros(weight.shape[0]) if bias is None else bias).double().requires_grad_()
    output = sparse_conv2d_reference(exact[0], index_map, cells, exact[1], exact_bias, list(dilation))
    expected = [output.detach(), *torch.autograd.grad(output, [*exact, exact_bias], grad.double())]
    if dtype in (torch.float16, torch.bfloat16):
        slack = 4 * torch.finfo(dtype).eps  # the gradients of neighbours are rounded before they are summed
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        check_close(name, ours, theirs, dtype, slack=slack)


def with_tf32(**sizes) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        random_case(torch.float32, slack=2e-3, **sizes)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def deterministic(dtype: torch.dtype, dilation: tuple[int, ...] = (2, 1), **sizes) -> None:
    inputs = make_inputs(dtype, **sizes)
    check_deterministic(lambda: run_kernels(inputs, dilation))


def too_many_branches() -> None:
    try:
        random_case(torch.float32, dilation=(1, 1) * 17, channels=(8, 17))
    except ValueError as error:
        assert "at most 16 branches" in str(error)
    else:
        raise AssertionError("17 branches are taken")


def refuses(change: Callable[[Inputs], None]) -> None:
    """An assertion of the kernels stops the call."""
    inputs = make_inputs(torch.float32)
    change(inputs)
    try:
        run_kernels(inputs, (1, 1))
    except RuntimeError as error:
        assert "device-side assert" in str(error), error
    else:
        raise AssertionError("an index that is no cell, or no row, is taken")


def cell_outside(inputs: Inputs) -> None:
    inputs[2][5, 2] = 7


def row_outside(inputs: Inputs) -> None:
    inputs[1].fill_(30)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and functions that raise an AssertionError."""
    widths = [(1, 1), (3, 8), (8, 3), (16, 16), (17, 40), (32, 64), (64, 32), (65, 5), (96, 128), (128, 96), (256, 24)]
    kernels = [(3, 3), (1, 1), (3, 3), (1, 5), (3, 3), (3, 1), (5, 5)]
    for i, (channels, (name, dtype)) in enumerate(itertools.product(widths, DTYPES.items())):
        sizes = {
            "channels": channels,
            "kernel_size": kernels[i % len(kernels)],
            "dilation": (1 + i % 3, 1 + i // 2 % 4),
            "active": (1, 23, 64, 65, 150)[i % 5],
            "bias": i % 3 > 0,
            "index": list(INDICES)[i // 4 % 2],
            "cells_index": "int64" if i % 5 == 0 else None,
            "seed": i,
        }
        yield f"widths-{channels[0]}x{channels[1]}-{name}", partial(random_case, dtype, **sizes)
    for name, dtype in DTYPES.items():
        for offset in ((1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 1, 1), (3, 1, 2, 5, 1, 3)):
            label = "".join(map(str, offset))
            sizes = {"channels": (16, 24), "dilation": (2, 1)}
            yield f"offsets-{label}-{name}", partial(random_case, dtype, offsets=offset, **sizes)
        for label, sizes in {
            "active": {"active": 0},
            "inputs": {"channels": (0, 8)},
            "outputs": {"channels": (8, 0)},
            "regions": {"regions": 0, "active": 0},
            "rows": {"rows": 0, "regions": 0, "active": 0},
        }.items():
            yield f"empty-{label}-{name}", partial(random_case, dtype, **sizes)
        yield f"dilation-far-{name}", partial(random_case, dtype, dilation=(5, 40), channels=(32, 32))
        for channels in ((7, 5), (32, 16)):
            sizes = {"channels": channels, "active": 90, "rows": 9}
            yield f"deterministic-{channels[0]}-{name}", partial(deterministic, dtype, **sizes)
        for channels, dilation, sizes in (
            ((3, 10), (1, 2, 3, 1), {}),
            ((16, 24), (1, 1, 3, 3, 5, 5), {"active": 150}),
            ((24, 80), (2, 1, 1, 2), {"active": 600, "rows": 90}),  # several parts of the sum over cells
            ((136, 144), (1, 1, 2, 5), {"active": 70}),  # several tiles of columns
        ):
            sizes = {"channels": channels, "dilation": dilation, **sizes}
            yield f"branches-{channels[0]}x{channels[1]}-{name}", partial(random_case, dtype, **sizes)
        sizes = {"channels": (8, 16), "dilation": (1, 1, 2, 3), "active": 90, "rows": 9}
        yield f"branches-deterministic-{name}", partial(deterministic, dtype, **sizes)
        yield f"one-row-{name}", partial(random_case, dtype, rows=1, active=90, channels=(32, 16))
    yield "chunks-of-cells", partial(random_case, torch.float32, active=17000, channels=(1, 1), kernel_size=(1, 1))
    yield "large-chunks-of-columns", partial(random_case, torch.float32, active=300, channels=(7300, 1), rows=9)
    for channels in ((32, 64), (128, 128), (20, 12)):
        yield f"tf32-{channels[0]}x{channels[1]}", partial(with_tf32, channels=channels, active=70)
    sizes = {"channels": (32, 96), "dilation": (1, 1, 3, 3, 5, 5), "active": 70}
    yield "tf32-branches-32x96", partial(with_tf32, **sizes)
    sizes = {"active": 17000, "channels": (1, 2), "kernel_size": (1, 1), "dilation": (1, 1, 2, 2)}
    yield "chunks-of-cells-branches", partial(random_case, torch.float32, **sizes)
    yield "branches-17", too_many_branches
    yield "refuses-cell", partial(refuses, cell_outside)
    yield "refuses-row", partial(refuses, row_outside)
