"""From the masks of queries to a panoptic map, in which every pixel is of one segment or void: the rule of EffSeg's
release (https://github.com/CedricPicron/DetSeg), for things and stuff alike.

Letters: n queries of an image by descending score, each with its best class; k of them that are left; (H, W) the
canvas, which is the padded image. p is the probability of a query's pixel, M = p > threshold its own mask, R the pixels
that it gets::

    keep_scores       score > threshold
    suppress_masks    IoU(M, M') < threshold with every M' of a higher score, whatever the classes
    contest_pixels    each pixel to the highest score * p, if that p > threshold; R
    keep_agreeing     IoU(M, R) > threshold; R of the others becomes void
    keep_large        |R| > threshold
    unite_stuff       what is left of a stuff class is one segment
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from querymask.common.masks import Bands
from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision, without_autocast

VOID = -1
"""In a map of numbers of segments."""
PIXELS_AT_ONCE = 2**25
"""Of all canvases that are held at a time."""


@dataclass(frozen=True)
class PanopticRule:
    """What ``MODEL.PANOPTIC`` says.

    Attributes:
        num_things: labels below it are things.
        score, mask, nms, pixel, agreement, area: the thresholds above; ``mask`` is that of M.
    """

    num_things: int
    score: float
    mask: float
    nms: float
    pixel: float
    agreement: float
    area: int

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> "PanopticRule":
        """Of a model with this number of classes.

        Raises:
            ValueError: it has fewer classes than things, or a threshold has no meaning.
        """
        panoptic = cfg.MODEL.PANOPTIC
        if not 0 <= panoptic.NUM_THINGS <= num_classes:
            raise ValueError(
                f"MODEL.PANOPTIC.NUM_THINGS is {panoptic.NUM_THINGS}, but the model has {num_classes} classes, things "
                "and stuff together: set it to the number of things among them"
            )
        rule = cls(
            num_things=panoptic.NUM_THINGS,
            score=panoptic.SCORE_THRESHOLD,
            mask=panoptic.MASK_THRESHOLD,
            nms=panoptic.NMS_THRESHOLD,
            pixel=panoptic.PIXEL_THRESHOLD,
            agreement=panoptic.AGREEMENT_THRESHOLD,
            area=panoptic.AREA_THRESHOLD,
        )
        for name in ("score", "mask", "nms", "pixel", "agreement"):
            if not 0 <= getattr(rule, name) <= 1:
                raise ValueError(
                    f"MODEL.PANOPTIC.{name.upper()}_THRESHOLD is {getattr(rule, name)}: set it between 0 and 1"
                )
        return rule


@dataclass(frozen=True)
class Contest:
    """Who gets which pixels.

    Attributes:
        owners: (H, W) number among the k queries, or VOID.
        areas: (k,) pixels of R.
        agreement: (k,) IoU of R with M.
    """

    owners: Tensor
    areas: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of an image, things by descending score, then stuff by ascending label.

    While a model is exported, labels and scores are tensors (n,), filled up with negative scores.

    Attributes:
        numbers: (H, W) int64 of each pixel's segment, or VOID.
        labels: of the segments.
        scores: of their classes; of stuff, the mean of its queries.
    """

    numbers: Tensor
    labels: list[int] | Tensor
    scores: list[float] | Tensor


def _merge_fixed_number(
    labels: Tensor, scores: Tensor, bands: Bands, canvas: tuple[int, int], rule: PanopticRule
) -> Segments:
    """All rows stay: (n,) marks of those that a step leaves, in place of their numbers."""
    count = len(scores)
    probabilities = full_precision(bands(torch.arange(count, device=scores.device), 0, canvas[0]))
    masks = (probabilities > rule.mask) & (scores > rule.score)[:, None, None]
    masks = masks.flatten(1).float()
    areas, kept = _covered_by_none(masks @ masks.T, rule.nms)
    best = (probabilities * scores[:, None, None]).where(kept[:, None, None], -1).argmax(0)
    probability = probabilities.gather(0, best[None])[0].where(kept.any(), 0)
    owners, won, agreed = _give_pixels(best, probability, count, rule)
    kept = kept & (agreed / (areas + won - agreed) > rule.agreement) & (won > rule.area)
    return _unite_fixed_number(owners, kept, labels, scores, rule.num_things)


