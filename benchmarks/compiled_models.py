"""Networks as they are beside ``torch.compile``: inference, and a training step.

    python benchmarks/compiled_models.py --save benchmarks/results/compiled_models_cpu.md
    python benchmarks/compiled_models.py --config projects/solq/configs/solq_r50.yaml --height 480 --width 640

Random weights, one image of random pixels. The method ``network`` is compiled, from normalised images to what
detections are selected from. A training step is forward and backward pass with the matching and the losses, which stay
as they are. One thread on the CPU is timed in CPU time, which other jobs of the machine disturb little; compilation in
wall time. A ratio above 1 is a gain.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.utils.events import EventStorage

from querymask.command_line import load_config, make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.measured_models import make_batch, random_model
from querymask.common.measuring import machine, median_time

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [f"projects/{method}/configs/{method}_shapes.yaml" for method in ("solq", "isda", "istr", "effseg")]
HEADERS = ("", "network ms", "compiled", "compilation s", "training step ms", "compiled", "compilation s")


def compare(call: Callable[[], object], compile_network: Callable[[], None], args: argparse.Namespace) -> list[str]:
    """Milliseconds of a call, their ratio to those with the network compiled, and seconds of compilation."""
    plain = median_time(call, args.device, args.repeat, warmup=1)
    compile_network()
    start = time.perf_counter()
    call()
    compilation = time.perf_counter() - start
    compiled = median_time(call, args.device, args.repeat, warmup=1)
    return [f"{plain:.0f}", f"{plain / compiled:.2f} x", f"{compilation:.0f}"]


def measure(config: str, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    cfg = load_config(ROOT / config, ["MODEL.WEIGHTS", "", *args.set], args.device)
    model = random_model(cfg)
    items = make_batch(1, (args.height, args.width), 5, get_key(cfg, num_classes_key(cfg)))
    inputs = model.network_inputs(model.preprocess(items))
    network = model.network

    def compile_network() -> None:
        torch._dynamo.reset()
        model.network = torch.compile(network, fullgraph=True, dynamic=False)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        sum(model(items).values()).backward()

    model.eval()
    with torch.no_grad():
        inference = compare(lambda: model.network(*inputs), compile_network, args)
    print(config, *inference, flush=True)
    model.train()
    model.network = network
    with EventStorage():
        training = compare(train, compile_network, args)
    row = [Path(config).stem, *inference, *training]
    print(" ".join(row), flush=True)
    return row


def main() -> None:
    """Measure all models and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="FILE", help="(the configs for shapes)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the configs")
    parser.add_argument("--height", type=int, default=128, help="of the image (128)")
    parser.add_argument("--width", type=int, default=128, help="of the image (128)")
    args = parse_benchmark(parser, repeat=(20, 5))
    rows = [measure(config, args) for config in args.config]
    text = (
        f"One image of {args.height}x{args.width}, 5 objects in training. {machine(args.device)}. Median of "
        f"{args.repeat} runs.\n\n{markdown_table(rows, HEADERS)}"
    )
    show_page("Compiled models", "benchmarks/compiled_models.py", text, args.save)


if __name__ == "__main__":
    main()
