"""Detections written image by image as COCO JSON, and the categories of a model."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from querymask import get_cfg
from querymask.common.detection_files import DetectionWriter, model_categories
from querymask.common.detections import Detections

CATEGORIES = [{"id": 4, "name": "Äpfel"}, {"id": 9, "name": "pear"}]


def found(number: int) -> Detections:
    scores, labels = np.full(number, 0.5, np.float32), np.ones(number, np.int64)
    return Detections((4, 6), scores, labels, ["pear"] * number, np.zeros((number, 4), np.float32), None)


def test_files_are_whole_where_the_work_ends_early(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/new/"
    with pytest.raises(KeyboardInterrupt), DetectionWriter(prefix, CATEGORIES) as writer:
        writer.add(found(2), (8, 12), 7, "a.png")
        writer.add(found(0), (4, 6), 8, "ä.png")
        raise KeyboardInterrupt
    detections = json.loads((tmp_path / "new" / "detections.json").read_text(encoding="utf-8"))
    assert detections == [{"image_id": 7, "category_id": 9, "score": 0.5, "bbox": [0, 0, 0, 0]}] * 2
    images = json.loads((tmp_path / "new" / "images.json").read_text(encoding="utf-8"))
    assert images["categories"] == CATEGORIES
    assert images["images"] == [
        {"id": 7, "file_name": "a.png", "height": 8, "width": 12},
        {"id": 8, "file_name": "ä.png", "height": 4, "width": 6},
    ]


def test_files_of_no_image(tmp_path: Path) -> None:
    with DetectionWriter(f"{tmp_path}/film.", CATEGORIES):
        pass
    assert json.loads((tmp_path / "film.detections.json").read_text()) == []
    assert json.loads((tmp_path / "film.images.json").read_text())["images"] == []


def test_categories() -> None:
    """With the ids of the test set where it has as many classes."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.DATASETS.TEST, cfg.MODEL.SOLQ.NUM_CLASSES = "SOLQ", ("detection_files_set",), 2
    try:
        MetadataCatalog.get("detection_files_set").thing_dataset_id_to_contiguous_id = {9: 1, 4: 0}
        assert model_categories(cfg, ["Äpfel", "pear"]) == CATEGORIES
        assert [c["name"] for c in model_categories(cfg, [])] == ["class 0", "class 1"]
        cfg.MODEL.SOLQ.NUM_CLASSES = 3
        assert [c["id"] for c in model_categories(cfg, ["a", "b", "c"])] == [1, 2, 3]
    finally:
        MetadataCatalog.remove("detection_files_set")
    cfg.DATASETS.TEST = ()
    assert model_categories(cfg, ["a"]) == [{"id": 1, "name": "a"}]
