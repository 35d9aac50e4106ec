"""Why AP is lost: the error types of TIDE (Bolya et al., ECCV 2020, section 2), and what AP would be without each.

A detection is right where its IoU with an object of its class, which no better one has taken, is at least 0.5. Others
are, by the first line that is true of their highest IoU:

- localisation: with objects of their class, it is from 0.1 to 0.5;
- classification: with objects of other classes, it is at least 0.5;
- duplicate: with an object of their class that a better detection has taken, it is at least 0.5;
- background: with all objects, it is at most 0.1;
- both: what remains, badly placed on an object of another class.

An object is missed where no detection is right about it, nor has one of the first two errors with it. Detections on
crowds of their class count neither way, as in COCO's evaluation; and classes without objects have no AP, as there.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from querymask.common.data.segmentation import encode_segmentation

FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU of a right detection, and of one that has found nothing."""
ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
RIGHT, IGNORED = "right", "ignored"
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ImageErrors:
    """The detections of an image, the highest score first, and its objects other than crowds.

    Attributes:
        scores, classes: (n,) of the detections.
        kinds: n of ERRORS, RIGHT or IGNORED.
        objects: (n,) the object that a detection is right about, or would be without its error; -1 for none.
        ious: (n,) with that object, 0 for none.
        object_classes: (m,).
    """

    scores: np.ndarray
    classes: np.ndarray
    kinds: np.ndarray
    objects: np.ndarray
    ious: np.ndarray
    object_classes: np.ndarray

    def found(self) -> np.ndarray:
        """(m,) whether a detection is right about an object."""
        found = np.zeros(len(self.object_classes), bool)
        found[self.objects[self.kinds == RIGHT]] = True
        return found

    def mended(self) -> np.ndarray:
        """(n,) whether a detection would be right without its error: the best of those that miss an object so."""
        mended = np.zeros(len(self.scores), bool)
        taken = self.found()
        for row in np.flatnonzero(self.objects >= 0):
            if not taken[self.objects[row]] and self.kinds[row] != RIGHT:
                mended[row] = taken[self.objects[row]] = True
        return mended

    def missed(self) -> np.ndarray:
        """(m,) whether an object is missed."""
        missed = ~self.found()
        missed[self.objects[self.mended()]] = False
        return missed

    def quality(self, score_threshold: float) -> float:
        """Panoptic quality (Kirillov et al. 2019, equation 1) of the detections from a score on; NaN of nothing."""
        shown = self.scores >= score_threshold
        right = shown & (self.kinds == RIGHT)
        wrong = (shown & ~right & (self.kinds != IGNORED)).sum()
        total = right.sum() + (wrong + len(self.object_classes) - right.sum()) / 2
        return float(self.ious[right].sum() / total) if total else float("nan")


@dataclass(frozen=True)
class ErrorSummary:
    """AP at an IoU of 0.5 in percent, and how much it would gain.

    Attributes:
        ap: as it is.
        counts: of the ERRORS.
        gains: AP without each of the ERRORS, less ``ap``; 0 where it would not gain.
        false_positives, false_negatives: the gain without any wrong detection, without any object that is not found;
            NaN where nothing would be left.
    """

    ap: float
    counts: dict[str, int]
    gains: dict[str, float]
    false_positives: float
    false_negatives: float


def find_errors(
    truth: COCO, results: Sequence[Mapping[str, Any]], masks: bool, max_detections: int
) -> dict[Any, ImageErrors]:
    """The errors of every image of a data set.

    Args:
        truth: as ``querymask.common.evaluation.truth.index`` gives it.
        results: as ``fit_results`` gives them, with masks as RLE.
        masks: IoU is that of masks; else of boxes.
        max_detections: so many of highest score count in an image.
    """
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return {
        key: _find_in_image(image, truth.imgToAnns[key], by_image[key], masks, max_detections)
        for key, image in truth.imgs.items()
    }


