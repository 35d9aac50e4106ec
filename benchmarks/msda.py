"""Multi-scale deformable attention against its composition of ``grid_sample``: time, peak memory and error.

    python benchmarks/msda.py --save benchmarks/results/msda_cpu.md
    python benchmarks/msda.py --device cuda --dtype bfloat16

All forms run in this process on the same inputs: locations are pixel centres of the queries plus offsets of two pixels
(standard deviation) on every level, as trained models have them; for the decoder, uniform centres. One thread on the
CPU is timed in CPU time, which other jobs of the machine disturb little; everything else in wall or device time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_parts.rates import H200, Rates, element_size
from torch import Tensor
from torch.nn.functional import grid_sample

from querymask.command_line import make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.measuring import PassCosts, machine, pass_costs
from querymask.common.ops import multi_scale_deformable_attention

HEADS, CHANNELS, POINTS = 8, 32, 4

LEVELS = {
    "64x96": [(8, 12), (4, 6), (2, 3), (1, 2)],  # for a trial
    "400x533": [(50, 67), (25, 34), (13, 17), (7, 9)],
    "800x1066": [(100, 134), (50, 67), (25, 34), (13, 17)],
    "800x1333": [(100, 167), (50, 84), (25, 42), (13, 21)],
}


@dataclass(frozen=True)
class Case:
    """A shape to measure; no number of queries means one for every token, as in an encoder."""

    image: str
    queries: int | None = None
    batch: int = 1

    @property
    def name(self) -> str:
        part = "encoder" if self.queries is None else f"decoder, {self.queries} queries"
        return f"{part}, {self.image}, batch {self.batch}"

    def make(self, dtype: torch.dtype, device: str) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
        """Arguments of the operator."""
        generator = torch.Generator().manual_seed(0)
        levels = LEVELS[self.image]
        tokens = sum(height * width for height, width in levels)
        if self.queries is None:
            centres = torch.cat([pixel_centres(height, width) for height, width in levels])
        else:
            centres = torch.rand(self.queries, 2, generator=generator)
        shape = (self.batch, len(centres), HEADS, len(levels), POINTS)
        sizes = torch.tensor([(width, height) for height, width in levels]).view(len(levels), 1, 2)
        locations = centres.view(-1, 1, 1, 1, 2) + 2 * torch.randn(*shape, 2, generator=generator) / sizes
        value = torch.randn(self.batch, tokens, HEADS, CHANNELS, generator=generator)
        weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return value.to(device, dtype), levels, locations.to(device, exact), weights.to(device, dtype)


def pixel_centres(height: int, width: int) -> Tensor:
    """(x, y) of every pixel, [H*W, 2] in (0, 1)."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def composition(
    value: Tensor, spatial_shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, stack: bool
) -> Tensor:
    """The usual fall-back: ``grid_sample`` on every level, all samples stacked or the sum accumulated."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype).transpose(1, 2).flatten(0, 1)  # [B*M, Q, L, P, 2]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, *weights.shape[3:])
    samples, output = [], torch.zeros((), dtype=value.dtype, device=value.device)
    for level, tokens in enumerate(value.split([height * width for height, width in spatial_shapes], 1)):
        features = tokens.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *spatial_shapes[level])
        sampled = grid_sample(features, grids[:, :, level], align_corners=False)  # [B*M, D, Q, P]
        if stack:
            samples.append(sampled)
        else:
            output = output + (sampled * weights[:, :, :, level]).sum(-1)
    if stack:
        output = (torch.stack(samples, -2).flatten(-2) * weights.flatten(-2)).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def stacked(*arguments: Tensor) -> Tensor:
    return composition(*arguments, stack=True)


def accumulated(*arguments: Tensor) -> Tensor:
    return composition(*arguments, stack=False)


@dataclass(frozen=True)
class Measurement(PassCosts):
    """Also the largest error of the output relative to its largest magnitude."""

    error: float


def measure(form: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str, repeat: int) -> Measurement:
    arguments = case.make(dtype, device)
    exact = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    with torch.no_grad():
        expected = multi_scale_deformable_attention(*exact)
        error = (form(*arguments).double() - expected).abs().max() / expected.abs().max()
    del exact
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    grad_output = torch.randn_like(expected, dtype=dtype)
    del expected

    def forward() -> None:
        with torch.no_grad():
            form(*arguments)

    def both() -> None:
        torch.autograd.grad(form(*leaves), [a for a in leaves if isinstance(a, Tensor)], grad_output)

    return Measurement(*pass_costs(forward, both, device, repeat), error.item())


@dataclass(frozen=True)
class Bound:
    """Least milliseconds: each tensor moved once through the card's memory; every neighbour's channels through L1."""

    memory: float
    l1: float

    @property
    def least(self) -> float:
        return max(self.memory, self.l1)


def bounds(case: Case, dtype: torch.dtype, rates: Rates = H200) -> tuple[Bound, Bound]:
    """Of the forward and of the backward pass, in which gradients of ``value`` are zeroed and summed in float32."""
    size, exact = element_size(dtype), max(element_size(dtype), 4)
    tokens = sum(height * width for height, width in LEVELS[case.image])
    queries = tokens if case.queries is None else case.queries
    samples = case.batch * queries * HEADS * len(LEVELS[case.image]) * POINTS
    value, output = (case.batch * rows * HEADS * CHANNELS for rows in (tokens, queries))
    sampling = samples * (2 * exact + size)  # locations and weights, and likewise their gradients
    moved = (value + output) * size + sampling
    l1 = 1e3 * samples * 4 * CHANNELS * size / rates.l1
    backward = moved + 2 * value * exact + sampling
    return Bound(1e3 * moved / rates.memory, l1), Bound(1e3 * backward / rates.memory, l1)


def describe(device: str, dtype: torch.dtype, repeat: int) -> list[str]:
    """What the numbers were measured on."""
    return [
        f"{HEADS} heads of {CHANNELS} channels, 4 levels of {POINTS} points, {dtype}.",
        f"Measured on: {machine(device)}",
        f"Median of {repeat} runs; peak memory beyond the inputs; x: how many times less than the stacked composition.",
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", nargs="+", default=["400x533", "800x1066"], choices=list(LEVELS))
    parser.add_argument("--queries", type=int, default=300, help="of the decoder")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the accumulated composition")
    arguments = parse_benchmark(parser, repeat=(50, 11), dtypes=["float32", "float16", "bfloat16", "float64"])
    dtype, device, repeat = getattr(torch, arguments.dtype), arguments.device, arguments.repeat
    forms = {"grid_sample, stacked": stacked, "grid_sample, accumulated": accumulated}
    if arguments.compile:
        forms["grid_sample, torch.compile"] = torch.compile(accumulated)
    forms["this operator"] = multi_scale_deformable_attention

    lines = describe(device, dtype, repeat)
    columns = ("forward ms", "+ backward ms", "forward MiB", "+ backward MiB")
    header = ["form", *(text for column in columns for text in (column, "x")), "error"]
    for image in arguments.images:
        for queries in (None, arguments.queries):
            case = Case(image, queries, arguments.batch)
            lines += ["", f"## {case.name}", ""]
            if device == "cuda":
                bound = bounds(case, dtype)[0]
                lines += [f"bounds of the forward pass: HBM {bound.memory:.3f} ms, L1 {bound.l1:.3f} ms (H200)", ""]
            print(case.name)
            rows, first = [], None
            for name, form in forms.items():
                result = measure(form, case, dtype, device, repeat)
                first = first or result
                cells = [name]
                for field in ("forward", "both", "forward_memory", "both_memory"):
                    number = getattr(result, field)
                    cells += [f"{number:.4g}", f"{getattr(first, field) / max(number, 1e-3):.1f}"]
                rows.append([*cells, f"{result.error:.1e}"])
                print(", ".join(rows[-1]), flush=True)
            lines += [markdown_table(rows, header)]
    show_page("Multi-scale deformable attention", "benchmarks/msda.py", "\n".join(lines), arguments.save)


if __name__ == "__main__":
    main()
