"""Evaluate every refinement stage of an ISTR in one run (Figure 3 of its paper), and draw images stage by stage.

    python tools/analyze_stages.py --config-file FILE --output FOLDER [--images N] [KEY VALUE ...]

FOLDER gets stages.md and stages.json with box and mask AP of every stage, stages.png with their curves, and a picture
of each of the first images: ground truth, then boxes and masks after every stage.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from querymask.command_line import add_config, add_data, load_config, make_parser
from querymask.common.data.annotations import read_dataset
from querymask.common.data.image_files import ImageReader
from querymask.common.engine import Trainer
from querymask.common.engine.checks import check_num_classes
from querymask.common.evaluation.coco import InstanceEvaluator
from querymask.common.fonts import set_font
from querymask.common.predictor import Predictor
from querymask.common.visualization import PictureNames, write_image
from querymask.istr import ISTR
from querymask.istr.figures import draw_stages

TASKS = {"bbox": "box AP", "segm": "mask AP"}
Results = list[dict[str, float]]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config(parser, "config of an ISTR")
    add_data(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where results go")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="evaluate the first N images only (0: all)")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="draw the first N images (4)")
    parser.add_argument("--score", type=float, default=0.3, help="least score of what is drawn (0.3)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Results:
    """Evaluate, write and draw; returns AP by task, of every stage."""
    args = parse_arguments(arguments)
    cfg = load_config(args.config_file, args.opts, data=args.data)
    if cfg.MODEL.META_ARCHITECTURE != "ISTR":
        raise SystemExit(f"{args.config_file} is a {cfg.MODEL.META_ARCHITECTURE}: only ISTR has refinement stages")
    if cfg.MODEL.PANOPTIC.ENABLED:
        raise SystemExit("AP of stages is that of instances: set MODEL.PANOPTIC.ENABLED False, and a data set of them")
    dataset = cfg.DATASETS.TEST[0]
    check_num_classes(cfg, [dataset])
    if not cfg.MODEL.WEIGHTS:
        print("MODEL.WEIGHTS is empty: a model with random weights is evaluated")
    results = evaluate_stages(cfg, Predictor(cfg).model, dataset, args)
    table = [(stage, *scores.values()) for stage, scores in enumerate(results, start=1)]
    text = tabulate(table, headers=["stage", *(TASKS[task] for task in results[0])], tablefmt="pipe", floatfmt=".2f")
    print(text)
    (args.output / "stages.md").write_text(text + "\n")
    (args.output / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_stages(results, args.output / "stages.png")
    return results


@torch.no_grad()
def evaluate_stages(cfg: CfgNode, model: ISTR | nn.Module, dataset: str, args: argparse.Namespace) -> Results:
    """AP of every stage; each image goes through the network once."""
    number = model.detector.num_layers
    records = {record["image_id"]: record for record in read_dataset(dataset)}
    evaluators = [
        InstanceEvaluator(
            dataset, str(args.output / f"stage_{stage + 1}"), max_detections=cfg.TEST.DETECTIONS_PER_IMAGE
        )
        for stage in range(number)
    ]
    for evaluator in evaluators:
        evaluator.reset()
    loader = Trainer.build_test_loader(cfg, dataset)
    reader, picture_names = ImageReader.from_config(cfg), PictureNames(".png")
    set_font(cfg.VIS_FONT)
    seen = []
    for index, inputs in enumerate(tqdm(itertools.islice(loader, args.images or None), unit="image", mininterval=1)):
        found, made = model.predict(model.preprocess(inputs))
        sizes = [(item["height"], item["width"]) for item in inputs]
        by_stage = [model.detect(found, made, sizes, stage) for stage in range(number)]
        for evaluator, detections in zip(evaluators, by_stage, strict=True):
            evaluator.process(inputs, [{"instances": instances} for instances in detections])
        seen += [item["image_id"] for item in inputs]
        if index < args.pictures:
            record = records[inputs[0]["image_id"]]
            stages = [detections[0].to("cpu") for detections in by_stage]
            names = MetadataCatalog.get(dataset).get("thing_classes") or ()
            name = picture_names(record["file_name"])
            try:
                image = reader(record["file_name"])
                write_image(
                    args.output / name, draw_stages(image, stages, names, args.score, record.get("annotations", []))
                )
            except Exception as error:  # whatever it is, the evaluation goes on
                tqdm.write(f"there is no picture of {record['file_name']}: {type(error).__name__}: {error}")
    results = []
    for evaluator in evaluators:
        scores = evaluator.evaluate(img_ids=seen if args.images else None)
        results.append({task: float(scores[task]["AP"]) for task in TASKS if task in scores})
    return results


def plot_stages(results: Results, path: Path) -> None:
    """AP over the stages."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for task in results[0]:
        numbers = range(1, len(results) + 1)
        axes.plot(numbers, [scores[task] for scores in results], marker="o", label=TASKS[task])
    axes.set(xlabel="stage", ylabel="AP", xticks=range(1, len(results) + 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.8, edgecolor="none")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
