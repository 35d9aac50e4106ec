"""TIDE's error types: each on a case made by hand; numbers of the authors' package on a scene; AP by pycocotools."""

import random
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.cocoeval import COCOeval

from querymask.common.evaluation import errors
from querymask.common.evaluation.errors import ERRORS, RIGHT, ImageErrors, find_errors, summarize_errors
from querymask.common.evaluation.scores import evaluate, load_results
from querymask.common.evaluation.truth import index

SIZE = (60, 80)
CAT, DOG = 3, 5


def rle(box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    mask = mask_util.merge(mask_util.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], *SIZE))
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def thing(category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": box, "segmentation": rle(box), **more}


def content(annotations: list[dict[str, Any]], images: int = 1) -> dict[str, Any]:
    for number, annotation in enumerate(annotations, start=1):
        annotation.update({"id": number, "iscrowd": 0, **annotation})
    sizes = {"height": SIZE[0], "width": SIZE[1]}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in range(1, images + 1)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}, {"id": 8, "name": "eel"}],
        "annotations": annotations,
    }


def find(
    annotations: list[dict[str, Any]], results: list[dict[str, Any]], masks: bool = True, max_detections: int = 100
) -> ImageErrors:
    return find_errors(index(content(annotations)), results, masks, max_detections)[1]


OBJECT = [10, 10, 20, 20]
SHIFTED = [20, 10, 20, 20]  # IoU 200 / 600
FAR = [50, 30, 20, 20]
TOUCHING = [28, 28, 20, 20]  # IoU 4 / 796


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("found", "kinds", "missed"),
    [
        ([(CAT, OBJECT)], [RIGHT], 0),
        ([(DOG, OBJECT)], ["classification"], 0),
        ([(CAT, SHIFTED)], ["localisation"], 0),
        ([(DOG, SHIFTED)], ["both"], 1),
        ([(CAT, OBJECT), (CAT, OBJECT)], [RIGHT, "duplicate"], 0),
        ([(CAT, FAR)], ["background"], 1),
        ([(DOG, FAR)], ["background"], 1),
        ([(CAT, TOUCHING)], ["background"], 1),
        ([], [], 1),
        ([(CAT, OBJECT), (CAT, SHIFTED)], [RIGHT, "localisation"], 0),
        ([(DOG, OBJECT), (CAT, OBJECT)], ["classification", RIGHT], 0),
    ],
)
def test_kinds(found: list[tuple[int, list[float]]], kinds: list[str], missed: int, masks: bool) -> None:
    """Of detections of one object, a cat."""
    results = [thing(label, box, score=0.9 - 0.1 * i) for i, (label, box) in enumerate(found)]
    image = find([thing(CAT, list(OBJECT))], results, masks)
    assert image.kinds.tolist() == kinds and image.missed().sum() == missed
    summary = summarize_errors([image])
    expected = {error: kinds.count(error) for error in ERRORS} | {"missed": missed}
    assert summary.counts == expected


def test_masks_and_boxes_differ() -> None:
    """A detection with the box of the object and half of its mask."""
    found = thing(CAT, list(OBJECT), score=0.5)
    found["segmentation"] = rle([10, 10, 9, 20])
    truth = [thing(CAT, list(OBJECT))]
    assert find(truth, [found], masks=False).kinds.tolist() == [RIGHT]
    assert find(truth, [found], masks=True).kinds.tolist() == ["localisation"]


def test_the_best_detection_takes_the_object() -> None:
    """Wherever it is in the list; and of two objects the one that it covers better."""
    image = find([thing(CAT, list(OBJECT))], [thing(CAT, OBJECT, score=0.3), thing(CAT, [12, 10, 20, 20], score=0.8)])
    assert image.scores.tolist() == [0.8, 0.3] and image.kinds.tolist() == [RIGHT, "duplicate"]
    near = [thing(CAT, [14, 10, 20, 20]), thing(CAT, list(OBJECT))]
    image = find(near, [thing(CAT, OBJECT, score=0.3)])
    assert image.objects.tolist() == [1] and image.ious.tolist() == [1.0]


