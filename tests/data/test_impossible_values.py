"""Values that no object has, in annotations and results: mended with a line or refused by name, whatever their size."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coco_files import HEIGHT, WIDTH, Change, each, squares, write
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from querymask.common.data.annotations import (
    AnnotationError,
    Findings,
    ImageInfo,
    clean_coco,
    clean_entries,
    clean_record,
    findings,
    load_coco_json,
    read_coco,
)
from querymask.common.data.training_set import read_training_set
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


def test_keys_that_are_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    text = json.dumps(squares())
    path.write_text(text[:-1] + ', "annotations": []}')
    with pytest.raises(AnnotationError, match="truth.json: not JSON .key 'annotations' is twice in one object"):
        read_coco(path)
    path.write_text(text.replace('"cell"', '"images"'))  # a class of that name
    assert len(read_coco(path)["annotations"]) == 4


def test_image_twice_with_two_sizes(tmp_path: Path) -> None:
    truth, _ = write(tmp_path, lambda c: c["images"].append({**c["images"][0], "height": 65}))
    with pytest.raises(AnnotationError, match=r"images\[1\], a.png: 'id' 1 is there before with another height"):
        read_coco(truth)


def test_annotations_without_ids_are_compared_with_few_others() -> None:
    """All with all would take minutes for thousands of objects in an image."""

    class Counted(dict):
        comparisons = 0

        def __eq__(self, other: object) -> bool:
            Counted.comparisons += 1
            return dict.__eq__(self, other)

    content = squares(150)
    for annotation in content["annotations"]:
        del annotation["id"]
    content["annotations"] = [Counted(annotation) for annotation in [*content["annotations"]] * 2]
    assert len(clean_coco(content, "truth.json")["annotations"]) == 150
    assert Counted.comparisons <= 300


@pytest.mark.parametrize("corners", [False, True])
def test_box_near_the_corner_is_read_as_the_others(corners: bool) -> None:
    """[1, 1, 11, 11] are corners of the square in one file, and its sides with the border's pixel in another."""
    content = squares()
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height] if corners else [x, y, width + 1, height + 1]
    boxes = [annotation["bbox"] for annotation in clean_coco(content, "truth.json")["annotations"]]
    assert [box[2] for box in boxes] == ([10] * 4 if corners else [11] * 4)
    record = {"file_name": "a.png", "image_id": 1, "height": HEIGHT, "width": WIDTH}
    annotations = [{**a, "category_id": 0, "bbox_mode": BoxMode.XYWH_ABS} for a in content["annotations"]]
    (clean,) = clean_entries([{**record, "annotations": annotations}], "data set made")
    assert [a["bbox"] for a in clean["annotations"]] == boxes
    assert (
        clean_record(clean["annotations"][0], ImageInfo("a.png", HEIGHT, WIDTH), "", Findings(""))["bbox"] == boxes[0]
    )


def test_data_sets_of_background_beside_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    record = {"file_name": "a.png", "height": HEIGHT, "width": WIDTH, "image_id": 1}
    objects = [{**a, "category_id": 0, "bbox_mode": BoxMode.XYWH_ABS} for a in squares()["annotations"]]
    for name, annotations in (("objects", objects), ("background", [])):
        DatasetCatalog.register(name, lambda annotations=annotations: [{**record, "annotations": annotations}])
    try:
        assert len(read_training_set(["objects", "background"])) == 2
        assert "data set background: its 1 images have no annotations, and count as background" in caplog.text
        with pytest.raises(AnnotationError, match="background: there is no object to train on"):
            read_training_set(["background", "background"])
    finally:
        for name in ("objects", "background"):
            DatasetCatalog.remove(name)
