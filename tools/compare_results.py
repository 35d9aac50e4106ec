"""Draw the detections of several models side by side, from their result files (ISDA's Figure 6, for any models).

    python tools/compare_results.py --dataset coco_2017_val --output FOLDER ISDA=a.json "Mask R-CNN=b.json" [...]

A result file is what evaluation writes as inference/coco_instances_results.json: COCO's result format, of any code.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from tqdm import tqdm

from querymask.command_line import make_parser
from querymask.common.data.annotations import read_dataset
from querymask.common.data.image_files import ImageReader
from querymask.common.data.segmentation import decode_segmentation
from querymask.common.evaluation.results import fit_results, read_results
from querymask.common.evaluation.truth import dataset_truth
from querymask.common.fonts import set_font
from querymask.common.visualization import PictureNames, contact_sheet, draw_instances, write_image


def results_by_image(path: str, dataset: str) -> dict[Any, list[dict[str, Any]]]:
    """Results of a file, with the ids of a data set, by image id."""
    by_image = defaultdict(list)
    for result in fit_results(read_results(path), dataset_truth(dataset), dataset, path):
        by_image[result["image_id"]].append(result)
    return by_image


def to_instances(
    results: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], classes: Mapping[int, int]
) -> Instances:
    """COCO results of an image as Instances; ``classes`` turns category ids into class indices."""
    height, width = entry["height"], entry["width"]
    instances = Instances((height, width))
    instances.scores = torch.tensor([r["score"] for r in results])
    instances.pred_classes = torch.tensor([classes[r["category_id"]] for r in results], dtype=torch.int64)
    if results and all("bbox" in r for r in results):
        corners = [BoxMode.convert(list(r["bbox"]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for r in results]
        instances.pred_boxes = Boxes(torch.tensor(corners))
    if results and all("segmentation" in r for r in results):
        masks = [decode_segmentation(r["segmentation"], height, width) for r in results]
        instances.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    return instances


def draw_results(
    entry: Mapping[str, Any],
    image: np.ndarray,
    results: Mapping[str, Mapping[Any, Sequence[Mapping[str, Any]]]],
    class_names: Sequence[str],
    classes: Mapping[int, int],
    score_threshold: float,
) -> np.ndarray:
    """Ground truth, where known, and a panel for each model, of ``results`` by title and image id, in a row."""
    panels = {}
    if "annotations" in entry:
        panels["ground truth"] = draw_instances(image, entry["annotations"], class_names)
    for title, by_image in results.items():
        instances = to_instances(by_image.get(entry["image_id"], []), entry, classes)
        panels[title] = draw_instances(image, instances, class_names, score_threshold)
    return contact_sheet(list(panels.values()), columns=len(panels), titles=list(panels))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, draw, write; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="registered data set of the results")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures are written")
    parser.add_argument("--num-images", type=int, default=8, help="first images of the set (default: 8)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score drawn (default: 0.3)")
    parser.add_argument("--font", default="", metavar="FILE", help="as VIS_FONT of a config")
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        default=(),
        metavar=("LOW", "HIGH"),
        help="as INPUT.PIXEL_RANGE of a config",
    )
    parser.add_argument("--max-pixels", type=int, default=0, metavar="N", help="as INPUT.MAX_PIXELS of a config")
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="title and result file of every model")
    args = parser.parse_args(arguments)
    try:
        pairs = [model.partition("=")[::2] for model in args.models]
        if missing := [name for name, path in pairs if not path]:
            raise ValueError(f"{missing[0]}: give every model as NAME=FILE")
        results = {name: results_by_image(path, args.dataset) for name, path in pairs}
        entries = read_dataset(args.dataset)[: args.num_images]
        metadata = MetadataCatalog.get(args.dataset)
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(metadata.thing_classes))}
        set_font(args.font)
        reader = ImageReader("RGB", tuple(args.pixel_range), args.max_pixels)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed, names = 0, PictureNames(".png")
    for entry in tqdm(entries, unit="image"):
        name = names(entry["file_name"])
        try:
            sheet = draw_results(
                entry, reader(entry["file_name"]), results, metadata.thing_classes, ids, args.score_threshold
            )
            write_image(Path(args.output) / name, sheet)
        except Exception as error:  # whatever it is, the other pictures are made
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            tqdm.write(f"error: there is no picture of {entry['file_name']}: {kind}{error}", file=sys.stderr)
            failed += 1
    if failed < len(entries):
        print(f"{len(entries) - failed} pictures are in {args.output}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
