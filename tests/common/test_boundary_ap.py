"""Boundary AP: boundaries against their definition pixel by pixel, AP against full matrices of IoU."""

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querymask.common.evaluation.boundary import (
    BoundaryEval,
    boundary_width,
    mask_boundary,
    rle_boundary,
)
from querymask.common.evaluation.scores import METRICS, evaluate, load_results


def boundary_by_pixel(mask: np.ndarray, distance: int) -> np.ndarray:
    """Foreground from which a step of at most ``distance`` in both axes leads to background or out of the image."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y, x in itertools.product(range(height), range(width)):
        if not mask[y, x]:
            continue
        steps = itertools.product(range(y - distance, y + distance + 1), range(x - distance, x + distance + 1))
        result[y, x] = any(not (0 <= v < height and 0 <= u < width) or not mask[v, u] for v, u in steps)
    return result


def boundary_by_erosions(mask: np.ndarray) -> np.ndarray:
    """The paper's definition step by step, on the whole image."""
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    for _ in range(max(1, int(round(0.02 * np.sqrt(height**2 + width**2))))):
        padded = cv2.erode(padded, np.ones((3, 3), np.uint8))
    return mask - padded[1:-1, 1:-1]


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask of rectangles with holes; may touch the border."""
    mask = np.zeros((height, width), np.uint8)
    for value in (1, 1, 1, 0, 1):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] = value
    return mask


def test_width() -> None:
    assert boundary_width(480, 640) == 16
    assert boundary_width(10, 10) == 1
    assert boundary_width(300, 400) == 10


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_boundary_is_that_of_the_definition(distance: int) -> None:
    rng = np.random.default_rng(distance)
    masks = [blobs(rng, 17, 23) for _ in range(12)]
    masks += [np.ones((17, 23), np.uint8), np.zeros((17, 23), np.uint8), np.asfortranarray(masks[0])]
    inner = 0
    for mask in masks:
        boundary = mask_boundary(mask, distance)
        np.testing.assert_array_equal(boundary, boundary_by_pixel(mask, distance))
        inner += int(mask.sum()) - int(boundary.sum())
    assert inner > 0


def test_rle_boundary() -> None:
    rng = np.random.default_rng(0)
    for height, width in [(60, 80), (200, 30), (149, 201)]:
        for _ in range(8):
            mask = blobs(rng, height, width)
            rle = rle_boundary(mask_util.encode(np.asfortranarray(mask)))
            np.testing.assert_array_equal(mask_util.decode(rle), boundary_by_erosions(mask))


class FullBoundaryEval(COCOeval):
    """Every boundary and every IoU, counted in pixels."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truth or not found:
            return []
        found = sorted(found, key=lambda detection: -detection["score"])
        ious = np.zeros((len(found), len(truth)))
        for (i, d), (j, t) in itertools.product(enumerate(found), enumerate(truth)):
            values = []
            pair = [mask_util.decode(item["segmentation"]) for item in (d, t)]
            for a, b in (pair, [boundary_by_erosions(mask) for mask in pair]):
                union = a.sum() if t["iscrowd"] else (a | b).sum()
                values.append((a & b).sum() / max(union, 1))
            ious[i, j] = min(values)
        return ious


def rle(mask: np.ndarray) -> dict[str, Any]:
    return mask_util.encode(np.asfortranarray(mask))


def disc(x: float, y: float, radius: float, height: int, width: int, ripple: float = 0.0) -> np.ndarray:
    """A disc whose radius varies around the circle."""
    v, u = np.mgrid[:height, :width]
    angle = np.arctan2(v - y, u - x)
    return (np.hypot(u - x, v - y) < radius * (1 + ripple * np.sin(9 * angle))).astype(np.uint8)


@pytest.fixture
def scene() -> tuple[COCO, list[dict[str, Any]]]:
    """Ground truth with a crowd, and detections that are good, rippled, shifted or wrong."""
    rng = np.random.default_rng(1)
    height, width = 100, 140
    annotations, results = [], []
    for image in range(1, 6):
        for number in range(4):
            x, y, radius = rng.uniform(30, 110), rng.uniform(30, 70), rng.uniform(8, 32)
            category = 1 + number % 2
            mask = disc(x, y, radius, height, width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": int(number == 3 and image < 3),
                    "segmentation": rle(mask),
                    "area": float(mask.sum()),
                    "bbox": mask_util.toBbox(rle(mask)).tolist(),
                }
            )
            for _ in range(3):
                shift = rng.normal(0, 1, 2)
                found = disc(x + shift[0], y + shift[1], radius, height, width, rng.uniform(0, 0.3))
                detection = {"image_id": image, "category_id": category, "score": float(rng.uniform())}
                results.append({**detection, "bbox": [0.0, 0.0, 1.0, 1.0], "segmentation": rle(found)})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i in range(1, 7)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth, results


def test_ap_equals_that_of_full_matrices(scene: tuple[COCO, list[dict[str, Any]]]) -> None:
    truth, results = scene
    before = [dict(result) for result in results]
    scores = evaluate(BoundaryEval(truth, load_results(truth, results, masks=True)), ["a", "b"])
    assert results == before
    full = evaluate(FullBoundaryEval(truth, load_results(truth, results, masks=True), "segm"), ["a", "b"])
    assert scores == pytest.approx(full, nan_ok=True)
    masks = evaluate(COCOeval(truth, load_results(truth, results, masks=True), "segm"), ["a", "b"])
    assert 5 < scores["AP"] < masks["AP"] - 2, "the outlines are worse than the masks"
    assert list(scores) == [*METRICS, "AP-a", "AP-b"]


def test_scores_are_those_of_pycocotools(scene: tuple[COCO, list[dict[str, Any]]]) -> None:
    truth, results = scene
    scores = evaluate(COCOeval(truth, load_results(truth, results, masks=True), "segm"))
    evaluation = COCOeval(truth, load_results(truth, results, masks=True), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = [100 * value if value >= 0 else float("nan") for value in evaluation.stats[:6]]
    assert list(scores.values()) == pytest.approx(expected, nan_ok=True)
    assert evaluate(COCOeval(truth, load_results(truth, [], masks=True), "segm"))["AP"] == 0
