"""Write a model as one file that needs neither its config nor this project, and compare both on images of the test set.

    python tools/export_model.py --config-file FILE --output model.onnx [--num-images N] MODEL.WEIGHTS FILE
    python tools/export_model.py --run FOLDER --output model.pt2 [--num-images N]

The ending chooses the form: .onnx for ONNX Runtime and others (package onnxscript; to compare, onnxruntime), .pt2 for
torch.export.load. What goes in and comes out, and which models can be exported: docs/export.md. demo.py and
train_net.py --eval-only take the file as MODEL.WEIGHTS. The exit status is 1 where both are not the same: scores
differ by more than 1e-4, a mask by more than 0.1% of the pixels, or AP or PQ by more than 0.1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from torch import nn

from querymask.command_line import add_data, load_config, load_run, make_parser, markdown_table
from querymask.common.data.annotations import is_panoptic, read_dataset
from querymask.common.data.mapper import InstanceMapper
from querymask.common.evaluation import InstanceEvaluator
from querymask.common.evaluation.panoptic import PanopticEvaluator
from querymask.common.export import Description, ExportedModel, ExportNetwork, export_program, write
from querymask.common.export.comparison import AP_LIMIT, Differences, compare, detections_of
from querymask.common.export.files import require
from querymask.common.predictor import Predictor


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE")
    model.add_argument("--run", metavar="FOLDER", help="OUTPUT_DIR of a training run")
    add_data(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write, .onnx or .pt2")
    parser.add_argument(
        "--num-images", type=int, default=8, metavar="N", help="compare on the first N images of DATASETS.TEST (8)"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export and compare; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        require(args.output)
        load, source = (load_run, args.run) if args.run else (load_config, args.config_file)
        cfg = load(source, args.opts, device="cpu", data=args.data)
        predictor = Predictor(cfg)
        network = ExportNetwork(predictor.model)
        names = list(predictor.class_names)
        description = Description(cfg.MODEL.META_ARCHITECTURE, network.outputs, names, network.num_things)
        write(export_program(network), description, args.output)
        print(f"{args.output} is written")
        if not args.num_images:
            return 0
        return 0 if show_comparison(cfg, predictor.model, ExportedModel(args.output), args.num_images) else 1
    except (ValueError, KeyError, OSError, ImportError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1


def show_comparison(cfg: CfgNode, model: nn.Module, exported: nn.Module, number: int) -> bool:
    """Print how both differ on images of the test set, and how long they take; whether they are the same."""
    name = cfg.DATASETS.TEST[0]
    items = [InstanceMapper(cfg, is_train=False)(entry) for entry in read_dataset(name)[:number]]
    total, seconds, scores = Differences(), [], []
    found: list[list[dict[str, Any]]] = []
    for detect in (model, exported):
        outputs, spent = run(detect, items)
        seconds.append(spent)
        scores.append(evaluate(name, items, outputs))
        found.append(outputs)
    for expected, given in zip(*found, strict=True):
        total |= compare(detections_of(expected), detections_of(given))
    kind = "segments" if cfg.MODEL.PANOPTIC.ENABLED else "detections"
    print(
        f"{len(items)} images, {total.count} {kind}: scores differ by at most {total.scores:.1e}, boxes by "
        f"{total.boxes:.1e} pixels, masks on {total.masks:.2%} of the pixels; {total.unpaired} without a partner"
    )
    differences = {task: score_difference(*(of_model[task] for of_model in scores)) for task in scores[0]}
    rows = [
        [task, *(f"{of_model[task]:.2f}" for of_model in scores), f"{difference:.2f}"]
        for task, difference in differences.items()
    ]
    rows.append(["ms an image", *(f"{1000 * spent:.0f}" for spent in seconds), f"{seconds[1] / seconds[0]:.2f} x"])
    print(markdown_table(rows, ["", "model", "exported", "difference"]))
    return total.small and all(difference <= AP_LIMIT for difference in differences.values())


def run(
    detect: Callable[[list[dict[str, Any]]], Any], items: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], float]:
    """What is found in every image, and the seconds that one takes, the first left out where there are more."""
    found, seconds = [], []
    with torch.no_grad():
        for item in items:
            start = time.perf_counter()
            found += detect([item])
            seconds.append(time.perf_counter() - start)
    return found, sum(seconds[1:] or seconds) / len(seconds[1:] or seconds)


def evaluate(name: str, items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """AP or PQ of every task, on these images of the set alone; of panoptic maps none where the set has none."""
    panoptic = "panoptic_seg" in outputs[0]
    if panoptic and not is_panoptic(name):
        return {}
    evaluator = PanopticEvaluator(name, None) if panoptic else InstanceEvaluator(name, None)
    evaluator.reset()
    evaluator.process(items, outputs)
    scores = evaluator.evaluate([item["image_id"] for item in items])
    return {task: of_task["PQ" if panoptic else "AP"] for task, of_task in scores.items()}


def score_difference(first: float, second: float) -> float:
    """In points; 0 where neither model has a score."""
    return 0.0 if first != first and second != second else abs(first - second)


if __name__ == "__main__":
    sys.exit(main())
