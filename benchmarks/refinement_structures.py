"""Five ways to keep a map that is refined in places, at the same refinement (EffSeg, section 3.2).

    python benchmarks/refinement_structures.py --save benchmarks/results/refinement_structures_cpu.md
    python benchmarks/refinement_structures.py --device cuda --width 64 --sides 14 28 56

The map is of many regions whose cells have been refined in places before. Of its active cells those of the highest
scores become four children each, with features of their own, and the children look at their neighbours: the sum of
rectified 3x3 convolutions of several dilations, as in EffSeg's semantic fusion module. All structures begin with the
same map, scores and weights, and end with the features of the children:

Dense: a map of the fine resolution; everything is computed everywhere.
Pointwise: the active features alone. A convolution is what its middle says; neighbours are ignored.
Neighbors: every active feature with copies of the neighbours that its convolutions read; each copy is refined anew.
SparseOnDense: a map of the fine resolution, of which the children alone are computed.
SPS: each feature once, and a map of their row numbers (SparseMap).

One thread on the CPU is timed in CPU time, which other jobs of the machine disturb little; everything else in wall or
device time. A plot over the sizes is written beside the saved page.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, linear

from querymask.command_line import make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.measuring import PassCosts, machine, pass_costs
from querymask.common.ops import multi_dilation_sparse_conv2d
from querymask.common.sps import SparseMap

FIRST_SIDE = 14  # cells of a region before any refinement


@dataclass(frozen=True)
class Weights:
    """Of a refinement; F channels.

    Attributes:
        child, child_bias: (4 F, F), (4 F,): what tells the children of a cell from their parent.
        kernels, biases: (F, F, 3, 3), (F,) for every dilation.
        dilations: of the convolutions.
    """

    child: Tensor
    child_bias: Tensor
    kernels: list[Tensor]
    biases: list[Tensor]
    dilations: list[int]

    @classmethod
    def draw(cls, width: int, dilations: Sequence[int], dtype: torch.dtype, device: str) -> "Weights":
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
            return values.to(device, dtype).requires_grad_()

        kernels = [draw(width, width, 3, 3) for _ in dilations]
        return cls(draw(4 * width, width), draw(4 * width), kernels, [draw(width) for _ in dilations], list(dilations))

    def leaves(self) -> list[Tensor]:
        return [self.child, self.child_bias, *self.kernels, *self.biases]

    def added(self, parents: Tensor) -> Tensor:
        """What children are more than their parents: (..., F) -> (..., 4, F)."""
        return linear(parents, self.child, self.child_bias).unflatten(-1, (4, -1))

    def children(self, parents: Tensor) -> Tensor:
        """(N, F) -> (4 N, F)."""
        return (parents[:, None] + self.added(parents)).flatten(0, 1)


class Case:
    """A map of ``regions`` x ``side`` x ``side`` cells and what is to be done with it.

    All cells of the first resolution competed, and of every other one the children of those that were refined.

    Attributes:
        sparse: the map.
        scores: (N_A,) of its active cells.
        count: how many of those are refined.
        weights: of the refinement.
    """

    def __init__(self, side: int, regions: int, count: int, weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        width = weights.child.shape[1]
        sparse = SparseMap.from_dense(torch.randn(regions, width, FIRST_SIDE, FIRST_SIDE, generator=generator))
        smooth = torch.randn(regions, 1, 5, 5, generator=generator)
        while True:
            now = sparse.index_map.shape[1]
            scores = interpolate(smooth, (now, now), mode="bicubic")[:, 0][sparse.cells.long().unbind(1)]
            if now >= side:
                break
            sparse = sparse.split_highest(scores, count).upsample()
            sparse = sparse.replace_active(torch.randn(sparse.active.shape, generator=generator))
        tensors = (sparse.active, sparse.passive, sparse.index_map, sparse.cells)
        dtype, device = weights.child.dtype, weights.child.device
        self.sparse = SparseMap(*(x.to(device, dtype if x.is_floating_point() else None) for x in tensors))
        self.scores = scores.to(device)
        self.count = min(count, len(scores))
        self.weights = weights

    def chosen(self) -> Tensor:
        """Rows of the active cells that are refined, ascending."""
        return self.scores.topk(self.count).indices.sort().values

    def cells(self, chosen: Tensor) -> list[Tensor]:
        """Region, y and x of the cells of some rows, (n,) each."""
        return list(self.sparse.cells.index_select(0, chosen).long().unbind(1))

    def child_cells(self, chosen: Tensor) -> list[Tensor]:
        """The same of their children, (4 n,) each."""
        region, y, x = (axis[:, None].expand(-1, 4) for axis in self.cells(chosen))
        child = torch.arange(4, device=chosen.device)
        return [axis.flatten() for axis in (region, 2 * y + child // 2, 2 * x + child % 2)]


class Structure(ABC):
    """A way to keep a map.

    Attributes:
        features: those of the case's map, as they are kept.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.features = self.keep(case.sparse).detach().requires_grad_()

    @abstractmethod
    def keep(self, sparse: SparseMap) -> Tensor:
        """The features of a map."""

    @abstractmethod
    def refine(self) -> tuple[Tensor, list[Tensor]]:
        """The children's features (4 count, F), and what is kept of the refined map for its convolution."""


