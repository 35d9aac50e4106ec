"""Print the parameters, FLOPs and activations of a model.

    python tools/analyze_model.py --config-file CONFIG [--num-images N | --height H --width W] [KEY VALUE ...]

Without images, one of random pixels is used, as large as a photograph of 4:3 at the config's test size. What is counted
and how: docs/analysis.md.
"""

import argparse
import sys
from collections.abc import Sequence

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import numpy as np
from detectron2.modeling import build_model
from tabulate import tabulate

from querymask.command_line import add_config, add_images, check_images, load_config, make_parser, read_images
from querymask.common.engine import StrictCheckpointer
from querymask.common.flops import Cost, Parameters, count_parameters, measure
from querymask.common.mask_coding import fill_missing_bases
from querymask.common.measured_models import build_on_meta

GIGA = 1e9
MEGA = 1e6


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config(parser)
    add_images(parser)
    parser.add_argument("--depth", type=int, default=3, metavar="D", help="levels of modules in the tables (default 3)")
    parser.add_argument("--parameters-only", action="store_true", help="leave FLOPs and activations out")
    parser.add_argument(
        "--load-weights", action="store_true", help="load MODEL.WEIGHTS, for costs that depend on what is detected"
    )
    args = parser.parse_intermixed_args(arguments)
    check_images(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status."""
    args = parse_arguments(arguments)
    if args.parameters_only:
        model = build_on_meta(load_config(args.config_file, args.opts, "meta", data=args.data))
        print(parameter_table(count_parameters(model), args.depth))
        return 0
    cfg = load_config(args.config_file, args.opts, data=args.data)
    model = build_model(cfg)
    print(parameter_table(count_parameters(model), args.depth))
    if args.load_weights:
        StrictCheckpointer(model, cfg=cfg, complete=True).load(cfg.MODEL.WEIGHTS)
    fill_missing_bases(model)
    costs = []
    for item in read_images(args, cfg):
        costs.append(measure(model, item))
        height, width = item["image"].shape[1:]
        print(f"image {len(costs)}: {height} x {width}, {costs[-1].flops_by_module[''] / GIGA:.2f} GFLOP", flush=True)
    print(cost_tables(costs, args.depth))
    return 0


def within(depth: int, name: str) -> bool:
    """Whether a module is at most ``depth`` levels below the model."""
    return name == "" or name.count(".") < depth


def parameter_table(counts: dict[str, Parameters], depth: int) -> str:
    """Parameters by module."""
    rows = [
        (name or "(model)", count.total, count.trainable)
        for name, count in counts.items()
        if within(depth, name) and count.total
    ]
    headers = ["module", "parameters", "trainable"]
    return tabulate(rows, headers=headers, tablefmt="pipe", intfmt=",") + "\n"


def cost_tables(costs: Sequence[Cost], depth: int) -> str:
    """FLOPs by operator, FLOPs and activations by module, and what was not counted: means over the images."""
    spread = ["std"] if len(costs) > 1 else []

    def column(field: str, name: str) -> list[float]:
        return [getattr(cost, field).get(name, 0) for cost in costs]

    def cells(field: str, name: str, unit: float) -> list[str]:
        values = np.array(column(field, name)) / unit
        return [f"{values.mean():.3f}"] + [f"{values.std():.3f}" for _ in spread]

    def names(field: str, largest_first: bool) -> list[str]:
        found = list(dict.fromkeys(name for cost in costs for name in getattr(cost, field)))
        return sorted(found, key=lambda name: -sum(column(field, name))) if largest_first else found

    by_operator = [[name, *cells("flops_by_operator", name, GIGA)] for name in names("flops_by_operator", True)]
    by_operator.append(["(all)", *cells("flops_by_module", "", GIGA)])
    by_module = [
        [name or "(model)", *cells("flops_by_module", name, GIGA), *cells("activations_by_module", name, MEGA)]
        for name in names("flops_by_module", False)
        if within(depth, name) and any(column("flops_by_module", name))
    ]
    uncounted = [[name, *cells("uncounted", name, 1)] for name in names("uncounted", True)]
    module_headers = ["module", "GFLOP", *spread, "activations (million)", *spread]
    parts = (
        f"Means over {len(costs)} image(s). A multiply-add is one FLOP.",
        tabulate(by_operator, headers=["operator", "GFLOP", *spread], tablefmt="pipe", floatfmt=".3f"),
        tabulate(by_module, headers=module_headers, tablefmt="pipe", floatfmt=".3f"),
        "Not counted, because they have no formula:",
        tabulate(uncounted, headers=["operator", "calls per image", *spread], tablefmt="pipe"),
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
