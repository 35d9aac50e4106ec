"""Turn a published checkpoint into a file that MODEL.WEIGHTS loads.

    python tools/convert_checkpoint.py --config-file CONFIG INPUT OUTPUT.pth [KEY VALUE ...]

The format of INPUT is recognised. Nothing in it is executed. Formats and options: docs/checkpoints.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import querymask  # before Detectron2, which it makes importable on current libraries

# isort: split
from detectron2.config import CfgNode

from querymask.command_line import add_config, load_config, make_parser
from querymask.common.backbones.timm_model import convert_timm
from querymask.common.checkpoint import (
    FORMATS,
    CheckpointError,
    Options,
    Report,
    coco_class_ids,
    fit_to_model,
    read_checkpoint,
    read_content,
    recognise,
    write_checkpoint,
)
from querymask.common.engine import num_classes_key
from querymask.common.measured_models import build_on_meta
from querymask.model_zoo import fitting_configs, get_value

SHOWN_KEYS = 12
SHOWN_CONFIGS = 5


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--report", metavar="FILE", help="write what became of every key to this file")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--keep-classes",
        action="store_true",
        help="keep every row of the class head, instead of picking COCO's 80 from rows indexed by raw category ids",
    )
    classes.add_argument(
        "--drop-classes", action="store_true", help="leave the class head out, to train on another data set"
    )
    parser.add_argument("--detector-only", action="store_true", help="leave the mask branch out")
    parser.add_argument(
        "--partial", action="store_true", help="write what fits even if something does not, to train from it"
    )
    parser.add_argument(
        "input", metavar="INPUT", help='a .pth, .pkl or .safetensors file; "timm": the weights that timm fetches'
    )
    parser.add_argument("output", metavar="OUTPUT", help="the file to write, ending in .pth")
    add_config(parser, "config of the model to convert for")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversion; returns the exit status."""
    args = parse_arguments(arguments)
    cfg = load_config(args.config_file, args.opts, "meta")  # only names and shapes of the model are needed
    try:
        convert(args, cfg)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Read, convert, report and write.

    Raises:
        CheckpointError: the file cannot be read, is of another model, or does not fit the config.
    """
    timm_backbone = cfg.MODEL.BACKBONE.NAME.startswith("build_timm_")
    state = None if timm_backbone and args.input == "timm" else read_checkpoint(args.input)
    if timm_backbone and (state is None or not any(key.startswith("backbone.") for key in state)):
        weights = convert_timm(cfg, state)
        write_checkpoint(weights, args.output, f"querymask {querymask.__version__}, converted from {args.input}")
        print(f"Written: {args.output} ({len(weights)} tensors of timm's {cfg.MODEL.TIMM.NAME})")
        return
    format = recognise(state, cfg.MODEL.META_ARCHITECTURE)
    if format is None:
        known = ", ".join(format.name for format in FORMATS if format.convert)
        raise CheckpointError(
            f"{args.input}: the model is not recognised. Its keys begin with {', '.join(list(state)[:4])}. "
            f"What can be converted: {known}."
        )
    print(f"{args.input}: {format.description(state)}")
    if format.convert is None:
        raise CheckpointError(f"{args.input} looks like {format.name}. {format.advice}")

    shapes = {key: tuple(value.shape) for key, value in build_on_meta(cfg).state_dict().items()}
    options = Options(
        class_ids=None if args.keep_classes or args.drop_classes else coco_class_ids(),
        drop_classes=args.drop_classes,
        detector_only=args.detector_only,
        model_keys=shapes.keys(),
    )
    try:
        fitted, report = fit_to_model(*format.convert(state, options), shapes, format.new_keys(options))
    except CheckpointError as error:
        raise CheckpointError(f"{args.input}: {error}") from error
    print(report.summary())
    if args.report:
        Path(args.report).write_text(report.details() + "\n")
        print(f"All keys: {args.report}")
    settings = format.settings(state, options) if format.settings else {}
    same = all(get_value(cfg, key) == value for key, value in settings.items())
    if not (report.fits and same) and not args.partial:
        raise CheckpointError(refusal(args, cfg, format.description(state), settings, report))
    if not fitted:
        raise CheckpointError(f"{args.input}: nothing in it fits {args.config_file}.")
    author = f"querymask {querymask.__version__}, converted from {Path(args.input).name}"
    write_checkpoint(fitted, args.output, author, () if args.drop_classes else class_names(args.input, cfg))
    print(f"Written: {args.output} ({len(fitted)} tensors)")


def class_names(path: str, cfg: CfgNode) -> list[str]:
    """The names of the classes that a file of this project has, if the config's model has as many."""
    content, key = read_content(path), num_classes_key(cfg)
    names = list(content.get("class_names") or ()) if isinstance(content, Mapping) else []
    return names if key is not None and len(names) == get_value(cfg, key) else []


def refusal(args: argparse.Namespace, cfg: CfgNode, description: str, settings: dict[str, Any], report: Report) -> str:
    """Why a file was not converted: what it looks like, where the config differs, and which configs fit."""
    lines = [f"{args.input} does not fit {args.config_file}. It looks like {description}."]
    differing = {key: value for key, value in settings.items() if get_value(cfg, key) != value}
    if differing:
        lines.append("It needs other settings than the config has:")
        lines += [f"  {key} {value} (config: {get_value(cfg, key)})" for key, value in differing.items()]
        configs = fitting_configs(settings)
        more = f", and {len(configs) - SHOWN_CONFIGS} more" if len(configs) > SHOWN_CONFIGS else ""
        if configs:
            lines.append(f"Configs that have them: {', '.join(configs[:SHOWN_CONFIGS])}{more}")
        else:
            lines.append("No config of QueryMask has them all; give them as KEY VALUE after OUTPUT.")
    if not report.fits:
        lines.append(report.details(*Report.MISFITS, limit=SHOWN_KEYS))
    lines.append("--partial writes what fits; --drop-classes leaves out the class head. See docs/checkpoints.md.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