class Dense(Structure):
    def keep(self, sparse: SparseMap) -> Tensor:
        return sparse.dense().contiguous()

    def refine(self) -> tuple[Tensor, list[Tensor]]:
        chosen, weights = self.case.chosen(), self.case.weights
        region, y, x = self.case.cells(chosen)
        refined = self.features.new_zeros(len(self.features), 1, *self.features.shape[2:])
        refined[region, 0, y, x] = 1
        added = conv2d(self.features, weights.child[:, :, None, None], weights.child_bias).unflatten(1, (2, 2, -1))
        added = added.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
        fine = interpolate(self.features, scale_factor=2) + added * interpolate(refined, scale_factor=2)
        output = sum(
            conv2d(fine, kernel, bias, padding=dilation, dilation=dilation).relu()
            for kernel, bias, dilation in zip(weights.kernels, weights.biases, weights.dilations)
        )
        region, y, x = self.case.child_cells(chosen)
        return output[region, :, y, x], [fine]


class Pointwise(Structure):
    def keep(self, sparse: SparseMap) -> Tensor:
        return sparse.active

    def refine(self) -> tuple[Tensor, list[Tensor]]:
        weights = self.case.weights
        fine = weights.children(self.features.index_select(0, self.case.chosen()))
        output = sum(
            linear(fine, kernel[:, :, 1, 1], bias).relu() for kernel, bias in zip(weights.kernels, weights.biases)
        )
        return output, [fine]


