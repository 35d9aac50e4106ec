"""EffSeg's head against the heads that it is compared with, on the same features and regions.

    python benchmarks/segmentation_heads.py --save benchmarks/results/segmentation_heads_cpu.md
    python benchmarks/segmentation_heads.py --device cuda --dtype bfloat16 --heads effseg pointrend

All heads run in this process. Features, queries and weights are random, boxes are of all sizes, and targets are the
ellipses in them. Inference ends with the regions' square masks: pasting them is the same for all. Training goes back to
weights, features and queries. GFLOPs are multiply-adds of inference. One thread on the CPU is timed in CPU time, which
other jobs of the machine disturb little; everything else in wall or device time.
"""

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass

import querymask  # noqa: F401  (before Detectron2, which it makes importable on current libraries)

# isort: split
import torch
from torch import Tensor, nn

from querymask.command_line import make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.flops import count_flops, count_parameters
from querymask.common.measuring import machine, median_time, peak_memory
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.heads.effseg import EffSegHead
from querymask.effseg.heads.mask_rcnn import MaskRCNNHead
from querymask.effseg.heads.pointrend import PointRendHead
from querymask.effseg.heads.refine_mask import RefineMaskHead
from querymask.effseg.regions import STRIDES, Regions, RegionTargets, SegmentationHead

WIDTH, NUM_CLASSES = 256, 80
HEADS: dict[str, tuple[str, Callable[[], SegmentationHead]]] = {
    "effseg": ("EffSeg", lambda: EffSegHead(width=WIDTH)),
    "mask_rcnn": ("Mask R-CNN++", lambda: MaskRCNNHead(WIDTH, NUM_CLASSES)),
    "pointrend": ("PointRend++", lambda: PointRendHead(WIDTH, NUM_CLASSES)),
    "refine_mask": ("RefineMask++", lambda: RefineMaskHead(WIDTH, NUM_CLASSES)),
}


class Case:
    """What the heads get: one image, its maps, regions and targets."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        device, self.size, count = arguments.device, (arguments.height, arguments.width), arguments.regions
        shapes = [
            (-(-arguments.height // 2**level), -(-arguments.width // 2**level)) for level in range(2, 2 + len(STRIDES))
        ]
        self.maps = [torch.randn(1, WIDTH, *shape, generator=generator).to(device).requires_grad_() for shape in shapes]
        self.queries = torch.randn(count, WIDTH, generator=generator).to(device).requires_grad_()
        extent = torch.tensor([arguments.width, arguments.height])
        sides = torch.exp(torch.rand(count, 2, generator=generator) * 3 - 3.3) * extent  # 4 to 74 % of the image's
        corners = torch.rand(count, 2, generator=generator) * (extent - sides)
        boxes = torch.cat([corners, corners + sides], dim=1)
        self.boxes = boxes.to(device)
        self.labels = torch.randint(NUM_CLASSES, (count,), generator=generator).to(device)
        x, y = torch.arange(arguments.width) + 0.5, torch.arange(arguments.height)[:, None] + 0.5
        masks = [
            ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25
            for x0, y0, x1, y1 in boxes.tolist()
        ]
        self.targets = RegionTargets([torch.stack(masks).to(device)], torch.arange(count, device=device))

    def regions(self, queries: Tensor) -> Regions:
        return Regions(self.boxes, torch.zeros_like(self.labels), queries, self.labels)


class Inference(nn.Module):
    """A head as a tracer wants it: tensors in, tensor out."""

    def __init__(self, head: SegmentationHead, case: Case) -> None:
        super().__init__()
        self.head = head
        self.case = case

    def forward(self, queries: Tensor, *maps: Tensor) -> Tensor:
        return self.head(FeaturePyramid(maps, STRIDES), self.case.size, self.case.regions(queries))


@dataclass(frozen=True)
class Measurement:
    """GFLOPs of inference, milliseconds and MiB of inference and of training."""

    gflops: float
    inference: float
    training: float
    inference_memory: float
    training_memory: float


def measure(head: SegmentationHead, case: Case, arguments: argparse.Namespace) -> Measurement:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    module, inputs = Inference(head, case), (case.queries, *case.maps)
    leaves = [*head.parameters(), *inputs]

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def infer() -> None:
        with autocast():
            module(*inputs)

    def train() -> None:
        with autocast():
            losses = head.losses(
                FeaturePyramid(case.maps, STRIDES), case.size, case.regions(case.queries), case.targets
            )
        torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True)  # not every head reads every map

    with torch.no_grad():
        gflops = count_flops(module, inputs).total() / 1e9
    times = [median_time(run, device, arguments.repeat) for run in (infer, train)]
    return Measurement(gflops, *times, *(peak_memory(run, device) for run in (infer, train)))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS), help="the first is the measure")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1088)
    parser.add_argument("--regions", type=int, default=100)
    arguments = parse_benchmark(parser, repeat=(20, 3), dtypes=["float32", "bfloat16", "float16"])  # of autocast

    case, rows, measurements = Case(arguments), [], []
    for name in arguments.heads:
        title, make = HEADS[name]
        torch.manual_seed(0)
        head = make().to(arguments.device)
        measurements.append(measure(head, case, arguments))
        row = [title, f"{count_parameters(head)[''].total:,}"]
        for value, base in zip(astuple(measurements[-1]), astuple(measurements[0])):
            row += [f"{value:.4g}", f"{value / base:.2f}"]
        print(", ".join(row), flush=True)
        rows.append(row)
    columns = ("GFLOPs", "inference ms", "training ms", "inference MiB", "training MiB")
    header = ["head", "parameters", *(text for column in columns for text in (column, "x"))]
    lines = [
        f"{arguments.regions} regions of an image of {arguments.height} x {arguments.width}, {arguments.dtype}.",
        f"Measured on: {machine(arguments.device)}",
        f"Median of {arguments.repeat} runs; peak memory beyond weights and inputs; x: how many times as much as "
        f"{HEADS[arguments.heads[0]][0]}.",
        "",
        markdown_table(rows, header),
    ]
    show_page("Segmentation heads", "benchmarks/segmentation_heads.py", "\n".join(lines), arguments.save)


if __name__ == "__main__":
    main()