def _unite_fixed_number(owners: Tensor, kept: Tensor, labels: Tensor, scores: Tensor, num_things: int) -> Segments:
    numbers = torch.arange(len(labels), device=labels.device)
    stuff = kept & (labels >= num_things)
    united = (numbers[:, None] == numbers) | (stuff[:, None] & stuff & (labels[:, None] == labels))
    first = united.int().argmax(1)  # row of each row's segment
    leads = kept & (first == numbers)
    keys = torch.where(stuff, labels + 1, 0).where(leads, 2**32)  # things, stuff by label, rows without a segment
    order = (keys * len(labels) + numbers).argsort()
    segments = order.argsort()[first].where(kept, VOID)
    segments = torch.cat((segments.new_full((1,), VOID), segments))  # the first one is that of void
    means = united.double() @ scores.double() / united.sum(1)
    return Segments(segments[owners - VOID], labels[order], means.to(scores.dtype).where(leads, -1)[order])


@exportable(_merge_fixed_number)
def merge(labels: Tensor, scores: Tensor, bands: Bands, canvas: tuple[int, int], rule: PanopticRule) -> Segments:
    """All steps.

    Args:
        labels, scores: (n,) of the queries, by descending score.
        bands: of their masks.
        canvas: H, W.
        rule: the thresholds.
    """
    rows = keep_scores(scores, rule.score)
    rows, areas = suppress_masks(rows, bands, canvas, rule)
    contest = contest_pixels(rows, scores, areas, bands, canvas, rule)
    kept = keep_large(contest, keep_agreeing(contest, rule.agreement), rule.area)
    return unite_stuff(contest.owners, kept, labels[rows].tolist(), scores[rows].tolist(), rule.num_things)


def keep_scores(scores: Tensor, threshold: float) -> Tensor:
    """Numbers (k,) of the queries whose class is likely enough."""
    return (scores > threshold).nonzero().flatten()


def suppress_masks(rows: Tensor, bands: Bands, canvas: tuple[int, int], rule: PanopticRule) -> tuple[Tensor, Tensor]:
    """Without empty masks, and such as a mask of a higher score covers, which itself may be among those that go.

    Args:
        rows: (k,) numbers of queries, by descending score.

    Returns:
        those that stay, and how many pixels each M has.
    """
    shared = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for top, bottom in _spans(len(rows), canvas):
        masks = (bands(rows, top, bottom) > rule.mask).flatten(1).float()
        with without_autocast(rows.device):
            shared += masks @ masks.T  # of zeros and ones: exact
    areas, kept = _covered_by_none(shared, rule.nms)
    return rows[kept], areas[kept]


