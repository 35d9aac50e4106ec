"""Pictures of result files: the detections of several models beside the ground truth."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from querymask.common.data.segmentation import decode_segmentation
from querymask.common.evaluation.results import fit_results, read_results
from querymask.common.evaluation.truth import dataset_truth
from querymask.common.visualization import contact_sheet, draw_instances

Results = dict[Any, list[dict[str, Any]]]
"""In COCO's result format, by image id."""


def results_by_image(path: str | Path, dataset: str) -> Results:
    """Results of a file, with the ids of a data set."""
    by_image = defaultdict(list)
    for result in fit_results(read_results(path), dataset_truth(dataset), dataset, str(path)):
        by_image[result["image_id"]].append(result)
    return by_image


def class_indices(dataset: str) -> dict[Any, int]:
    """From category ids to class indices."""
    metadata = MetadataCatalog.get(dataset)
    return metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(metadata.thing_classes))}


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
    results: Mapping[str, Results],
    class_names: Sequence[str],
    classes: Mapping[int, int],
    score_threshold: float,
) -> np.ndarray:
    """Ground truth, where known, and a panel for each model, of ``results`` by title, in a row.

    Args:
        entry: of the data set.
        image: uint8 [H, W, 3] RGB.
    """
    panels = {}
    if "annotations" in entry:
        panels["ground truth"] = draw_instances(image, entry["annotations"], class_names)
    for title, by_image in results.items():
        instances = to_instances(by_image.get(entry["image_id"], []), entry, classes)
        panels[title] = draw_instances(image, instances, class_names, score_threshold)
    return contact_sheet(list(panels.values()), columns=len(panels), titles=list(panels))
