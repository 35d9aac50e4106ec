"""From the logits of an image's queries to its detections: the highest pairs of query and class, then NMS."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from querymask.common.ops.exporting import exportable
from querymask.common.transfer import to_device

CANDIDATES = 1000  # pairs of query and class, or queries, that enter NMS
MAX_EXTENT = 2.0**20  # pixels over which boxes may be spread for one NMS of all classes


@dataclass(frozen=True)
class Detections:
    """The detections of one image, by descending score, on the CPU.

    While a model is exported, rows with a negative score fill them up to a fixed number.

    Attributes:
        queries: (D,) numbers of their queries.
        labels: (D,) classes.
        scores: (D,) probabilities.
        boxes: (D, 4) x0, y0, x1, y1 in pixels, not clipped.
    """

    queries: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor


SUPPRESSIONS = 50
"""How often the form for export asks which boxes are left: enough for chains of as many boxes, each of which only the
next one suppresses."""


def _detect_fixed_number(
    class_logits: Tensor, boxes: Tensor, nms_threshold: float, max_detections: int = 100, drop_empty: bool = True
) -> Detections:
    scores, pairs, num_classes = best_pairs(class_logits, boxes, drop_empty)
    labels, queries = pairs % num_classes, pairs // num_classes
    rows, kept = _order_by_suppression(boxes[queries].double(), labels, scores >= 0, nms_threshold)
    rows = rows[:max_detections]
    return Detections(queries[rows], labels[rows], scores.where(kept, -1)[rows], boxes[queries[rows]])


def _order_by_suppression(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Numbers (n,) of boxes, those that stay first, all in the order in which they came; which (n,) stay."""
    order = torch.arange(len(boxes), device=boxes.device)
    rivals = (box_iou(boxes, boxes) > threshold) & (labels[:, None] == labels) & (order[:, None] > order)
    kept = valid
    for _ in range(SUPPRESSIONS):
        kept = valid & ~(rivals & kept).any(1)
    return (order + len(boxes) * ~kept).sort().indices, kept


@exportable(_detect_fixed_number)
def detect(
    class_logits: Tensor, boxes: Tensor, nms_threshold: float, max_detections: int = 100, drop_empty: bool = True
) -> Detections:
    """Picks the detections of one image: the highest pairs of query and class, then NMS within each class.

    The candidates are copied to the host at once, as how many remain must be known there anyway: a GPU is waited for
    only once.

    Args:
        class_logits: (Q, K + 1), the last class being "no object".
        boxes: (Q, 4) x0, y0, x1, y1.
        nms_threshold: a box whose IoU with a better one of its class is higher is left out.
        max_detections: how many are kept.
        drop_empty: leave out boxes without a positive size first.
    """
    scores, pairs, num_classes = best_pairs(class_logits, boxes, drop_empty)
    columns = (boxes[pairs // num_classes].double(), scores.double()[:, None], pairs.double()[:, None])
    candidates = torch.cat(columns, 1).cpu()  # float64 has room for all of them
    candidates = candidates[candidates[:, 4] >= 0]
    labels = candidates[:, 5].long() % num_classes
    kept = nms_within_classes(candidates[:, :4], candidates[:, 4], labels, nms_threshold)[:max_detections]
    queries = candidates[kept, 5].long() // num_classes
    return Detections(queries, labels[kept], candidates[kept, 4].to(scores.dtype), candidates[kept, :4].to(boxes.dtype))


def _suppress_fixed_number(
    queries: Tensor, labels: Tensor, scores: Tensor, boxes: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kept = _order_by_suppression(boxes.double(), labels, scores >= 0, threshold)
    return queries[rows], labels.where(kept, -1)[rows], scores.where(kept, -1)[rows]


@exportable(_suppress_fixed_number)
def suppress_queries(
    queries: Tensor, labels: Tensor, scores: Tensor, boxes: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS within each class of queries that have one class each.

    While a model is exported, rows whose label and score are -1 take the place of those that go, at the end.

    Args:
        queries, labels, scores: (n,), by descending score.
        boxes: (n, 4) x0, y0, x1, y1.
        threshold: as of :func:`detect`.

    Returns:
        queries, labels and scores of those that stay.
    """
    columns = (boxes.double(), scores.double()[:, None], labels.double()[:, None])
    candidates = torch.cat(columns, 1).cpu()  # at once, as how many remain must be known there
    kept = nms_within_classes(candidates[:, :4], candidates[:, 4], candidates[:, 5].long(), threshold)
    kept = to_device(kept, queries.device)
    return queries[kept], labels[kept], scores[kept]


def best_pairs(class_logits: Tensor, boxes: Tensor, drop_empty: bool) -> tuple[Tensor, Tensor, int]:
    """The pairs that enter NMS.

    Args:
        class_logits, boxes, drop_empty: as of :func:`detect`.

    Returns:
        scores (n,) in descending order, -1 for empty boxes if these are dropped; the pairs (n,), numbers of queries
        times K, which is last, plus the class.
    """
    scores = class_logits[:, :-1].sigmoid()
    if drop_empty:
        scores = scores.masked_fill(((boxes[:, 2:] <= boxes[:, :2]).any(1))[:, None], -1)
    num_classes = scores.shape[1]
    scores, pairs = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    return scores, pairs, num_classes


def nms_within_classes(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """NMS of every class on its own; a box that is huge or not finite matters to its class alone.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in float64, anywhere.
        scores: (n,).
        labels: (n,) classes.
        threshold: a box whose IoU with a better one of its class is higher is left out.

    Returns:
        (kept,) numbers of the boxes that stay, by descending score.
    """
    if len(boxes) == 0:
        return labels
    low, high = boxes.aminmax()
    if high - low < MAX_EXTENT:
        # Side by side, so that one NMS does. Whole numbers of pixels, which float64 adds to float32 boxes exactly
        return nms(boxes + (labels * ((high - low).floor() + 1))[:, None], scores, threshold)
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    kept = torch.cat([rows[nms(boxes[rows], scores[rows], threshold)] for rows in members]).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]