def _find_in_image(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    masks: bool,
    max_detections: int,
) -> ImageErrors:
    results = sorted(results, key=lambda result: -result["score"])[:max_detections]
    objects = [a for a in annotations if not a.get("iscrowd")]
    crowds = [a for a in annotations if a.get("iscrowd")]
    size = image["height"], image["width"]

    def shapes(items: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [encode_segmentation(i["segmentation"], *size) if masks else list(i["bbox"]) for i in items]

    found = shapes(results)
    ious = _ious(found, shapes(objects), crowd=False)
    classes, object_classes, crowd_classes = (
        np.array([item["category_id"] for item in items]) for items in (results, objects, crowds)
    )
    covered = _ious(found, shapes(crowds), crowd=True) >= FOREGROUND
    ignored = (covered & (classes[:, None] == crowd_classes[None])).any(1)
    scores = np.array([result["score"] for result in results], dtype=np.float64)
    return classify(scores, classes, object_classes, ious, ignored)


def _ious(found: list[Any], objects: list[Any], crowd: bool) -> np.ndarray:
    if not (found and objects):
        return np.zeros((len(found), len(objects)))
    return mask_util.iou(found, objects, [int(crowd)] * len(objects))


def classify(
    scores: np.ndarray, classes: np.ndarray, object_classes: np.ndarray, ious: np.ndarray, ignored: np.ndarray
) -> ImageErrors:
    """Kinds of the detections of an image.

    Args:
        scores: (n,) descending.
        classes, object_classes: (n,), (m,).
        ious: (n, m) of detections and objects other than crowds.
        ignored: (n,) on crowds; of no account unless they are right.
    """
    number = len(scores)
    kinds = np.full(number, "background", dtype=object)
    objects, with_object = np.full(number, -1), np.zeros(number)
    same = classes[:, None] == object_classes[None]
    of_class, of_others = np.where(same, ious, 0.0), np.where(same, 0.0, ious)
    taken = np.zeros(len(object_classes), bool)
    if len(object_classes):
        for row in range(number):
            free = np.where(taken, 0.0, of_class[row])
            best = int(free.argmax())
            if free[best] >= FOREGROUND:
                kinds[row], objects[row], with_object[row] = RIGHT, best, free[best]
                taken[best] = True
    kinds[ignored & (kinds != RIGHT)] = IGNORED
    for row in np.flatnonzero((kinds == "background") & (len(object_classes) > 0)):
        best, other = int(of_class[row].argmax()), int(of_others[row].argmax())
        if BACKGROUND <= of_class[row, best] <= FOREGROUND:
            kinds[row], objects[row], with_object[row] = "localisation", best, of_class[row, best]
        elif of_others[row, other] >= FOREGROUND:
            kinds[row], objects[row], with_object[row] = "classification", other, of_others[row, other]
        elif (of_class[row] * taken).max() >= FOREGROUND:
            kinds[row] = "duplicate"
        elif ious[row].max() > BACKGROUND:
            kinds[row] = "both"
    return ImageErrors(scores, classes, kinds, objects, with_object, object_classes)


def summarize_errors(images: Sequence[ImageErrors]) -> ErrorSummary:
    """What each kind of error costs, each mended alone (the paper's section 2.3)."""
    scores, classes, kinds = (
        np.concatenate([getattr(i, name) for i in images] or [[]]) for name in ("scores", "classes", "kinds")
    )
    object_classes = np.concatenate([image.object_classes for image in images] or [[]])
    found = np.concatenate([image.found() for image in images] or [[]]).astype(bool)
    missed = np.concatenate([image.missed() for image in images] or [[]]).astype(bool)
    mended = np.concatenate([image.mended() for image in images] or [[]]).astype(bool)
    # The class of the object that a detection would be right about
    wanted = np.concatenate(
        [np.where(i.objects >= 0, np.append(i.object_classes, -1)[i.objects], -1) for i in images] or [[]]
    )
    counted, right = kinds != IGNORED, kinds == RIGHT
    every = np.ones(len(object_classes), bool)

    def ap(kept: np.ndarray, correct: np.ndarray, of: np.ndarray, truth: np.ndarray, by: np.ndarray = scores) -> float:
        values = []
        for label in np.unique(object_classes):
            chosen = kept & (of == label)
            count = (truth & (object_classes == label)).sum()
            if count or chosen.any():
                values.append(_average_precision(by[chosen], correct[chosen], count))
        return 100 * float(np.mean(values)) if values else float("nan")

    base = ap(counted, right, classes, every)
    gains = {}
    for error in ERRORS:
        wrong = kinds == error
        kept, correct = counted & ~(wrong & ~mended), right | (wrong & mended)
        of = np.where(wrong & mended, wanted, classes)
        gains[error] = ap(kept, correct, of, ~missed if error == "missed" else every) - base
    return ErrorSummary(
        ap=base,
        counts={e: int(missed.sum() if e == "missed" else (kinds == e).sum()) for e in ERRORS},
        gains={error: gain if gain > 0 else 0.0 for error, gain in gains.items()},
        false_positives=ap(counted, right, classes, every, right.astype(float)) - base,
        false_negatives=ap(counted, right, classes, found) - base,
    )


def _average_precision(scores: np.ndarray, right: np.ndarray, count: int) -> float:
    """COCO's: the mean, over 101 recalls, of the highest precision at this recall or beyond."""
    if not (count and len(scores)):
        return 0.0
    hits = right[np.argsort(-scores, kind="stable")].cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / count, _RECALLS, side="left")
    return float(np.where(places < len(hits), precision[np.minimum(places, len(hits) - 1)], 0.0).mean())
