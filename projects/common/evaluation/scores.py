"""AP from a run of COCO's evaluation, whatever it takes for IoU."""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_DETECTIONS = 100
"""COCO's limit of detections; Detectron2's default of TEST.DETECTIONS_PER_IMAGE, too."""


def load_results(truth: COCO, results: Sequence[Mapping[str, Any]], masks: bool) -> COCO:
    """Detections in COCO's result format beside their ground truth; the list is left as it is.

    Args:
        masks: areas are those of the masks, as COCO's mask evaluation has them; else those of the boxes.
    """
    # pycocotools takes the areas of boxes where there are some, and writes into the results
    copies = [{key: value for key, value in result.items() if key != "bbox" or not masks} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        if copies:
            return truth.loadRes(copies)
        nothing = COCO()  # pycocotools cannot read an empty list
        nothing.dataset = {**truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing


def evaluate(
    evaluation: COCOeval,
    class_names: Sequence[str] = (),
    max_detections: int = MAX_DETECTIONS,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, float]:
    """Run an evaluation and read AP in percent.

    Args:
        evaluation: before its ``evaluate()``; ``params.imgIds`` and ``params.catIds`` say on what.
        class_names: in the order of the sorted category ids, for "AP-name" of each class; left out for one class.
            Classes of one name are told apart by their number.
        max_detections: so many of highest score count, of each class in an image.
        groups: classes, by their place among the sorted category ids, whose mean is a metric of its own.

    Returns:
        METRICS, then those of the groups and of the classes; NaN where there is no ground truth.
    """
    evaluation.params.maxDets = [max_detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (thresholds, recalls, classes, areas)
    thresholds = evaluation.params.iouThrs
    at = {f"AP{round(100 * t)}": i for i, t in enumerate(thresholds)}
    areas = dict(zip(("APs", "APm", "APl"), (1, 2, 3)))
    scores = {}
    for metric in METRICS:
        values = precision[at[metric]] if metric in at else precision
        scores[metric] = _mean(values[..., areas.get(metric, 0)])
    for name, members in (groups or {}).items():
        scores[name] = _mean(precision[:, :, list(members), 0])
    if len(class_names) > 1:
        if len(class_names) != precision.shape[2]:
            raise ValueError(f"there are {len(class_names)} class names for {precision.shape[2]} categories")
        names = different_names(class_names)
        scores.update({f"AP-{name}": _mean(precision[:, :, k, 0]) for k, name in enumerate(names)})
    return scores


def different_names(names: Sequence[str]) -> list[str]:
    """Names of classes, with the number of the class (from 0) where several have the same."""
    counts = Counter(map(str, names))
    return [str(name) if counts[str(name)] == 1 else f"{name} (class {i})" for i, name in enumerate(names)]


def _mean(precision: np.ndarray) -> float:
    """In percent; entries of -1 have no ground truth."""
    known = precision[precision > -1]
    return float(100 * known.mean()) if known.size else float("nan")