class Neighbors(Structure):
    """T neighbours of an active cell, itself among them, of which those of several dilations are kept once.

    Attributes:
        taps: (dilations, 9) the neighbours that each dilation reads.
        sources: (4, T) where the neighbours of each child come from: four times one of the P neighbours of its parent,
            plus which child of that it is.
        scores: (N_A, P) of the neighbours; -inf for those that are passive or beyond the border.
    """

    def __init__(self, case: Case) -> None:
        dilations, device = case.weights.dilations, case.scores.device
        steps = [(d * i, d * j) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1)]
        neighbours = sorted(set(steps))
        self.taps = torch.tensor([neighbours.index(step) for step in steps], device=device).view(-1, 9)
        reach = (max(dilations) + 1) // 2  # of the parents around a parent
        self.side = 2 * reach + 1
        sources = []
        for child in range(4):
            places = [(child // 2 + dy, child % 2 + dx) for dy, dx in neighbours]
            sources += [((y // 2 + reach) * self.side + x // 2 + reach, 2 * (y % 2) + x % 2) for y, x in places]
        self.used = sorted({parent for parent, _ in sources})
        rows = [4 * self.used.index(parent) + child for parent, child in sources]
        self.sources = torch.tensor(rows, device=device).view(4, -1)
        super().__init__(case)
        active, passive = (x.new_ones(len(x), 2) for x in (case.sparse.active, case.sparse.passive))
        active[:, 0], passive[:, 0] = case.scores, -torch.inf
        scores, inside = self.keep(case.sparse.replace_features(active, passive)).unbind(2)
        self.scores = torch.where(inside > 0, scores, -torch.inf)

    def keep(self, sparse: SparseMap) -> Tensor:
        return sparse.gather(self.side)[:, self.used]

    def refine(self) -> tuple[Tensor, list[Tensor]]:
        chosen, weights = self.case.chosen(), self.case.weights
        parents, scores = self.features.index_select(0, chosen), self.scores.index_select(0, chosen)
        lowest = self.scores[chosen, self.used.index(self.side**2 // 2)].min()  # of the chosen cells themselves
        refined = (scores >= lowest)[..., None, None]
        fine = parents[:, :, None] + weights.added(parents) * refined  # (count, P, 4, F)
        fine = fine.flatten(1, 2)[:, self.sources].flatten(0, 1)  # (4 count, T, F)
        output = sum(
            linear(fine[:, taps].flatten(1), kernel.permute(0, 2, 3, 1).flatten(1), bias).relu()
            for taps, kernel, bias in zip(self.taps, weights.kernels, weights.biases)
        )
        return output, [fine]


class SparseOnDense(Structure):
    def keep(self, sparse: SparseMap) -> Tensor:
        return sparse.dense().permute(0, 2, 3, 1).contiguous()

    def refine(self) -> tuple[Tensor, list[Tensor]]:
        chosen, weights = self.case.chosen(), self.case.weights
        regions, height, width, channels = self.features.shape
        fine = self.features[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(-1, channels)
        cells = self.case.child_cells(chosen)
        rows = (cells[0] * 2 * height + cells[1]) * 2 * width + cells[2]
        fine = fine.index_copy(0, rows, weights.children(self.features[tuple(self.case.cells(chosen))]))
        index_map = torch.arange(len(fine), dtype=torch.int32, device=fine.device)
        index_map = index_map.view(regions, 2 * height, 2 * width)
        convolutions = weights.kernels, weights.biases, weights.dilations
        output = multi_dilation_sparse_conv2d(fine, index_map, torch.stack(cells, 1).int(), *convolutions)
        return output, [fine]  # of the map of rows, which counts them, nothing must be kept


class SPS(Structure):
    def keep(self, sparse: SparseMap) -> Tensor:
        return sparse.features

    def refine(self) -> tuple[Tensor, list[Tensor]]:
        case, weights = self.case, self.case.weights
        number = len(case.scores)
        sparse = case.sparse.replace_features(self.features[:number], self.features[number:])
        sparse = sparse.split_highest(case.scores, case.count)
        children = weights.children(sparse.active)
        sparse = sparse.upsample().replace_active(children)
        convolutions = weights.kernels, weights.biases, weights.dilations
        features = sparse.features
        output = multi_dilation_sparse_conv2d(features, sparse.index_map, sparse.cells, *convolutions)
        return output, [features, sparse.index_map, sparse.cells]


STRUCTURES: dict[str, type[Structure]] = {
    kind.__name__: kind for kind in (Dense, Pointwise, Neighbors, SparseOnDense, SPS)
}


@dataclass(frozen=True)
class Measurement(PassCosts):
    """Also MiB of the result, and how far it is from that of SPS, relative to its largest magnitude."""

    storage: float
    difference: float


def measure(structure: Structure, expected: Tensor, device: str, repeat: int) -> Measurement:
    leaves = [structure.features, *structure.case.weights.leaves()]
    grad = torch.ones_like(expected)

    @torch.no_grad()
    def forward() -> tuple[Tensor, list[Tensor]]:
        return structure.refine()

    def both() -> None:
        torch.autograd.grad(structure.refine()[0], leaves, grad)

    output, kept = forward()
    storage = sum(tensor.numel() * tensor.element_size() for tensor in kept) / 2**20
    difference = ((output - expected).abs().max() / expected.abs().max()).item()
    del output, kept
    return Measurement(*pass_costs(forward, both, device, repeat, warmup=1), storage, difference)


def draw(measured: Mapping[int, Mapping[str, Measurement]]) -> Figure:
    """Time, memory and storage against the cells a side of a refined region.

    Args:
        measured: by the side before and the structure's name.
    """
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    labels = {"both": "forward and backward (ms)", "both_memory": "peak memory (MiB)", "storage": "storage (MiB)"}
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items()):
        for marker, structure in zip("osD^v", STRUCTURES):
            values = [getattr(results[structure], name) for results in measured.values()]
            axes.plot([2 * side for side in measured], values, marker=marker, label=structure)
        axes.set_yscale("log")
        axes.set_xticks([2 * side for side in measured])
        axes.set_xlabel("cells a side")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def main() -> None:
    parser = make_parser(__doc__)
    sides = [FIRST_SIDE * 2**number for number in range(3)]
    parser.add_argument("--sides", type=int, nargs="+", default=sides, help="cells a side before the refinement")
    parser.add_argument("--regions", type=int, default=61)
    parser.add_argument("--count", type=int, default=10000, help="cells that are refined, of all regions together")
    parser.add_argument("--width", type=int, default=32, help="channels")
    parser.add_argument("--dilations", type=int, nargs="+", default=[1, 3, 5])
    arguments = parse_benchmark(parser, repeat=(20, 3), dtypes=["float32", "float64"])
    if wrong := [side for side in arguments.sides if side not in {FIRST_SIDE * 2**number for number in range(5)}]:
        parser.error(f"--sides {wrong}: a side is {FIRST_SIDE}, doubled up to four times")
    device = arguments.device

    lines = [
        f"{arguments.count} cells of {arguments.regions} regions are refined, {arguments.width} channels, dilations "
        f"{', '.join(map(str, arguments.dilations))}, {arguments.dtype}.",
        f"Measured on: {machine(device)}",
        f"Median of {arguments.repeat} runs; peak memory beyond the inputs; storage: of the refined map, as its "
        "convolutions read it; x: how many times as much as SPS; difference: of the result from that of SPS. Pointwise "
        "ignores neighbours; the others ignore nothing.",
    ]
    weights = Weights.draw(arguments.width, arguments.dilations, getattr(torch, arguments.dtype), device)
    fields = ("forward", "both", "forward_memory", "both_memory", "storage")
    columns = ("forward ms", "+ backward ms", "forward MiB", "+ backward MiB", "storage MiB")
    header = ["structure", *(text for column in columns for text in (column, "x")), "difference"]
    measured = {}
    for side in arguments.sides:
        case = Case(side, arguments.regions, arguments.count, weights)
        expected = SPS(case).refine()[0].detach()
        results = {name: measure(kind(case), expected, device, arguments.repeat) for name, kind in STRUCTURES.items()}
        rows = []
        for name, result in results.items():
            row = [name]
            for field in fields:
                value = getattr(result, field)
                row += [f"{value:.4g}", f"{value / getattr(results['SPS'], field):.2f}"]
            rows.append([*row, f"{result.difference:.1e}"])
        measured[side] = results
        title = f"From {side}x{side} to {2 * side}x{2 * side} cells, {len(expected)} of them active"
        lines += ["", f"## {title}", "", markdown_table(rows, header)]
    if arguments.save is not None:
        plot = arguments.save.with_suffix(".png")
        draw(measured).savefig(plot, dpi=100)
        lines[3:3] = ["", f"![Time, memory and storage]({plot.name})"]
    title = "Structures of a map that is refined in places"
    show_page(title, "benchmarks/refinement_structures.py", "\n".join(lines), arguments.save)


if __name__ == "__main__":
    main()
