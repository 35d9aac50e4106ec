"""Matching and losses of FQDet and FQDetV2 (https://arxiv.org/abs/2210.02318, section 3.3).

Matching is static: an anchor belongs to a target by its IoU rank alone, whatever the network says. All losses are sums
over this process's images; none is divided by the number of targets.

Letters: A anchors, T targets of an image, Q queries, K classes, F matched queries of the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

from querymask.common.boxes import area, to_centres, to_corners
from querymask.common.predictions import Assignment, LossTerm, Targets
from querymask.effseg.fqdet.anchors import encode_deltas
from querymask.effseg.fqdet.predictions import FQDetAssignment, FQDetPredictions

SELECTED_RANKS = 5  # the best anchors of a target are to be selected
MATCHED_RANKS = 15  # and queries from these are matched to it
BETA = 0.1  # a loss of boxes below it is quadratic
PAIRS_AT_ONCE = 2**20  # of target and anchor: bounds the memory at about 50 MB


def rank_anchors(anchors: Tensor, boxes: Tensor, count: int = MATCHED_RANKS) -> Tensor:
    """The ``count`` anchors of highest IoU with each target. Which of equal ones comes first is not specified.

    Anchors are taken some at a time, as an image has 800,000 of them and may have hundreds of targets.

    Args:
        anchors: (A, 4) cx, cy, w, h.
        boxes: (T, 4) x0, y0, x1, y1.

    Returns:
        (count, T) numbers of anchors, the best first; fewer where there are fewer anchors.
    """
    count = min(count, len(anchors))
    size = max(count, PAIRS_AT_ONCE // max(len(boxes), 1))
    values, indices = [], []
    for start in range(0, len(anchors), size):
        overlaps = box_iou(boxes, to_corners(anchors[start : start + size]))
        best = overlaps.topk(min(count, overlaps.shape[1]), dim=1)
        values.append(best.values)
        indices.append(start + best.indices)
    order = torch.cat(values, dim=1).topk(count, dim=1).indices
    return torch.cat(indices, dim=1).gather(1, order).t()


def match_queries(ranked: Tensor, selected: Tensor, num_anchors: int) -> Tensor:
    """Matches the queries of an image by the ranks of their anchors.

    A query that several targets claim goes to the one where its rank is best, the first of those at equal ranks.

    Args:
        ranked: (ranks, T) as of :func:`rank_anchors`.
        selected: (Q,) anchors of the queries.
        num_anchors: A.

    Returns:
        (Q,) the target of each query; -1: none.
    """
    ranks, num_targets = ranked.shape
    if num_targets == 0:
        return torch.full_like(selected, -1)
    claims = torch.arange(ranks * num_targets, device=selected.device).view(ranks, num_targets)  # better ones are lower
    best = torch.full((num_anchors,), ranks * num_targets, device=selected.device)
    best = best.scatter_reduce(0, ranked.flatten(), claims.flatten(), "amin")
    claim = best[selected]
    return torch.where(claim < ranks * num_targets, claim % num_targets, -1)


def extended_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 of 1 - extended IoU, box by box: an IoU whose intersection turns negative where boxes are apart.

    Args:
        boxes, targets: (n, 4) x0, y0, x1, y1.

    Returns:
        (n,)
    """
    low, high = torch.maximum(boxes[:, :2], targets[:, :2]), torch.minimum(boxes[:, 2:], targets[:, 2:])
    hull = torch.minimum(boxes[:, :2], targets[:, :2])
    inner, outer = torch.minimum(low, high) - hull, torch.maximum(low, high) - hull
    low, high = low - hull, high - hull
    intersection = area(high) + area(inner) - low[:, 0] * outer[:, 1] - outer[:, 0] * low[:, 1]
    areas = area(boxes[:, 2:] - boxes[:, :2]) + area(targets[:, 2:] - targets[:, :2])
    miss = 1 - intersection / (areas - intersection + 1e-7)
    return torch.where(miss < BETA, miss.square() / (2 * BETA), miss - BETA / 2)


