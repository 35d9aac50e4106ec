"""Panoptic quality (Kirillov et al. 2019) and its boundary form (Cheng et al. 2021), of maps of segment ids.

A found segment and one of the ground truth match (TP) if they are of one class and their IoU is above 0.5, where the
union leaves out what the found one has on void. Segments of the ground truth without a match are FN, crowds excepted;
found ones without a match are FP, those excepted that lie on void and on the crowd of their class by more than half::

    SQ = sum of IoU / TP,   RQ = TP / (TP + FP / 2 + FN / 2),   PQ = SQ * RQ

of each class; overall they are means over the classes that occur. For boundary PQ the IoU is the smaller one of that of
the segments and of their boundaries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from querymask.common.evaluation.boundary import boundary_width, mask_boundary
from querymask.common.evaluation.scores import different_names

VOID = 0
TP, FP, FN, IOU = range(4)
"""Columns of the counts of :func:`compare_segments`."""


def compare_segments(
    truth: np.ndarray,
    truth_segments: Sequence[Mapping[str, Any]],
    found: np.ndarray,
    found_segments: Sequence[Mapping[str, Any]],
    num_classes: int,
    boundary: bool = False,
) -> np.ndarray:
    """The counts of an image.

    Args:
        truth: ids, integers [H, W], 0 is void.
        truth_segments: with ``id``, ``category_id`` (a class, from 0 on) and ``iscrowd``, all with pixels in the map.
        found: ids, integers [H, W], 0 is void.
        found_segments: with ``id`` and ``category_id``, all with pixels in the map.
        num_classes: C.
        boundary: of boundary PQ.

    Returns:
        float64 [C, 4]: TP, FP, FN and the sum of the IoU of TP, of each class.

    Raises:
        ValueError: the found map has other ids than the list.
    """
    counts = np.zeros((num_classes, 4))
    truth_ids, rows = np.unique(truth, return_inverse=True)
    found_ids, columns = np.unique(found, return_inverse=True)
    pairs = rows.reshape(-1) * len(found_ids) + columns.reshape(-1)
    shared = np.bincount(pairs, minlength=len(truth_ids) * len(found_ids)).reshape(len(truth_ids), len(found_ids))
    truth_areas, found_areas = shared.sum(axis=1), shared.sum(axis=0)
    row = {int(key): index for index, key in enumerate(truth_ids)}
    column = {int(key): index for index, key in enumerate(found_ids)}
    if (listed := {segment["id"] for segment in found_segments}) != set(column) - {VOID}:
        raise ValueError(
            f"a panoptic map has pixels of the ids {sorted(set(column) - {VOID})}, and a list of segments with the ids "
            f"{sorted(listed)}: they must be the same"
        )
    on_void = shared[row[VOID]] if VOID in row else np.zeros_like(found_areas)
    # panopticapi knows one crowd of a class, the last one
    crowds = {s["category_id"]: row[s["id"]] for s in truth_segments if s["iscrowd"]}
    matched: set[int] = set()
    for segment in truth_segments:
        if segment["iscrowd"]:
            continue
        label, r = segment["category_id"], row[segment["id"]]
        for candidate in found_segments:
            c = column[candidate["id"]]
            if candidate["category_id"] != label or not shared[r, c]:
                continue
            iou = shared[r, c] / (truth_areas[r] + found_areas[c] - shared[r, c] - on_void[c])
            if boundary and iou > 0.5:
                iou = min(iou, _boundary_iou(truth == segment["id"], found == candidate["id"], truth == VOID))
            if iou > 0.5:
                counts[label, TP] += 1
                counts[label, IOU] += iou
                matched.add(c)
                break
        else:
            counts[label, FN] += 1
    for candidate in found_segments:
        label, c = candidate["category_id"], column[candidate["id"]]
        ignored = on_void[c] + (shared[crowds[label], c] if label in crowds else 0)
        if c not in matched and ignored / found_areas[c] <= 0.5:
            counts[label, FP] += 1
    return counts


def missed_segments(segments: Sequence[Mapping[str, Any]], num_classes: int) -> np.ndarray:
    """The counts of an image in which nothing was found, (C, 4); ``segments`` as ``truth_segments``."""
    counts = np.zeros((num_classes, 4))
    for segment in segments:
        counts[segment["category_id"], FN] += not segment["iscrowd"]
    return counts


def quality(counts: np.ndarray, class_names: Sequence[str], num_things: int) -> dict[str, float]:
    """Scores in percent from the counts of all images, (C, 4).

    Returns:
        PQ, SQ and RQ over all classes, PQ_th, ... over things (the first ``num_things`` classes), PQ_st, ... over
        stuff, and PQ-name, ... of each class. NaN where no class occurs.
    """
    matches = counts[:, TP]
    size = matches + (counts[:, FP] + counts[:, FN]) / 2
    with np.errstate(invalid="ignore"):
        rq = matches / size  # NaN where the class does not occur
        sq = np.where(size > 0, counts[:, IOU] / np.maximum(matches, 1), np.nan)
    by_class = {"PQ": 100 * sq * rq, "SQ": 100 * sq, "RQ": 100 * rq}
    occurs = size > 0
    scores: dict[str, float] = {}
    for suffix, chosen in (("", slice(None)), ("_th", slice(num_things)), ("_st", slice(num_things, None))):
        for metric, values in by_class.items():
            values = values[chosen][occurs[chosen]]
            scores[metric + suffix] = float(values.mean()) if len(values) else float("nan")
    for index, name in enumerate(different_names(class_names)):
        scores.update({f"{metric}-{name}": float(values[index]) for metric, values in by_class.items()})
    return scores


def _boundary_iou(truth: np.ndarray, found: np.ndarray, void: np.ndarray) -> float:
    """Of the boundaries of two masks, bool [H, W]; the union leaves out what the found one has on void."""
    distance = boundary_width(*truth.shape)
    edges = [mask_boundary(np.ascontiguousarray(mask, dtype=np.uint8), distance) > 0 for mask in (truth, found)]
    union = np.count_nonzero(edges[0] | edges[1]) - np.count_nonzero(edges[1] & void)
    return np.count_nonzero(edges[0] & edges[1]) / union