def test_crowds_count_neither_way() -> None:
    crowd = thing(CAT, [0, 0, 40, 40], iscrowd=1)
    results = [thing(CAT, OBJECT, score=0.9), thing(DOG, OBJECT, score=0.8), thing(CAT, FAR, score=0.7)]
    image = find([crowd, thing(DOG, [60, 0, 10, 10])], results)
    assert image.kinds.tolist() == [errors.IGNORED, "background", "background"] and len(image.object_classes) == 1
    assert summarize_errors([image]).counts["background"] == 2


def test_most_detections() -> None:
    results = [thing(CAT, FAR, score=0.9), thing(CAT, OBJECT, score=0.8)]
    assert find([thing(CAT, list(OBJECT))], results, max_detections=1).kinds.tolist() == ["background"]


@pytest.mark.parametrize(
    ("found", "error", "gain"),
    [
        ([(CAT, OBJECT), (DOG, FAR)], "classification", 50),  # the cat is right; the dog was called a cat
        ([(CAT, OBJECT), (DOG, [60, 30, 20, 20])], "localisation", 50),
        ([(CAT, OBJECT)], "missed", 50),
    ],
)
def test_gains(found: list[tuple[int, list[float]]], error: str, gain: float) -> None:
    """Of a cat that is found, and a dog: AP is 50, and 100 without the error."""
    dog = [50, 30, 20, 20]
    results = [thing(label, box, score=0.9 - 0.1 * i) for i, (label, box) in enumerate(found)]
    if error == "classification":
        results[1]["category_id"] = CAT
    image = find([thing(CAT, list(OBJECT)), thing(DOG, dog)], results)
    summary = summarize_errors([image])
    assert summary.ap == pytest.approx(50) and summary.counts[error] == 1 and sum(summary.counts.values()) == 1
    assert summary.gains == {e: pytest.approx(gain if e == error else 0, abs=1e-9) for e in ERRORS}


@pytest.mark.parametrize(
    ("error", "wrong"),
    [("background", [50, 30, 20, 20]), ("duplicate", OBJECT), ("both", None)],
)
def test_gains_of_what_is_left_out(error: str, wrong: list[float] | None) -> None:
    """A wrong detection between two right ones: the precision at the second object is 2/3, and 1 without it."""
    truth = [thing(CAT, list(OBJECT)), thing(CAT, [50, 5, 10, 10])]
    if wrong is None:
        truth.append(thing(DOG, [30, 35, 20, 20]))
        wrong = [40, 35, 20, 20]
    results = [thing(CAT, OBJECT, score=0.9), thing(CAT, wrong, score=0.8), thing(CAT, [50, 5, 10, 10], score=0.7)]
    if len(truth) == 3:
        results.append(thing(DOG, [30, 35, 20, 20], score=0.9))
    summary = summarize_errors([find(truth, results)])
    ap_of_cats = 100 * (51 * 1 + 50 * 2 / 3) / 101
    classes = len({a["category_id"] for a in truth})
    assert summary.ap == pytest.approx((ap_of_cats + 100 * (classes - 1)) / classes)
    assert summary.gains == {e: pytest.approx(100 - summary.ap if e == error else 0, abs=1e-9) for e in ERRORS}
    assert summary.false_positives == pytest.approx(100 - summary.ap)


def test_an_object_is_mended_once() -> None:
    """Of several detections that miss it, by the best; the others are left out."""
    truth = [thing(CAT, list(OBJECT))]
    results = [thing(CAT, SHIFTED, score=0.9), thing(CAT, [0, 10, 20, 20], score=0.8), thing(DOG, OBJECT, score=0.7)]
    image = find(truth, results)
    assert image.kinds.tolist() == ["localisation", "localisation", "classification"]
    assert image.mended().tolist() == [True, False, False] and not image.missed().any()
    assert summarize_errors([image]).gains["localisation"] == pytest.approx(100)


