"""Values that no object has, in annotations and results: mended with a line or refused by name, whatever their size."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coco_files import Change, each, write
from detectron2.data import MetadataCatalog

from querymask.common.data.annotations import AnnotationError, findings, load_coco_json, read_coco
from querymask.common.evaluation.results import evaluate_results, register_annotations

HUGE = 10**400  # JSON has no limit, float has


@pytest.fixture
def evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict]]:
    """Function that spoils the files of perfect detections and gives their scores."""
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    monkeypatch.setattr(findings, "_SAID", set())

    def run(change: Change = lambda c: None, change_results: Change = lambda r: None) -> dict[str, dict[str, float]]:
        truth, results = write(tmp_path, change, change_results)
        return evaluate_results(results, register_annotations(truth), boundary=True)

    yield run
    MetadataCatalog.pop(str(tmp_path / "truth.json"), None)


MENDED: dict[str, tuple[dict[str, Any], str]] = {
    "huge box": ({"bbox": [HUGE, 1, 2, 3]}, "bbox no four numbers"),
    "huge area": ({"area": HUGE}, "'area' that is no number"),
    "area beyond the box": ({"area": 1e12}, "'area' that is not that of the object in pixels"),
    "area of a larger image": ({"area": 64 * 64 * 100}, "'area' that is not that of the object in pixels"),
    "area 0": ({"area": 0}, "'area' that is not that of the object in pixels"),
    "area in parts of the image": ({"area": 100 / 6144}, "'area' that is not that of the object in pixels"),
    "keypoints of texts": ({"keypoints": "none"}, "'keypoints'"),
    "keypoints of null": ({"keypoints": [None, None, 0]}, "'keypoints'"),
    "keypoints in pairs": ({"keypoints": [[1, 2], [3, 4], [5, 6]]}, "'keypoints'"),
    "no keypoints": ({"keypoints": None}, ""),
    "keypoints": ({"keypoints": [4, 5, 2], "num_keypoints": 1}, ""),
    "area with the border": ({"area": 121}, ""),
    "area of a thin part": ({"area": 12.5}, ""),
}


@pytest.mark.parametrize("fault", MENDED)
def test_mended(evaluated: Callable[..., dict], fault: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    values, said = MENDED[fault]
    for scores in evaluated(each(**values)).values():
        # The objects of 10 x 10 pixels are small, whatever the file says
        assert (scores["AP"], scores["APs"]) == pytest.approx((100, 100))
        assert math.isnan(scores["APm"]) and math.isnan(scores["APl"])
    assert said in caplog.text and bool(caplog.records) == bool(said)
    assert len(load_coco_json(str(tmp_path / "truth.json"), str(tmp_path))[0]["annotations"]) == 4


REFUSED: dict[str, tuple[Change, str]] = {
    "endless size": (each(segmentation={"size": [math.inf, 96], "counts": [640, 64, 5440]}), r"'size' is \[inf, 96\]"),
    "runs beyond 64 bits": (
        each(segmentation={"size": [64, 96], "counts": [2**62, 2**62, 2**62, 2**62, 640, 64, 5440]}),
        "'counts' must be a list of lengths",
    ),
    "image of 10^18 pixels": (lambda c: c["images"][0].update(height=10**9, width=10**9), "hold 2 billion pixels"),
    "image of one row": (lambda c: c["images"][0].update(height=1, width=2**31), "hold 2 billion pixels"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(evaluated: Callable[..., dict], fault: str, tmp_path: Path) -> None:
    change, message = REFUSED[fault]
    with pytest.raises(AnnotationError, match=message) as error:
        evaluated(change)
    assert str(error.value).startswith(str(tmp_path / "truth.json"))


@pytest.mark.parametrize("polygon", [[HUGE, 2, 3, 4, 5, 6], [HUGE, 2, -HUGE, 4, 5, 6]])
def test_huge_coordinates_make_an_object_ignored(evaluated: Callable[..., dict], polygon: list) -> None:
    scores = evaluated(lambda c: c["annotations"][1].update(segmentation=[polygon]))
    assert {task: values["AP"] for task, values in scores.items()} == pytest.approx(dict.fromkeys(scores, 100))


def test_files_that_json_refuses_are_named(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    for text in ('{"images": [{"id": ' + "9" * 5000 + "}]}", json.dumps({}).encode("utf-16")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(AnnotationError, match="truth.json: not JSON"):
            read_coco(path)


@pytest.mark.parametrize("name", [5, "", None, ["a.png"]])
def test_file_name_that_is_none(tmp_path: Path, name: Any) -> None:
    truth, _ = write(tmp_path, lambda c: c["images"][0].update(file_name=name))
    with pytest.raises(AnnotationError, match="truth.json: image with id 1: its 'file_name' is"):
        load_coco_json(str(truth), str(tmp_path))