class FQDetCriterion:
    """Losses of a batch.

    Args:
        version: 1 for the paper's: focal class loss, L1 of the deltas. 2 for the release's: quality focal class loss,
            extended-IoU box loss.
        selection_weight, class_weight, box_weight: None takes the version's own.
    """

    def __init__(
        self,
        version: int = 1,
        selection_weight: float = 1.0,
        class_weight: float | None = None,
        box_weight: float | None = None,
    ) -> None:
        if version not in (1, 2):
            raise ValueError(f"FQDet has the versions 1 and 2, not {version}")
        self.version = version
        self.selection_weight = selection_weight
        self.class_weight = class_weight if class_weight is not None else {1: 1.0, 2: 0.5}[version]
        self.box_weight = box_weight if box_weight is not None else {1: 1.0, 2: 1.85}[version]

    @torch.no_grad()
    def match(self, found: FQDetPredictions, targets: Targets) -> FQDetAssignment:
        """Which queries, and which anchors, belong to which targets."""
        selection = torch.zeros_like(found.selection_logits)
        matched = []
        boxes = targets.boxes.to(found.anchors).split(list(targets.counts))
        for image, (start, target_boxes) in enumerate(zip(targets.starts, boxes, strict=True)):
            ranked = rank_anchors(found.anchors, target_boxes)
            selection[image].index_fill_(0, ranked[:SELECTED_RANKS].flatten(), 1)
            own = match_queries(ranked, found.selected[image], len(found.anchors))
            matched.append(torch.where(own >= 0, own + start, -1))
        rows = torch.stack(matched)
        image, query = (rows >= 0).nonzero(as_tuple=True)  # of all images, as each time makes a GPU wait
        return FQDetAssignment(torch.zeros_like(image), image, query, rows[image, query], 1, selection=selection)

    def losses(self, found: FQDetPredictions, targets: Targets, assignment: FQDetAssignment) -> list[LossTerm]:
        """Sums ``loss_selection``, ``loss_class`` and ``loss_box``."""
        boxes, classes = targets.boxes[assignment.target], targets.labels[assignment.target]
        predicted = found.boxes[assignment.image, assignment.query]
        selection = sigmoid_focal_loss(found.selection_logits, assignment.selection).sum()
        class_loss = self._class_loss(found.logits[0], assignment, classes, predicted, boxes)
        return [
            LossTerm("loss_selection", selection, self.selection_weight),
            LossTerm("loss_class", class_loss, self.class_weight),
            LossTerm("loss_box", self._box_loss(found, assignment, predicted, boxes), self.box_weight),
        ]

    def _class_loss(
        self, logits: Tensor, assignment: Assignment, classes: Tensor, predicted: Tensor, targets: Tensor
    ) -> Tensor:
        image, query = assignment.image, assignment.query
        wanted = torch.zeros_like(logits)
        wanted[..., -1] = 1
        wanted[..., -1].index_put_((image, query), wanted.new_zeros(()))  # older torch would wait for a plain 0 or 1
        if self.version == 1:
            wanted.index_put_((image, query, classes), wanted.new_ones(()))
            return sigmoid_focal_loss(logits, wanted).sum()
        wanted[image, query, classes] = paired_iou(predicted.detach(), targets.to(predicted))
        cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return ((wanted - logits.sigmoid()).square() * cross_entropy).sum()

    def _box_loss(self, found: FQDetPredictions, assignment: Assignment, predicted: Tensor, targets: Tensor) -> Tensor:
        if len(assignment.query) == 0:
            return 0 * found.deltas.sum()  # every parameter has a gradient, as distributed training asks
        if self.version == 2:
            return extended_iou_loss(predicted, targets.to(predicted)).sum()
        anchors = found.query_anchors[assignment.image, assignment.query]
        wanted = encode_deltas(anchors, to_centres(targets.to(anchors)))
        return (found.deltas[assignment.image, assignment.query] - wanted).abs().sum()


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (n, 4) x0, y0, x1, y1, pair by pair."""
    overlap = area((torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0))
    return overlap / (area(a[:, 2:] - a[:, :2]) + area(b[:, 2:] - b[:, :2]) - overlap)
