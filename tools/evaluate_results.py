"""AP of boxes, masks and boundaries, or panoptic quality, from a result file, without the model that made it.

    python tools/evaluate_results.py RESULTS.json --dataset coco_2017_val
    python tools/evaluate_results.py RESULTS.json --annotations instances_val2017.json --lvis lvis_v1_val.json
    python tools/evaluate_results.py predictions.json --dataset coco_2017_val_panoptic

A result file is what evaluation writes as inference/coco_instances_results.json: COCO's result format, of any code; or
of a panoptic model inference/predictions.json, with the PNG files in a folder of the same name beside it.
With --lvis, masks are evaluated against LVIS's annotations of the same images, too: AP* and APB* of PointRend and
EffSeg. See querymask.common.evaluation.lvis for the rules.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401

from querymask.command_line import make_parser
from querymask.common.data.annotations import read_coco
from querymask.common.data.folders import register_folder
from querymask.common.engine.checks import dataset_classes
from querymask.common.evaluation import lvis, scores
from querymask.common.evaluation.panoptic import is_panoptic_result
from querymask.common.evaluation.report import results_table
from querymask.common.evaluation.results import evaluate_results, fit_results, read_results, register_annotations
from querymask.common.evaluation.truth import dataset_truth, index


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("results", metavar="FILE", help="detections in COCO's result format")
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--dataset", metavar="NAME", help="registered data set of the results")
    truth.add_argument("--data", metavar="FOLDER", help="folder of own data (docs/your_own_data.md)")
    truth.add_argument("--annotations", metavar="FILE", help="its annotation file in COCO's format instead")
    parser.add_argument("--lvis", metavar="FILE", help="annotation file of LVIS: gives mask* and boundary*")
    parser.add_argument("--no-boundary", action="store_true", help="boxes and masks only")
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="how many detections of an image count, as TEST.DETECTIONS_PER_IMAGE of a config (default: COCO's "
        f"{scores.MAX_DETECTIONS} of each class; with --lvis, LVIS's {lvis.MAX_DETECTIONS})",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the scores to this JSON file")
    args = parser.parse_args(arguments)
    if args.max_detections is not None and args.max_detections < 1:
        parser.error("--max-detections must be at least 1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        panoptic = is_panoptic_result(args.results)
        if args.lvis and panoptic:
            parser.error("--lvis is for instances, and the results are panoptic")
        if args.annotations:
            name = register_annotations(args.annotations)
        else:
            name = args.dataset or register_folder(args.data, panoptic).evaluated
            dataset_classes(name)  # an error for a name that is not registered
        found = evaluate_results(args.results, name, not args.no_boundary, args.max_detections or scores.MAX_DETECTIONS)
        if args.lvis:
            content = dataset_truth(name)
            results = fit_results(read_results(args.results), content, name, args.results)
            limit = args.max_detections or lvis.MAX_DETECTIONS
            starred, missing, count = lvis.evaluate_on_lvis(index(content), read_coco(args.lvis), results, limit)
            found.update(starred)
            print(
                f"LVIS: {count} of {len(content['images'])} images. Categories that LVIS lacks: "
                f"{', '.join(missing) or 'none'}"
            )
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    print(f"results on {name}:\n{results_table(found)}" if found else f"{name} has no ground truth")
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
