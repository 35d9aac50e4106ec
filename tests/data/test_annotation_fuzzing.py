"""Any faults in a file with perfect detections end in AP 100 on what is left, or in an error that names the file."""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, detections, runs, squares
from detectron2.data import MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from querymask.common.data.annotations import AnnotationError, findings, load_coco_json
from querymask.common.data.run_lengths import check_rle, read_counts
from querymask.common.evaluation.results import evaluate_results, register_annotations

Annotation = dict[str, Any]


def corners(annotation: Annotation) -> None:
    """XYXY in place of XYWH; not of what is XYXY already."""
    if not annotation.setdefault("corners", False) and _is_box(annotation.get("bbox")):
        x, y, w, h = annotation["bbox"]
        annotation.update(bbox=[x, y, x + w, y + h], corners=True)


def _shows_corners(annotation: Annotation, right: Annotation) -> bool:
    """Whether the mask or the area still tells what the numbers of the box mean: nobody can know it otherwise."""
    return any(annotation.get(key) == right[key] for key in ("area", "segmentation"))


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(v) is int for v in box)


def to_runs(change: Callable[[list[int]], Any], **values: Any) -> Callable[[Annotation], None]:
    """The mask as uncompressed run lengths, changed."""

    def apply(annotation: Annotation) -> None:
        counts = runs(squares()["annotations"][annotation["number"]]["segmentation"][0])
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": change(counts), **values}

    return apply


def compressed(counts: list[int]) -> str:
    return mask_util.frPyObjects({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)["counts"].decode()


def put(key: str, *values: Any) -> list[Callable[[Annotation], None]]:
    return [lambda a, value=value: a.update({key: copy.deepcopy(value)}) for value in values]


def without(key: str) -> Callable[[Annotation], None]:
    return lambda annotation: annotation.pop(key, None)


ON_ANNOTATIONS = [
    *(without(key) for key in ("id", "image_id", "category_id", "iscrowd", "bbox", "area", "segmentation")),
    *put("id", 0, -1, 1, "1", None, 2.5, True),
    *put("image_id", "1", 2, None, 1.0, [1]),
    *put("category_id", "1", 2, None, 1.0),
    *put("iscrowd", True, False, "0", "1", "false", None, 0.0, 1.0, 2, "maybe", []),
    *put("ignore", 0, 1, True, "no", None),
    *put("bbox", None, [], [1, 2], [5, 5, 0, 0], [5, 5, -3, 4], [500, 500, 4, 4], [math.nan] * 4, "box", [0] * 4),
    *put("segmentation", None, [], [[]], {}, "mask", 7, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[math.nan] * 6]),
    *put("segmentation", [["a"] * 6], [[1e12, 0, 5, 5, 9, 9]], [[300, 300, 310, 300, 310, 310]], [[5] * 6], [None]),
    *put("area", None, "large", math.nan, -1, 0),
    corners,
    lambda a: a.update(bbox=[str(v) for v in a["bbox"]]) if _is_box(a.get("bbox")) else None,
    lambda a: a.update(segmentation=a["segmentation"][0])
    if a.get("segmentation") and type(a["segmentation"]) is list
    else None,
    to_runs(lambda counts: counts),
    to_runs(compressed),
    to_runs(lambda counts: counts[:-1]),
    to_runs(lambda counts: counts[:-2]),
    to_runs(lambda counts: [*counts, 5]),
    to_runs(lambda counts: [*counts[:-1], -counts[-1]]),
    to_runs(lambda counts: [*counts[:3], 0, 0, *counts[3:], 0]),
    to_runs(lambda counts: [float(c) for c in counts]),
    to_runs(lambda counts: compressed(counts)[:-3]),
    to_runs(lambda counts: compressed(counts)[3:]),
    to_runs(lambda counts: "\n" + compressed(counts)),
    to_runs(lambda counts: None),
    to_runs(lambda counts: []),
    to_runs(lambda counts: counts, size=[WIDTH, HEIGHT]),
    to_runs(lambda counts: counts, size=None),
    to_runs(lambda counts: counts, size="64x96"),
    to_runs(lambda counts: counts, size=[4, 4]),
]

