"""Matching and losses of FQDet and FQDetV2 (https://arxiv.org/abs/2210.02318, section 3.3).

Matching is static: an anchor belongs to a target by its IoU rank alone, whatever the network says. All losses are sums
over this process's images; none is divided by the number of targets.

Letters: A anchors, T targets of an image, Q queries, K classes, F matched queries of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from querymask.common.boxes import area, cxcywh_to_xyxy, xyxy_to_cxcywh
from querymask.common.losses import sigmoid_focal_loss
from querymask.common.precision import full_precision
from querymask.common.processes import Processes
from querymask.common.transfer import numbers_to_device
from querymask.effseg.anchors import encode_deltas
from querymask.effseg.fqdet import FQDetOutput

SELECTED_RANKS = 5  # the best anchors of a target are to be selected
MATCHED_RANKS = 15  # and queries from these are matched to it
PAIRS_AT_ONCE = 2**20  # of target and anchor: bounds the memory at about 50 MB


@dataclass(frozen=True)
class Matches:
    """Which queries of a batch belong to which targets.

    Attributes:
        image, query: (F,) numbers, ascending.
        target: (F,) numbers within the image.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def flat_target(self, counts: Sequence[int]) -> Tensor:
        """(F,) numbers among the targets of all images, of which each has so many as ``counts`` says."""
        starts = [sum(counts[:image]) for image in range(len(counts))]
        return numbers_to_device(starts, torch.int64, self.image.device)[self.image] + self.target

    def limit(self, number: int, num_images: int, processes: Processes) -> "Matches":
        """At most ``number`` of them, a random choice among those of all processes; 0: all.

        Args:
            number: how many, in the whole batch.
            num_images: of this process.
            processes: whose matches are chosen from.
        """
        if number <= 0:
            return self
        device = self.query.device
        order = processes.draw(lambda n: torch.randperm(n, device=device).argsort(), self.image, num_images)
        if processes.count == 1:  # all numbers below that of the matches: a GPU need not be asked how many remain
            kept = order.argsort()[:number].sort().values
        else:
            (kept,) = (order < number).nonzero(as_tuple=True)
        return Matches(self.image[kept], self.query[kept], self.target[kept])


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
        overlaps = box_iou(boxes, cxcywh_to_xyxy(anchors[start : start + size]))
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


def extended_iou_loss(boxes: Tensor, targets: Tensor, beta: float = 0.1) -> Tensor:
    """Smooth L1 of 1 - extended IoU, box by box: an IoU whose intersection turns negative where boxes are apart.

    Args:
        boxes, targets: (n, 4) x0, y0, x1, y1.
        beta: below it the loss is quadratic.

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
    return torch.where(miss < beta, miss.square() / (2 * beta), miss - beta / 2)


class FQDetCriterion(nn.Module):
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
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"FQDet has the versions 1 and 2, not {version}")
        self.version = version
        self.selection_weight = selection_weight
        self.class_weight = class_weight if class_weight is not None else {1: 1.0, 2: 0.5}[version]
        self.box_weight = box_weight if box_weight is not None else {1: 1.0, 2: 1.85}[version]

    def forward(
        self, output: FQDetOutput, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Mapping[str, Tensor], Matches]:
        """Match, and compute the losses.

        Args:
            output: of the detector.
            boxes: (T, 4) x0, y0, x1, y1 in pixels, for every image.
            labels: (T,) classes below K, for every image.

        Returns:
            Weighted losses by name (``loss_selection``, ``loss_class``, ``loss_box``), and the matches, which a
            segmentation head uses too.
        """
        matches, selection = self._match(output, boxes)
        rows = matches.flat_target([len(b) for b in boxes])
        targets, classes = torch.cat(list(boxes))[rows], torch.cat(list(labels))[rows]
        predicted = output.boxes[matches.image, matches.query]
        losses = {
            "loss_selection": self.selection_weight * sigmoid_focal_loss(output.selection_logits, selection).sum(),
            "loss_class": self.class_weight
            * self._class_loss(output.class_logits, matches, classes, predicted, targets),
            "loss_box": self.box_weight * self._box_loss(output, matches, predicted, targets),
        }
        return losses, matches

    @torch.no_grad()
    def _match(self, output: FQDetOutput, boxes: Sequence[Tensor]) -> tuple[Matches, Tensor]:
        """The matches, and 1 for the anchors (B, A) that are to be selected."""
        selection = torch.zeros_like(output.selection_logits)
        matched = []
        for image, target_boxes in enumerate(boxes):
            ranked = rank_anchors(output.anchors, target_boxes.to(output.anchors))
            selection[image].index_fill_(0, ranked[:SELECTED_RANKS].flatten(), 1)
            matched.append(match_queries(ranked, output.selected[image], len(output.anchors)))
        targets = torch.stack(matched)
        images, queries = (targets >= 0).nonzero(as_tuple=True)  # of all images, as each time makes a GPU wait
        return Matches(images, queries, targets[images, queries]), selection

    def _class_loss(
        self, logits: Tensor, matches: Matches, classes: Tensor, predicted: Tensor, targets: Tensor
    ) -> Tensor:
        logits = full_precision(logits)
        wanted = torch.zeros_like(logits)
        wanted[..., -1] = 1
        wanted[matches.image, matches.query, -1] = 0
        if self.version == 1:
            wanted[matches.image, matches.query, classes] = 1
            return sigmoid_focal_loss(logits, wanted).sum()
        wanted[matches.image, matches.query, classes] = paired_iou(predicted.detach(), targets.to(predicted))
        cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return ((wanted - logits.sigmoid()).square() * cross_entropy).sum()

    def _box_loss(self, output: FQDetOutput, matches: Matches, predicted: Tensor, targets: Tensor) -> Tensor:
        if len(matches.query) == 0:
            return 0 * output.deltas.sum()  # every parameter has a gradient, as distributed training asks
        if self.version == 2:
            return extended_iou_loss(predicted, targets.to(predicted)).sum()
        anchors = output.query_anchors[matches.image, matches.query]
        wanted = encode_deltas(anchors, xyxy_to_cxcywh(targets.to(anchors)))
        return (output.deltas[matches.image, matches.query] - wanted).abs().sum()


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (n, 4) x0, y0, x1, y1, pair by pair."""
    overlap = area((torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0))
    return overlap / (area(a[:, 2:] - a[:, :2]) + area(b[:, 2:] - b[:, :2]) - overlap)
