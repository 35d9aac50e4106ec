"""Pictures of a run: one for each image, and no trouble with them costs the run its results."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import panoptic_files
import pytest
import torch
from data_folders import restored_catalog
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from PIL import Image

from querymask.common import visualization
from querymask.common.engine import Trainer, default_setup
from querymask.common.evaluation import pictures
from querymask.common.evaluation.build import build_evaluator


@pytest.fixture
def val(coco_folder: Path, tmp_path: Path, cfg: CfgNode, register: Callable[..., str]) -> Callable[..., CfgNode]:
    """Function that makes a changed copy of the validation set the test set of the config."""

    def make(change: Callable[[dict, Path], None]) -> CfgNode:
        content = json.loads((coco_folder / "val.json").read_text())
        folder = tmp_path / "images"
        for image in content["images"]:
            folder.mkdir(exist_ok=True)
            (folder / image["file_name"]).write_bytes((coco_folder / "val" / image["file_name"]).read_bytes())
        change(content, folder)
        (tmp_path / "val.json").write_text(json.dumps(content))
        cfg.DATASETS.TEST = (register("pictures_val", tmp_path / "val.json", folder),)
        cfg.VIS_NUM_IMAGES, cfg.VIS_SCORE_THRESHOLD = 3, 0.0
        return cfg

    return make


def written(cfg: CfgNode) -> list[str]:
    return sorted(path.name for path in (Path(cfg.OUTPUT_DIR) / "predictions").iterdir())


def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the writer of pictures says, filled by the run."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(pictures.logger, level, lines.append)
    return lines


def test_equal_names_in_two_folders(val: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch) -> None:
    def move(content: dict, folder: Path) -> None:
        for number, image in enumerate(content["images"]):
            name = f"cam{number}/0001.png"
            (folder / name).parent.mkdir()
            (folder / image["file_name"]).rename(folder / name)
            image["file_name"] = name if number else name.replace("/", "\\")

    cfg, lines = val(move), warnings(monkeypatch)
    for _ in range(2):  # another evaluation replaces them
        Trainer.evaluate(cfg)
        assert written(cfg) == ["0001.png", "0001_2.png", "0001_3.png"]
    assert lines == [f"3 pictures of predictions beside ground truth are in {cfg.OUTPUT_DIR}/predictions/"] * 2


def test_a_picture_that_cannot_be_drawn(val: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of a run without pictures."""
    cfg, lines = val(lambda content, folder: None), warnings(monkeypatch)
    draw = visualization.save_comparison

    def fail(entry: dict, *arguments: object) -> None:
        if entry["file_name"].endswith("1.png"):
            raise KeyError("a fault")
        draw(entry, *arguments)

    monkeypatch.setattr(visualization, "save_comparison", fail)
    results = Trainer.evaluate(cfg)
    assert set(results) == {"bbox", "segm"} and not math.isnan(results["segm"]["AP"])
    assert written(cfg) == ["0.png", "2.png"]
    assert lines[0].endswith("images/1.png: KeyError: 'a fault'") and "there is no picture of" in lines[0]
    assert lines[1].startswith("2 pictures of predictions")


def test_16_bits_are_drawn_as_the_model_sees_them(val: Callable[..., CfgNode]) -> None:
    def deepen(content: dict, folder: Path) -> None:
        for image in content["images"]:
            grey = np.asarray(Image.open(folder / image["file_name"]).convert("L"))
            Image.fromarray(1000 + 10 * grey.astype(np.uint16)).save(folder / image["file_name"])

    cfg = val(deepen)
    with pytest.raises(RuntimeError, match="0.png .*INPUT.PIXEL_RANGE"):
        Trainer.evaluate(cfg)
    cfg.INPUT.PIXEL_RANGE = [1000, 3550]
    Trainer.evaluate(cfg)
    assert written(cfg) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("names", [[1, 2], ["\u732b", "a\nb"], ["only one"], [None, ""]])