ON_FILES: list[Callable[[dict[str, Any]], Any]] = [
    *(lambda c, key=key: c.pop(key, None) for key in ("images", "annotations", "categories")),
    *(lambda c, key=key: c["images"][0].pop(key, None) for key in ("id", "file_name", "height", "width")),
    lambda c: c["images"][0].update(height="64"),
    lambda c: c["images"][0].update(height=WIDTH, width=HEIGHT),
    lambda c: c["images"][0].update(height=0),
    lambda c: c["images"][0].update(id="1"),
    lambda c: c["images"].append(c["images"][0]),
    lambda c: c["images"].append({**c["images"][0], "id": "b"}),
    lambda c: c["images"].append({**c["images"][0], "file_name": "b.png"}),
    lambda c: c["categories"][0].update(name=7),
    lambda c: c["categories"][0].pop("name", None),
    lambda c: c["categories"][0].update(id="1"),
    lambda c: c["categories"].append({"id": 3, "name": "cell"}),
    lambda c: c["categories"].append({"id": 1, "name": "dog"}),
    lambda c: c["annotations"].append(c["annotations"][0]),
    lambda c: c["annotations"].append(None),
    lambda c: [a.update(id=i) for i, a in enumerate(c["annotations"])],
    lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
]


def spoil(file_faults: list[int], faults: list[tuple[int, int]]) -> dict[str, Any]:
    content = squares()
    for number, annotation in enumerate(content["annotations"]):
        annotation["number"] = number
    for fault, which in faults:
        for annotation in content["annotations"] if which == 4 else [content["annotations"][which]]:
            ON_ANNOTATIONS[fault](annotation)
    for annotation, right in zip(content["annotations"], squares()["annotations"]):
        if annotation.get("corners") and not _shows_corners(annotation, right):
            annotation.update(bbox=right["bbox"])
    for fault in file_faults:
        try:
            ON_FILES[fault](content)
        except (KeyError, TypeError, AttributeError):
            pass  # an earlier fault has taken away what this one spoils
    return content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(detections(squares())))
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    return tmp_path


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file_faults=st.lists(st.integers(0, len(ON_FILES) - 1), max_size=2),
    faults=st.lists(st.tuples(st.integers(0, len(ON_ANNOTATIONS) - 1), st.integers(0, 4)), max_size=4),
)
def test_no_fault_gives_another_number(
    folder: Path, caplog: pytest.LogCaptureFixture, file_faults: list[int], faults: list[tuple[int, int]]
) -> None:
    content = spoil(file_faults, faults)
    truth = folder / "truth.json"
    truth.write_text(json.dumps(content))
    findings._SAID.clear()
    caplog.clear()
    caplog.set_level("INFO")
    try:
        scores = evaluate_results(folder / "results.json", register_annotations(truth), boundary=True)
        entries = load_coco_json(str(truth), str(folder))
    except AnnotationError as error:
        # The result file is named where it is the one that does not fit the spoiled sizes or ids
        assert str(error).startswith(str(folder)) and str(error).endswith(".")
        return
    finally:
        MetadataCatalog.pop(str(truth), None)
    left = [a for entry in entries for a in entry["annotations"] if not a["iscrowd"]]
    for task, values in scores.items():
        if left:
            assert values["AP"] == pytest.approx(100), (task, content)
        else:
            assert math.isnan(values["AP"])
    assert scores or not content.get("annotations")
    crowds = sum(a.get("iscrowd") in (1, True) for a in content.get("annotations", ()))  # not to be told
    if len(left) + crowds < 4 or set(scores) != {"bbox", "segm", "boundary"}:
        assert caplog.records, content


@given(st.binary(max_size=40), st.integers(1, 12), st.integers(1, 12))
def test_run_lengths_that_pass_are_safe(counts: bytes, height: int, width: int) -> None:
    """Whatever passes fills the image, and pycocotools gives the same pixels as the definition."""
    try:
        rle, _ = check_rle({"size": [height, width], "counts": counts}, height, width)
    except ValueError as error:
        assert "counts" in str(error)
        return
    lengths = read_counts(rle["counts"])
    assert lengths.sum() == height * width and (lengths[1:] > 0).all()
    pixels = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(width, height).T
    assert (mask_util.decode(rle) == pixels).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30))
def test_compressed_run_lengths_are_read_as_they_were_written(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
    rle = mask_util.encode(mask)
    clean, mended = check_rle(rle, height, width)
    assert clean["counts"].encode() == rle["counts"] and not mended
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.reshape(-1, order="F")])))
    assert read_counts(rle["counts"]).tolist() == np.diff([0, *changes, height * width]).tolist()