def _covered_by_none(shared: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Of the pixels that every two masks (k, k) have in common: those of each, and whether (k,) it stays."""
    areas = shared.diagonal().double()
    overlaps = shared / (areas[:, None] + areas - shared).clamp(min=1)  # 0 of two empty masks
    return areas, (areas > 0) & (overlaps.tril(diagonal=-1) < threshold).all(1)


def contest_pixels(
    rows: Tensor, scores: Tensor, areas: Tensor, bands: Bands, canvas: tuple[int, int], rule: PanopticRule
) -> Contest:
    """Each pixel goes to one query, or to none.

    Args:
        rows: (k,) numbers of queries, by descending score.
        scores: (n,).
        areas: (k,) pixels of each M.
    """
    count = len(rows)
    owners = torch.full(canvas, VOID, device=rows.device)
    won, agreed = (torch.zeros(count, dtype=torch.int64, device=rows.device) for _ in range(2))
    for top, bottom in _spans(count, canvas):
        probabilities = full_precision(bands(rows, top, bottom))
        best = (probabilities * scores[rows, None, None]).argmax(0)  # the first one, of several
        probability = probabilities.gather(0, best[None])[0]
        owners[top:bottom], here, own_here = _give_pixels(best, probability, count, rule)
        won += here
        agreed += own_here
    return Contest(owners, won, agreed / (areas + won - agreed))


def _give_pixels(best: Tensor, probability: Tensor, count: int, rule: PanopticRule) -> tuple[Tensor, Tensor, Tensor]:
    """Owners (rows, W) of pixels; how many each of ``count`` queries gets (k,), and how many of these are of its M.

    Args:
        best, probability: (rows, W) the query of the highest score * p, and its p.
    """
    owners = torch.where(probability > rule.pixel, best, VOID)
    return owners, _count(owners, count), _count(torch.where(probability > rule.mask, owners, VOID), count)


def keep_agreeing(contest: Contest, threshold: float) -> Tensor:
    """Numbers among the k queries of those that get what their own masks say."""
    return (contest.agreement > threshold).nonzero().flatten()


def keep_large(contest: Contest, kept: Tensor, threshold: int) -> Tensor:
    """Those of the numbers ``kept`` that have more pixels than the threshold."""
    return kept[contest.areas[kept] > threshold]


def unite_stuff(owners: Tensor, kept: Tensor, labels: list[int], scores: list[float], num_things: int) -> Segments:
    """The segments.

    Args:
        owners: (H, W), of :class:`Contest`.
        kept: numbers among the k queries.
        labels, scores: of the k queries.
        num_things: labels below it are things.
    """
    kept = kept.tolist()
    things = [[number] for number in kept if labels[number] < num_things]
    stuff = {label: [] for label in sorted(labels[number] for number in kept) if label >= num_things}
    for number in kept:
        if labels[number] >= num_things:
            stuff[labels[number]].append(number)
    groups = [*things, *stuff.values()]
    segment = torch.full((len(labels) + 1,), VOID)  # the last one is that of void
    for number, members in enumerate(groups):
        segment[members] = number
    return Segments(
        numbers=segment.to(owners.device)[owners],
        labels=[labels[members[0]] for members in groups],
        scores=[sum(scores[member] for member in members) / len(members) for members in groups],
    )


def panoptic_output(
    segments: Segments, image_size: tuple[int, int], size: tuple[int, int], num_things: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What Detectron2 calls ``panoptic_seg``, at the size of the original image.

    Args:
        segments: on the canvas.
        image_size: (height, width) of the image without padding.
        size: those of the result, to which the map is resized with nearest neighbour.
        num_things: labels below it are things.

    Returns:
        ids int32 (height, width), 0 for void; ``id``, ``category_id``, ``isthing`` and ``score`` of the segments that
        have a pixel.
    """
    ids = segment_ids(segments, image_size, size)
    return ids, describe_segments(ids, segments.labels, segments.scores, num_things)


def segment_ids(segments: Segments, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The map of :func:`panoptic_output`."""
    numbers = segments.numbers[: image_size[0], : image_size[1]]
    return (_resize_nearest(numbers, size) + 1).to(torch.int32)


def describe_segments(
    ids: Tensor, labels: Sequence[int], scores: Sequence[float], num_things: int
) -> list[dict[str, Any]]:
    """The list of :func:`panoptic_output`, of segments with the ids 1, 2, ..."""
    seen = set(ids.unique().tolist())
    return [
        {"id": number, "category_id": label, "isthing": label < num_things, "score": score}
        for number, (label, score) in enumerate(zip(labels, scores, strict=True), start=1)
        if number in seen
    ]


def _resize_by_indices(numbers: Tensor, size: tuple[int, int]) -> Tensor:
    for axis, new in enumerate(size):
        old = numbers.shape[axis]
        scale = torch.ones((), device=numbers.device) * old / new  # in float32, whose rounding decides at times
        indices = (torch.arange(new, device=numbers.device) * scale).long()
        numbers = numbers.index_select(axis, indices.clamp(max=old - 1))
    return numbers


@exportable(_resize_by_indices)
def _resize_nearest(numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) int64 -> ``size``; exact in float32, as there are few."""
    return F.interpolate(numbers.float()[None, None], size=size, mode="nearest")[0, 0]


def _count_by_adding(owners: Tensor, count: int) -> Tensor:
    owners = owners.flatten() - VOID
    return owners.new_zeros(count + 1).scatter_add(0, owners, torch.ones_like(owners))[1:]


@exportable(_count_by_adding)
def _count(owners: Tensor, count: int) -> Tensor:
    """How many pixels each of ``count`` queries has."""
    return (owners.flatten() - VOID).bincount(minlength=count + 1)[1:]


def _spans(count: int, canvas: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row, and the one after the last, of bands of ``count`` masks that are held at a time."""
    height, width = canvas
    rows = max(1, PIXELS_AT_ONCE // (max(count, 1) * width))
    for top in range(0, height if count else 0, rows):
        yield top, min(top + rows, height)
