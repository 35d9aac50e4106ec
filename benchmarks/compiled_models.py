"""Inference beside that of ``torch.compile`` and of ONNX Runtime: the model as it is, compiled, and exported.

    python benchmarks/compiled_models.py --save benchmarks/results/compiled_models_cpu.md
    python benchmarks/compiled_models.py --config projects/solq/configs/solq_r50.yaml --height 480 --width 640

Random weights, one image of random pixels, 100 detections with masks at the image's size where the model has as many
queries. Of ``torch.compile`` the network is compiled (from the normalised image to what is selected from), which the
column "network" has beside the same part as it is; "whole" is from pixels to masks. One thread is timed in CPU time,
which other jobs of the machine disturb little. A ratio above 1 is a gain.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch

from querymask.command_line import load_config, make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.export import Description, ExportedModel, ExportNetwork, export_program, write
from querymask.common.measured_models import random_image, random_model
from querymask.common.measuring import machine, median_time

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [f"projects/{method}/configs/{method}_shapes.yaml" for method in ("solq", "isda", "istr", "effseg")]
HEADERS = ("", "network ms", "compiled", "compilation s", "whole ms", "ONNX Runtime", "export s")


def measure(config: str, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    cfg = load_config(ROOT / config, ["MODEL.WEIGHTS", "", *args.set], args.device)
    model = random_model(cfg).eval()
    item = random_image(args.height, args.width)

    def timed(function: object, *inputs: object) -> float:
        return median_time(lambda: function(*inputs), args.device, args.repeat, warmup=1)

    inputs = model.network_inputs(model.preprocess([item]))
    torch._dynamo.reset()
    compiled = torch.compile(model.network, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    compiled(*inputs)
    compilation = time.perf_counter() - start
    plain, fast, whole = timed(model.network, *inputs), timed(compiled, *inputs), timed(model, [item])
    row = [Path(config).stem, f"{plain:.0f}", f"{plain / fast:.2f} x", f"{compilation:.0f}", f"{whole:.0f}"]
    if args.device != "cpu":
        return [*row, "CPU only", ""]
    start = time.perf_counter()
    network = ExportNetwork(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write(export_program(network), Description(cfg.MODEL.META_ARCHITECTURE, network.outputs, ()), file)
        spent = time.perf_counter() - start
        exported = timed(ExportedModel(file), [item])
    return [*row, f"{whole / exported:.2f} x", f"{spent:.0f}"]


def main() -> None:
    """Measure all models and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="FILE", help="(the configs for shapes)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the configs")
    parser.add_argument("--height", type=int, default=128, help="of the image (128)")
    parser.add_argument("--width", type=int, default=160, help="of the image (160)")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs (5)")
    args = parse_benchmark(parser)
    with torch.no_grad():
        rows: Sequence[list[str]] = [measure(config, args) for config in args.config]
    text = f"Image of {args.height}x{args.width}. {machine(args.device)}.\n\n{markdown_table(rows, HEADERS)}"
    show_page("Compiled and exported models", "benchmarks/compiled_models.py", text, args.save)


if __name__ == "__main__":
    main()
