"""Result files: detections in COCO's format, evaluated without the model that made them."""

import json
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from querymask.common.evaluation.coco import InstanceEvaluator

Scores = dict[str, dict[str, float]]


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The results of a file.

    Raises:
        ValueError: it is not a list of COCO results.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not JSON. Give the coco_instances_results.json of an evaluation") from None
    if not isinstance(content, list) or not all({"image_id", "category_id", "score"} <= set(r) for r in content):
        raise ValueError(f"{path}: not a list of results with image_id, category_id and score, as COCO defines them")
    return content


def register_annotations(path: str | Path) -> str:
    """Make a COCO annotation file known to evaluators, without its images; returns the name to call it by."""
    name = str(path)
    categories = sorted(json.loads(Path(path).read_text())["categories"], key=lambda category: category["id"])
    MetadataCatalog.get(name).set(
        json_file=name,
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={category["id"]: i for i, category in enumerate(categories)},
    )
    return name


def evaluate_results(path: str | Path, dataset_name: str, boundary: bool = False) -> Scores:
    """Scores of a result file on a data set; nothing is written.

    Raises:
        ValueError: the file has no results of the data set, or the data set has another evaluation than COCO's.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind != "coco":
        raise ValueError(f"{dataset_name} has evaluator_type {kind!r}: only data sets of type coco take result files")
    if dataset_name in DatasetCatalog:
        DatasetCatalog.get(dataset_name)  # some are made, and many learn their categories' ids, when they are read
    evaluator = InstanceEvaluator(dataset_name, None, boundary)
    evaluator._distributed = False  # this process has them all
    evaluator.reset()
    evaluator.add_results(read_results(path))
    return evaluator.evaluate()