def test_quality() -> None:
    """By counting: one right with an IoU of 1, one wrong, one object not found; the threshold counts."""
    truth = [thing(CAT, list(OBJECT)), thing(CAT, list(FAR))]
    image = find(truth, [thing(CAT, OBJECT, score=0.9), thing(DOG, OBJECT, score=0.5)])
    assert image.quality(0.0) == pytest.approx(1 / (1 + 0.5 + 0.5)) and image.quality(0.6) == pytest.approx(1 / 1.5)
    assert image.quality(0.95) == 0 and np.isnan(find([], []).quality(0))


def scene() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """40 images with objects, and detections that are near them or anywhere."""
    draw = random.Random(7).random  # the same on every platform and version
    labels = (CAT, DOG, 8)

    def box() -> list[float]:
        w, h = 8 + 22 * draw(), 8 + 22 * draw()
        return [(SIZE[1] - w) * draw(), (SIZE[0] - h) * draw(), w, h]

    annotations, results = [], []
    for image in range(1, 41):
        for _ in range(int(5 * draw())):
            label, place = labels[int(3 * draw())], box()
            annotations.append(thing(label, place, image_id=image))
            for _ in range(int(4 * draw())):
                reach = (2, 8, 18)[int(3 * draw())]
                x, y, w, h = (v + reach * (draw() - 0.5) for v in place)
                other = label if draw() < 0.7 else labels[int(3 * draw())]
                results.append(thing(other, [x, y, max(w, 3), max(h, 3)], image_id=image, score=draw()))
        for _ in range(int(4 * draw())):
            results.append(thing(labels[int(3 * draw())], box(), image_id=image, score=draw()))
    return content(annotations, images=40), results


TIDECV = {
    "masks": {
        "counts": [15, 46, 14, 21, 37, 15],
        "ap": [19.412394555827035, 7.609422918996785, 21.80667350124594, 1.5138694067735479, 1.353929027150972]
        + [4.984562807622591, 4.408629084226167, 36.03314999862841, 15.417912932566438],
    },
    "boxes": {
        "counts": [15, 46, 15, 20, 38, 17],
        "ap": [17.841064464684774, 6.323695362847424, 21.469249467478566, 1.3781516605404533, 1.3201693376064725]
        + [4.60222739465333, 4.826063413649127, 35.95431507326903, 15.264261843366913],
    },
}
"""Counts of the ERRORS; AP50, what it gains without each of them, without false positives, without false negatives."""


@pytest.mark.parametrize("masks", [True, False])
def test_as_the_package_of_the_authors(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of tidecv 1.0.1 on the scene; its recalls are i / 100, rounded otherwise than COCO's."""
    monkeypatch.setattr(errors, "_RECALLS", np.array([i / 100 for i in range(101)]))
    truth, results = scene()
    summary = summarize_errors(list(find_errors(index(truth), results, masks, 100).values()))
    expected = TIDECV["masks" if masks else "boxes"]
    assert list(summary.counts.values()) == expected["counts"]
    assert [summary.ap, *summary.gains.values(), summary.false_positives, summary.false_negatives] == pytest.approx(
        expected["ap"], abs=1e-9
    )


@pytest.mark.parametrize("masks", [True, False])
def test_ap_is_that_of_pycocotools(masks: bool) -> None:
    content, results = scene()
    for number, annotation in enumerate(content["annotations"]):
        annotation["iscrowd"] = int(number % 9 == 0)
    truth = index(content)
    summary = summarize_errors(list(find_errors(truth, results, masks, 100).values()))
    evaluation = COCOeval(truth, load_results(truth, results, masks), "segm" if masks else "bbox")
    assert summary.ap == pytest.approx(evaluate(evaluation)["AP50"])


def test_nothing() -> None:
    summary = summarize_errors([])
    assert np.isnan(summary.ap) and summary.counts == dict.fromkeys(ERRORS, 0)
    assert summarize_errors([find([thing(CAT, list(OBJECT))], [])]).gains["missed"] == 0