def test_class_names_of_any_kind(val: Callable[..., CfgNode], names: list) -> None:
    cfg = val(lambda content, folder: None)
    entry = {
        "file_name": str(Path(cfg.OUTPUT_DIR).parent / "images" / "0.png"),
        "annotations": [{"category_id": i, "bbox": [5, 5, 20, 20], "bbox_mode": 1} for i in (-1, 0, 1, 2)],
    }
    metadata = MetadataCatalog.get("pictures_of_any_kind")
    metadata.thing_classes = names
    try:
        instances = visualization.Instances((64, 48))
        picture = visualization.comparison(entry, instances, metadata)
    finally:
        MetadataCatalog.remove("pictures_of_any_kind")
    assert picture.shape[1] > 2 * 300
    labels = [item.label for item in visualization._items(entry["annotations"], names, 0.0, 64, 48)]
    expected = [str(name) for name in names] + [f"class {i}" for i in range(len(names), 3)]
    assert labels == ["class -1", *expected]


def test_curves_that_cannot_be_drawn(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run keeps its results."""
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 2, ("engine_val",)

    def fail(*arguments: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(visualization, "plot_curves", fail)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert "segm" in results and not (Path(cfg.OUTPUT_DIR) / "curves.png").exists()


def test_a_font_that_is_none_stops_the_run_at_its_start(cfg: CfgNode) -> None:
    cfg.VIS_FONT = "gone.ttf"
    with pytest.raises(ValueError, match="VIS_FONT is 'gone.ttf', which is no font"):
        default_setup(cfg, None)


def test_panoptic_maps_beside_their_ground_truth(tmp_path: Path, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn on the left is the PNG file, on the right the prediction, which is the same here."""
    metadata = {
        "thing_classes": ["dog", "cat", "sky", "grass"],
        "stuff_classes": ["dog", "cat", "sky", "grass"],
        "thing_dataset_id_to_contiguous_id": {3: 0, 5: 1},
        "stuff_dataset_id_to_contiguous_id": {2: 2, 9: 3},
    }
    path = panoptic_files.write_panoptic(tmp_path)
    with restored_catalog():
        register_coco_panoptic("drawn", metadata, str(tmp_path / "val"), str(path.with_suffix("")), str(path))
        cfg.DATASETS.TEST, cfg.VIS_NUM_IMAGES, cfg.VIS_SCORE_THRESHOLD = ("drawn",), 1, 0.5
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        lines = warnings(monkeypatch)
        evaluator = build_evaluator(cfg, "drawn")
        evaluator.reset()
        entries = DatasetCatalog.get("drawn")
        ids = torch.from_numpy(panoptic_files.segment_map())
        segments = [
            {"id": key, "category_id": label, "isthing": label < 2, "score": 0.4 if label == 0 else 0.9}
            for key, label in zip(panoptic_files.IDS, (2, 0, 1, 3), strict=True)
        ]
        evaluator.process(entries, [{"panoptic_seg": (ids, segments)} for _ in entries])
        scores = evaluator.evaluate()
    assert scores["panoptic_seg"]["PQ"] == pytest.approx(100) and written(cfg) == ["a.png"]
    assert [line for line in lines if "pictures of predictions" in line]
    with Image.open(tmp_path / "run" / "predictions" / "a.png") as picture:
        drawn = np.asarray(picture.convert("RGB")).astype(int)
    shift = (drawn.shape[1] - 12) // 2  # of the panels, behind a margin of 12
    differs = np.abs(drawn[60:200, 12:shift] - drawn[60:200, 12 + shift : 2 * shift]).max(axis=2) > 60
    # The dog's score is too low to be drawn; in the sky its place is 20 to 30 of 60 pixels
    columns = np.flatnonzero(differs.mean(axis=0) > 0.2) / differs.shape[1]
    assert 0.3 < columns.min() < 0.37 and 0.47 < columns.max() < 0.53
