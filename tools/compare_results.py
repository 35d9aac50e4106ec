"""Draw the detections of several models side by side, from their result files (ISDA's Figure 6, for any models).

    python tools/compare_results.py --dataset coco_2017_val --output FOLDER ISDA=a.json "Mask R-CNN=b.json" [...]

A result file is what evaluation writes as inference/coco_instances_results.json: COCO's result format, of any code.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.structures import Boxes, BoxMode, Instances
from tqdm import tqdm

from querymask.common.data.segmentation import decode_segmentation
from querymask.common.evaluation.results import read_results
from querymask.common.visualization import contact_sheet, draw_instances, write_image


def results_by_image(path: str) -> dict[Any, list[dict[str, Any]]]:
    """Results of a file by image id."""
    by_image = defaultdict(list)
    for result in read_results(path):
        by_image[result["image_id"]].append(result)
    return by_image


def to_instances(
    results: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], classes: Mapping[int, int]
) -> Instances:
    """COCO results of an image as Instances; ``classes`` turns category ids into class indices.

    Raises:
        ValueError: a category that the data set does not have.
    """
    height, width = entry["height"], entry["width"]
    unknown = {r["category_id"] for r in results} - set(classes)
    if unknown:
        raise ValueError(f"image {entry['image_id']}: the data set has no categories {sorted(unknown)}")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, draw, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="registered data set of the results")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures are written")
    parser.add_argument("--num-images", type=int, default=8, help="first images of the set (default: 8)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score drawn (default: 0.3)")
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="title and result file of every model")
    args = parser.parse_args(arguments)
    try:
        pairs = [model.partition("=")[::2] for model in args.models]
        if missing := [name for name, path in pairs if not path]:
            raise ValueError(f"{missing[0]}: give every model as NAME=FILE")
        results = {name: results_by_image(path) for name, path in pairs}
        entries = DatasetCatalog.get(args.dataset)[: args.num_images]
        metadata = MetadataCatalog.get(args.dataset)
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(metadata.thing_classes))}
        for entry in tqdm(entries, unit="image"):
            image = np.ascontiguousarray(detection_utils.read_image(entry["file_name"], format="RGB"))
            panels = {}
            if "annotations" in entry:
                panels["ground truth"] = draw_instances(image, entry["annotations"], metadata.thing_classes)
            for name, by_image in results.items():
                instances = to_instances(by_image.get(entry["image_id"], []), entry, ids)
                panels[name] = draw_instances(image, instances, metadata.thing_classes, args.score_threshold)
            sheet = contact_sheet(list(panels.values()), columns=len(panels), titles=list(panels))
            write_image(Path(args.output) / f"{Path(entry['file_name']).stem}.png", sheet)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"pictures are in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
