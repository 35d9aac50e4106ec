"""Print what models cost side by side: parameters, FLOPs, images per second, memory; and what a paper says of them.

    python tools/compare_costs.py CONFIG [CONFIG ...] [--num-images N] [--save TABLE.md] [--json RESULTS.json]
    python tools/compare_costs.py --paper effseg --regions 61

Weights are random, unless --load-weights is given. What the segmentation head is, and how the number of detections is
fixed: docs/analysis.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from querymask.command_line import add_images, add_save, check_images, load_config, make_parser, read_images, show_page
from querymask.common.engine import StrictCheckpointer
from querymask.common.flops import count_parameters, measure
from querymask.common.measured_models import random_model
from querymask.common.measuring import machine, median_time, peak_memory
from querymask.effseg.effseg import EffSeg
from querymask.effseg.measuring import force_detections
from querymask.model_zoo import Leaf, leaves_of
from querymask.paper_numbers import costs, find_tables, table_choices


@dataclass(frozen=True)
class Result:
    """A row; None stands for what is not known.

    Attributes:
        name: of the config.
        source: "measured", or whose number it is.
        ap: mask AP on COCO, on the split of the paper's table.
        parameters, trainable: numbers.
        gflops, head_gflops: of an image, for the whole model and for the segmentation head.
        head: the head's modules.
        detections, regions: pairs of query and class that get masks, and masks that are made for them.
        fps: images per second, of all images together.
        memory: MiB at the peak, beyond weights and input, of the first image.
    """

    name: str
    source: str = "measured"
    ap: float | None = None
    parameters: float | None = None
    trainable: float | None = None
    gflops: float | None = None
    head_gflops: float | None = None
    head: str | None = None
    detections: int | None = None
    regions: int | None = None
    fps: float | None = None
    memory: float | None = None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default with --paper: the paper's models")
    papers = table_choices()
    text = f"print what its tables, or one of them, say beside what is measured: {', '.join(papers)}"
    parser.add_argument("--paper", choices=papers, metavar="NAME", help=text)
    add_images(parser, "mean over the first N images of DATASETS.TEST")
    parser.add_argument("--detections", type=int, default=100, metavar="D", help="of an image (default 100)")
    parser.add_argument("--regions", type=int, metavar="R", help="EffSeg: queries that these are of (default: D)")
    parser.add_argument("--load-weights", action="store_true", help="load MODEL.WEIGHTS; EffSeg finds what it finds")
    parser.add_argument("--repeat", type=int, default=3, metavar="K", help="timed runs; 0: no FPS and no memory")
    add_save(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, for plot_costs.py")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides of the configs")
    args = parser.parse_args(arguments)
    if not args.configs and not args.paper:
        parser.error("name configs, or a paper with --paper")
    check_images(parser, args)
    args.regions = args.detections if args.regions is None else args.regions
    if not 1 <= args.regions <= args.detections:
        parser.error(f"--regions must be from 1 to the number of detections, {args.detections}")
    if args.load_weights and args.regions != args.detections:
        parser.error("--regions is for models without weights")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    args = parse_arguments(arguments)
    tables = find_tables(args.paper) if args.paper else []
    said = leaves_of(tables)
    results = []
    paths = [Path(path) for path in args.configs or [leaf.path for leaf in said.values()]]
    for path in paths:
        name = path.stem
        if name in said:
            results.append(from_paper(said[name], tables[0].mark))
        alone = args.repeat and len(paths) > 1
        results.append(measure_alone(path, args) if alone else measure_config(path, args))
        print(f"{name}: {results[-1].gflops:.1f} GFLOPs", flush=True)
    remarks = [describe(args)]
    if tables:
        about = "; ".join(f"{table.name}: {table.about}" for table in tables)
        remarks.append(f'"{tables[0].mark}": {about}.')
    show_page("Costs", "tools/compare_costs.py", "\n\n".join([*remarks, table(results)]), args.save)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


def describe(args: argparse.Namespace) -> str:
    """What was measured on what."""
    if args.num_images:
        images = f"the first {args.num_images} image(s) of the test set"
    elif args.height:
        images = f"an image of random pixels, {args.height} x {args.width}"
    else:
        images = "an image of random pixels, 4:3 at the config's test size"
    where = f" On: {machine('cuda' if torch.cuda.is_available() else 'cpu')}" if args.repeat else ""
    weights = "weights of the configs" if args.load_weights else "random weights"
    return f'"measured": {images}; {weights}. A multiply-add is one FLOP.{where}'


def from_paper(leaf: Leaf, mark: str) -> Result:
    """What a paper or a release says of a config."""
    return Result(leaf.path.stem, mark, **costs(leaf.rows))


def measure_alone(path: Path, args: argparse.Namespace) -> Result:
    """The row of a config from a process of its own: the peak would be lower in memory that other models have left.

    Raises:
        SystemExit: the process failed, after saying why.
    """
    options = [f"--detections={args.detections}", f"--regions={args.regions}", f"--repeat={args.repeat}"]
    for name in ("data", "num_images", "height", "width"):
        if getattr(args, name) is not None:
            options.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    options += ["--load-weights"] if args.load_weights else []
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, __file__, str(path), f"--json={rows}", *options, "--opts", *args.opts]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if process.returncode:
            raise SystemExit(f"{path} could not be measured")
        (row,) = json.loads(rows.read_text())
    return Result(**row)


def measure_config(path: Path, args: argparse.Namespace) -> Result:
    """The row of a config.

    Raises:
        ValueError: more regions are asked for than EffSeg has queries.
    """
    cfg = load_config(path, ["TEST.DETECTIONS_PER_IMAGE", args.detections, *args.opts], data=args.data)
    model = (build_model if args.load_weights else random_model)(cfg).eval()
    if args.load_weights:
        StrictCheckpointer(model, cfg=cfg, complete=True).load(cfg.MODEL.WEIGHTS)
    detections, regions = cfg.TEST.DETECTIONS_PER_IMAGE, None
    if isinstance(model, EffSeg) and not args.load_weights:
        regions = force_detections(model, detections, args.regions)
    items = list(read_images(args, cfg))
    costs = [measure(model, item).flops_by_module for item in items]
    # Without decoding and pasting, which are no modules
    branch = None if getattr(model, "mask_branch", None) is None else type(model.mask_branch).__name__
    counts = count_parameters(model)[""]
    fps, memory = speed(model, items, cfg, args.repeat) if args.repeat else (None, None)
    return Result(
        name=path.stem,
        parameters=counts.total,
        trainable=counts.trainable,
        gflops=fmean(cost[""] for cost in costs) / 1e9,
        head_gflops=fmean(cost["mask_branch"] for cost in costs) / 1e9 if branch else None,
        head=branch,
        detections=detections,
        regions=regions,
        fps=fps,
        memory=memory,
    )


def speed(model: nn.Module, items: Sequence[Mapping[str, Any]], cfg: CfgNode, repeat: int) -> tuple[float, float]:
    """Images per second, one at a time, and MiB at the peak of the first."""
    device = torch.device(cfg.MODEL.DEVICE).type

    @torch.no_grad()
    def run(item: Mapping[str, Any]) -> None:
        model([item])

    # Others than the first need a run because their size may be new
    times = [median_time(partial(run, item), device, repeat, 1 if index else 3) for index, item in enumerate(items)]
    return 1e3 / fmean(times), peak_memory(partial(run, items[0]), device)


COLUMNS: dict[str, Callable[[Result], str | None]] = {
    "model": lambda r: r.name,
    "source": lambda r: r.source,
    "mask AP": lambda r: _number(r.ap, 1, 1),
    "parameters (M)": lambda r: _number(r.parameters, 1e6, 2),
    "trainable (M)": lambda r: _number(r.trainable, 1e6, 2 if r.source == "measured" else 1),
    "GFLOPs": lambda r: _number(r.gflops, 1, 1),
    "head GFLOPs": lambda r: _number(r.head_gflops, 1, 1),
    "head": lambda r: r.head,
    "detections": lambda r: _number(r.detections, 1, 0),
    "regions": lambda r: _number(r.regions, 1, 0),
    "images/s": lambda r: _number(r.fps, 1, 2),
    "peak MiB": lambda r: _number(r.memory, 1, 0),
}


def _number(value: float | None, unit: float, digits: int) -> str | None:
    return None if value is None else f"{value / unit:.{digits}f}"


def table(results: Sequence[Result]) -> str:
    """The rows in Markdown."""
    rows = [[column(result) for column in COLUMNS.values()] for result in results]
    return tabulate(rows, headers=list(COLUMNS), tablefmt="pipe", disable_numparse=True, missingval="–")


if __name__ == "__main__":
    sys.exit(main())
