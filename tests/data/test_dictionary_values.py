"""Registered functions with values of NumPy, Torch, OpenCV and GeoJSON, and boxes of another mode than they say."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, detections, squares
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from querymask.common.data.annotations import AnnotationError, clean_entries
from querymask.common.data.training_set import read_training_set
from querymask.common.evaluation import InstanceEvaluator

Entry = dict[str, Any]


def entry(change: Callable[[Entry], Any] = lambda annotation: None, **values: Any) -> Entry:
    """An image with four squares as a registered function gives it, each annotation changed."""
    annotations = []
    for square in squares()["annotations"]:
        kept = {"bbox": square["bbox"], "segmentation": square["segmentation"]}
        annotations.append({**kept, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0})
        change(annotations[-1])
    return {"file_name": "a.png", "image_id": 1, "height": HEIGHT, "width": WIDTH, **values, "annotations": annotations}


@pytest.fixture
def scores() -> Iterator[Callable[[Entry], dict[str, float]]]:
    """Function that gives AP by task of perfect detections on an entry, which must be good for training, too."""

    def run(record: Entry) -> dict[str, float]:
        DatasetCatalog.register("entries", lambda: [record])
        MetadataCatalog.get("entries").thing_classes = ["cell"]
        assert len(read_training_set(["entries"])) == 1
        evaluator = InstanceEvaluator("entries", None)
        evaluator.add_results([{**result, "category_id": 0} for result in detections(squares())])
        return {task: values["AP"] for task, values in evaluator.evaluate().items()}

    yield run
    DatasetCatalog.remove("entries")
    MetadataCatalog.remove("entries")


def masked(form: Callable[[np.ndarray], Any]) -> Callable[[Entry], None]:
    def change(annotation: Entry) -> None:
        rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH))
        annotation["segmentation"] = form(mask_util.decode(rle))

    return change


def polygon(form: Callable[[np.ndarray], Any]) -> Callable[[Entry], None]:
    return lambda a: a.update(segmentation=form(np.array(a["segmentation"][0], dtype=float).reshape(-1, 2)))


def to_corners(annotation: Entry) -> None:
    x, y, width, height = annotation["bbox"]
    annotation["bbox"] = [x, y, x + width, y + height]


GOOD: dict[str, Entry] = {
    "Torch": entry(
        lambda a: a.update(category_id=torch.tensor(0), iscrowd=torch.tensor(0), bbox=torch.tensor(a["bbox"]))
    ),
    "NumPy": entry(
        lambda a: a.update(category_id=np.array(0), iscrowd=np.bool_(False), bbox=np.array(a["bbox"])),
        image_id=np.int64(1),
        height=np.array(64),
        width=torch.tensor(96),
    ),
    "mask [H, W, 1]": entry(masked(lambda mask: mask[..., None])),
    "mask [1, H, W]": entry(masked(lambda mask: torch.from_numpy(mask)[None] > 0)),
    "mask as lists": entry(masked(lambda mask: mask.tolist())),
    "mask as lists of bool": entry(masked(lambda mask: (mask > 0).tolist())),
    "run lengths in a list": entry(masked(lambda mask: [mask_util.encode(np.asfortranarray(mask))])),
    "contour of OpenCV": entry(polygon(lambda points: points[:, None])),
    "contours of OpenCV": entry(polygon(lambda points: [points[:, None].astype(np.int32)])),
    "contours as lists": entry(polygon(lambda points: [points[:, None].tolist()])),
    "GeoJSON": entry(polygon(lambda points: [[points.tolist()]])),
    "sides stated as corners": entry(lambda a: a.update(bbox_mode=BoxMode.XYXY_ABS)),
    "corners stated as sides": entry(to_corners),
}


@pytest.mark.parametrize("name", GOOD)
def test_read(scores: Callable[[Entry], dict[str, float]], name: str) -> None:
    assert scores(GOOD[name]) == pytest.approx({"bbox": 100, "segm": 100})


def test_sides_stated_as_corners_without_masks() -> None:
    """The area shows it; where nothing does, the first box that cannot be corners stops the run."""

    def change(annotation: Entry) -> None:
        annotation.update(bbox_mode=BoxMode.XYXY_ABS, area=100)
        del annotation["segmentation"]

    (record,) = clean_entries([entry(change)], "data set made")
    assert [a["bbox"] for a in record["annotations"]] == [a["bbox"] for a in squares()["annotations"]]
    record = entry(change)
    for annotation in record["annotations"]:
        del annotation["area"]
    with pytest.raises(AnnotationError, match="annotation 1 of a.png: 'bbox' is .*no extent"):
        clean_entries([record], "data set made")


@pytest.mark.parametrize(
    ("record", "names", "message"),
    [
        (entry(masked(lambda mask: np.repeat(mask[..., None], 3, 2))), None, r"mask has shape \(64, 96, 3\)"),
        (entry(lambda a: a.update(category_id=2**40)), None, "'category_id' is 1099511627776"),
        (entry(), "cell", "the metadata: thing_classes is 'cell'. Give a list"),
        (entry(), {0: "cell"}, "the metadata: thing_classes is {0: 'cell'}. Give a list"),
    ],
)
def test_refused(record: Entry, names: Any, message: str) -> None:
    with pytest.raises(AnnotationError, match=f"data set made: .*{message}"):
        clean_entries([record], "data set made", names)
