"""Networks as they are beside ``torch.compile``: in inference, or in a training step.

    python benchmarks/compiled_models.py --save benchmarks/results/compiled_models_cpu.md
    python benchmarks/compiled_models.py --training --config projects/solq/configs/solq_shapes.yaml

Random weights, one image of random pixels. The method ``network`` is compiled, from normalised images to what
detections are selected from, with no file of an earlier compilation. A training step is forward and backward pass with
the matching and the losses, which stay as they are. One thread on the CPU is timed in CPU time, which other jobs of the
machine disturb little. Compilation is CPU time of one process after the other. A ratio above 1 is a gain.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from querymask.command_line import load_config, make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.measured_models import make_batch, random_model
from querymask.common.measuring import machine, median_time

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [f"projects/{method}/configs/{method}_shapes.yaml" for method in ("solq", "isda", "istr", "effseg")]
BACKEND = "inductor"
OBJECTS = 5


def inference(model: nn.Module, items: list[dict]) -> Callable[[], object]:
    """The network alone, on a batch that is ready."""
    inputs = model.eval().network_inputs(model.preprocess(items))

    @torch.no_grad()
    def run() -> object:
        return model.network(*inputs)

    return run


def training(model: nn.Module, items: list[dict]) -> Callable[[], object]:
    """A step without the optimiser."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with EventStorage():
            sum(model(items).values()).backward()

    return run


def measure(config: str, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    cfg = load_config(ROOT / config, ["MODEL.WEIGHTS", "", *args.set], args.device)
    model = random_model(cfg)
    items = make_batch(1, (args.height, args.width), OBJECTS, get_key(cfg, num_classes_key(cfg)))
    run = (training if args.training else inference)(model, items)
    torch._dynamo.reset()
    plain, compiled = model.network, torch.compile(model.network, backend=BACKEND, fullgraph=True, dynamic=False)

    def timed(network: Callable[..., object]) -> float:
        model.network = network
        return median_time(run, args.device, 1, warmup=0)

    timed(plain)
    with inductor.patch(compile_threads=1), fresh_cache():
        start = sum(os.times()[:4])  # of this process and the compilers that it has called
        timed(compiled)
        seconds = sum(os.times()[:4]) - start
    timed(compiled)
    times = [(timed(plain), timed(compiled)) for _ in range(args.repeat)]  # in turn, as others make the machine slow
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    row = [Path(config).stem, f"{before:.0f}", f"{after:.0f}", f"{before / after:.2f} x", f"{seconds:.0f}"]
    print(*row, flush=True)
    return row


def main() -> None:
    """Measure all models and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="FILE", help="(the configs for shapes)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the configs")
    parser.add_argument("--training", action="store_true", help="a training step in place of inference")
    parser.add_argument("--height", type=int, default=128, help="of the image (128)")
    parser.add_argument("--width", type=int, default=128, help="of the image (128)")
    args = parse_benchmark(parser, repeat=(20, 11))
    what = "training step" if args.training else "network"
    headers = ("", f"{what} ms", "compiled ms", "gain", "compilation s")
    text = (
        f"One image of {args.height}x{args.width}{f' with {OBJECTS} objects' if args.training else ''}. Median of "
        f"{args.repeat} runs. {machine(args.device)}\n\n"
        + markdown_table([measure(config, args) for config in args.config], headers)
    )
    title = "Training steps with compiled networks" if args.training else "Compiled networks in inference"
    show_page(title, "benchmarks/compiled_models.py", text, args.save)


if __name__ == "__main__":
    main()
