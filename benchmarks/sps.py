"""Convolution on structure-preserving sparsity against a gather with one product, and a dense convolution.

    python benchmarks/sps.py --save benchmarks/results/sps_cpu.md
    python benchmarks/sps.py --device cuda --dtype bfloat16 --active 40000

All forms run in this process on the same map: a coarse map of smooth random scores, of which the highest cells are
refined once, as EffSeg does, so that 39 % of the fine map is active. The gather gets the numbers of the neighbours for
free. One thread on the CPU is timed in CPU time, which other jobs of the machine disturb little; everything else in
wall or device time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_parts.rates import H200, Rates, element_size
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, linear

from querymask.command_line import make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.measuring import PassCosts, machine, pass_costs
from querymask.common.ops import sparse_conv2d
from querymask.common.ops.sps.reference import neighbour_rows
from querymask.common.sps import SparseMap

DENSITY = 0.39  # of active cells


class Case:
    """A map to convolve: ``active`` cells of one region, ``channels`` in and out, 3 x 3."""

    def __init__(self, active: int, channels: int, dilation: int, dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        side = round(math.sqrt(active / 4 / DENSITY))
        scores = torch.randn(1, 1, side // 8, side // 8, generator=generator)
        scores = interpolate(scores, (side, side), mode="bicubic").flatten()
        coarse = torch.randn(1, channels, side, side, generator=generator)
        sparse = SparseMap.from_dense(coarse).split_highest(scores, active // 4).upsample()
        sparse = sparse.replace_active(torch.randn(sparse.active.shape, generator=generator))
        self.features = sparse.features.to(device, dtype)
        self.index_map, self.cells = sparse.index_map.to(device), sparse.cells.to(device)
        self.weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
        self.weight /= math.sqrt(9 * channels)
        self.bias = torch.randn(channels, generator=generator).to(device, dtype)
        self.dilation = dilation
        self.name = f"{len(self.cells)} active cells of {2 * side} x {2 * side}, {channels} channels"
        self.rows = neighbour_rows(self.index_map, self.cells, (3, 3), (dilation, dilation), len(self.features))
        self.rows = self.rows.flatten()


@dataclass(frozen=True)
class Form:
    """A way to compute the case.

    Attributes:
        inputs: the tensors with gradients.
        run: from these to the output.
        at_active: whether the output is that of the active cells, to be compared.
    """

    inputs: Callable[[Case], list[Tensor]]
    run: Callable[..., Tensor]
    at_active: bool = True


def as_matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1)


def padded(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_zeros(1, features.shape[1])])


def gather(features: Tensor, rows: Tensor) -> Tensor:
    return padded(features).index_select(0, rows).view(-1, 9 * features.shape[1])


FORMS = {
    "product alone": Form(
        lambda case: [gather(case.features, case.rows), as_matrix(case.weight).contiguous(), case.bias],
        lambda case, gathered, weight, bias: linear(gathered, weight, bias),
    ),
    "gather + product": Form(
        lambda case: [case.features, case.weight, case.bias],
        lambda case, features, weight, bias: linear(gather(features, case.rows), as_matrix(weight), bias),
    ),
    "dense convolution": Form(
        lambda case: [
            case.features[case.index_map.long()].permute(0, 3, 1, 2).contiguous(),
            case.weight,
            case.bias,
        ],
        lambda case, dense, weight, bias: conv2d(dense, weight, bias, padding=case.dilation, dilation=case.dilation),
        at_active=False,
    ),
    "this operator": Form(
        lambda case: [case.features, case.weight, case.bias],
        lambda case, features, weight, bias: sparse_conv2d(
            features, case.index_map, case.cells, weight, bias, case.dilation
        ),
    ),
}


def bound(case: Case, dtype: torch.dtype, precision: str, rates: Rates = H200) -> float:
    """Least milliseconds of a forward pass: its products, its neighbours' rows through L2, each tensor moved once.

    Args:
        precision: in which the products are computed, a key of ``rates.products``.
    """
    cells, (outputs, inputs, *taps) = len(case.cells), case.weight.shape
    gathered = cells * math.prod(taps) * inputs
    moved = (len(case.features) * inputs + cells * outputs) * element_size(dtype)
    seconds = (
        2 * gathered * outputs / rates.products[precision],
        gathered * element_size(dtype) / rates.l2,
        moved / rates.memory,
    )
    return 1e3 * max(seconds)


@dataclass(frozen=True)
class Measurement(PassCosts):
    """Also the largest error of the output relative to its largest magnitude."""

    error: float


def measure(form: Form, case: Case, device: str, repeat: int) -> Measurement:
    inputs = [tensor.detach() for tensor in form.inputs(case)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        output = form.run(case, *inputs)
        grad = torch.randn_like(output)
        if not form.at_active:
            region, y, x = case.cells.long().unbind(1)
            output = output[region, :, y, x]
        exact = (case.features.double(), case.index_map, case.cells, case.weight.double(), case.bias.double())
        expected = sparse_conv2d(*exact, case.dilation)
        error = (output.double() - expected).abs().max() / expected.abs().max()
        del output, expected, exact

    def forward() -> None:
        with torch.no_grad():
            form.run(case, *inputs)

    def both() -> None:
        torch.autograd.grad(form.run(case, *leaves), leaves, grad)

    return Measurement(*pass_costs(forward, both, device, repeat), error.item())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--active", type=int, default=10000, help="active cells, a multiple of 4")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--dilation", type=int, default=1)
    arguments = parse_benchmark(parser, repeat=(50, 11), dtypes=["float32", "float16", "bfloat16", "float64"])
    dtype, device, repeat = getattr(torch, arguments.dtype), arguments.device, arguments.repeat

    lines = [
        f"3 x 3, dilation {arguments.dilation}, {arguments.dtype}.",
        f"Measured on: {machine(device)}",
        f"Median of {repeat} runs; peak memory beyond the inputs; x: how many times as long as the product alone, "
        "which has the gathered matrix for input.",
    ]
    columns = ("form", "forward ms", "x", "+ backward ms", "x", "forward MiB", "+ backward MiB", "error")
    for channels in arguments.channels:
        case = Case(arguments.active, channels, arguments.dilation, dtype, device)
        print(case.name)
        rows, least = [], None
        for name, form in FORMS.items():
            result = measure(form, case, device, repeat)
            least = least or result
            cells = [name]
            for field in ("forward", "both"):
                number = getattr(result, field)
                cells += [f"{number:.4g}", f"{number / getattr(least, field):.2f}"]
            rows.append([*cells, f"{result.forward_memory:.4g}", f"{result.both_memory:.4g}", f"{result.error:.1e}"])
            print(", ".join(rows[-1]), flush=True)
        table = markdown_table(rows, columns)
        lines += ["", f"## {case.name}", "", table]
    title = "Convolution on structure-preserving sparsity"
    show_page(title, "benchmarks/sps.py", "\n".join(lines), arguments.save)


if __name__ == "__main__":
    main()
