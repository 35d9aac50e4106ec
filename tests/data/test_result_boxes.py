"""Boxes of result files in other forms than COCO's are refused; those of weak models are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, write
from detectron2.data import MetadataCatalog

from querymask.common.data.annotations import AnnotationError
from querymask.common.evaluation.results import evaluate_results, register_annotations

SIDES = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])


def to_corners(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:2], box[:2] + box[2:]])


def to_centre(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:2] + box[2:] / 2, box[2:]])


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., dict]:
    """Function that changes boxes and masks of perfect detections, and evaluates."""

    def run(form: Callable[[np.ndarray], Any], masks: bool = True) -> dict[str, dict[str, float]]:
        def change(results: list[dict[str, Any]]) -> None:
            for result in results:
                result["bbox"] = form(np.array(result["bbox"], dtype=float)).tolist()
                if not masks:
                    del result["segmentation"]

        truth, results = write(tmp_path, change_results=change)
        return evaluate_results(results, register_annotations(truth))

    yield run
    MetadataCatalog.pop(str(tmp_path / "truth.json"), None)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (to_corners, r"\[x0, y0, x1, y1\]"),
        (to_centre, r"\[centre x, centre y, width, height\]"),
        (lambda box: box / SIDES, "parts of the image's width and height"),
        (lambda box: to_corners(box) / SIDES, "corners in parts of the image's width and height"),
        (lambda box: to_centre(box) / SIDES, r"\[centre x, centre y, width, height\] in parts of the image"),
    ],
)
def test_masks_show_another_form(scores: Callable[..., dict], form: Callable, name: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=f"result 0: 'bbox' .* fits its mask as {name}, not as") as error:
        scores(form)
    assert str(error.value).startswith(str(tmp_path / "results.json"))


def test_borders_show_another_form(scores: Callable[..., dict]) -> None:
    with pytest.raises(AnnotationError, match=r"result 3: 'bbox' \[61.0, .* leaves the image .* fit as \[x0, y0"):
        scores(to_corners, masks=False)
    with pytest.raises(AnnotationError, match="within the first pixel"):
        scores(lambda box: box / SIDES, masks=False)


def test_weak_boxes_are_evaluated(scores: Callable[..., dict]) -> None:
    """Random, shifted, amodal and empty ones, and such as leave the image."""
    rng = np.random.default_rng(0)
    for form in (
        lambda box: rng.uniform(0, 30, 4),
        lambda box: box + [3, -3, 2, 2],
        lambda box: box + [0, 0, 20, 10],
        lambda box: box * 0,
        lambda box: box + [-15, -15, 30, 30],
    ):
        for masks in (True, False):
            assert scores(form, masks)["bbox"]["AP"] < 100
    assert scores(lambda box: box)["bbox"]["AP"] == pytest.approx(100)


def test_polygons_in_parts_of_the_image(tmp_path: Path) -> None:
    polygon = [[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]
    truth, results = write(tmp_path, change_results=lambda r: [x.update(segmentation=polygon) for x in r])
    with pytest.raises(AnnotationError, match="results.json: the polygons: .* within the first pixel"):
        evaluate_results(results, register_annotations(truth))
    MetadataCatalog.pop(str(truth), None)
