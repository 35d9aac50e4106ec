"""Evaluation where something is missing: ground truth, predictions, fields of annotations; tables and pictures."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from querymask.common.engine import Trainer
from querymask.common.evaluation import InstanceEvaluator, build_evaluator, results_table


@pytest.fixture
def val(coco_folder: Path, tmp_path: Path, register: Callable[..., str]) -> Callable[..., str]:
    """Function that registers the validation set after a change to its content; returns the name."""

    def make(change: Callable[[dict], None] = lambda content: None) -> str:
        content = json.loads((coco_folder / "val.json").read_text())
        change(content)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content))
        return register("engine_changed", path, coco_folder / "val")

    return make


def perfect(entry: dict, masks: bool = True) -> Instances:
    """Predictions that are the ground truth."""
    annotations = [a for a in entry["annotations"] if not a["iscrowd"]]
    size = entry["height"], entry["width"]
    instances = Instances(size)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.linspace(0.9, 0.8, len(annotations))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    if masks:
        bitmaps = [
            mask_util.decode(mask_util.merge(mask_util.frPyObjects(a["segmentation"], *size))) for a in annotations
        ]
        instances.pred_masks = torch.from_numpy(np.stack(bitmaps)).bool() if bitmaps else torch.zeros(0, *size).bool()
    return instances


def evaluate(name: str, folder: Path, predict: Callable[[dict], Instances] = perfect, boundary: bool = False) -> dict:
    """Results of predictions on every image of a set."""
    evaluator = InstanceEvaluator(name, str(folder), boundary)
    evaluator.reset()
    for entry in DatasetCatalog.get(name):
        evaluator.process([entry], [{"instances": predict(entry)}])
    return evaluator.evaluate()


def written(folder: Path) -> list[dict]:
    return json.loads((folder / "coco_instances_results.json").read_text())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What Detectron2's and our loggers say (once set up, they do not pass it on)."""
    for name in ("detectron2", "querymask"):
        monkeypatch.setattr(__import__("logging").getLogger(name), "propagate", True)
    with caplog.at_level("INFO"):
        yield caplog


def test_perfect_predictions_and_ids_that_are_not_contiguous(val: Callable[..., str], tmp_path: Path) -> None:
    results = evaluate(val(), tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-tall"] == pytest.approx(100)
    assert {result["category_id"] for result in written(tmp_path)} == {3, 70}


def test_boxes_only(val: Callable[..., str], tmp_path: Path) -> None:
    assert list(evaluate(val(), tmp_path, lambda entry: perfect(entry, masks=False))) == ["bbox"]


def test_boundary_ap(cfg: CfgNode, val: Callable[..., str], tmp_path: Path) -> None:
    """100 for the truth itself, less than mask AP where outlines are wrong, with and without boxes; 0 for nothing."""

    def grown(entry: dict) -> Instances:
        instances = perfect(entry)
        if len(instances):
            masks = torch.nn.functional.max_pool2d(instances.pred_masks.float(), 3, stride=1, padding=1)
            instances.pred_masks = masks.bool()
        return instances

    cfg.TEST.BOUNDARY_AP = True
    name = val()
    assert evaluate(name, tmp_path, boundary=True)["boundary"]["AP-tall"] == pytest.approx(100)
    scores = evaluate(name, tmp_path, grown, boundary=True)
    assert list(scores) == ["bbox", "segm", "boundary"]
    assert scores["boundary"]["AP"] < scores["segm"]["AP"] - 5
    masks = evaluate(name, tmp_path, lambda entry: without_boxes(entry), boundary=True)
    assert list(masks) == ["segm", "boundary"]
    nothing = evaluate(name, tmp_path, lambda entry: perfect({**entry, "annotations": []}), boundary=True)
    assert nothing["boundary"]["AP"] == 0
    assert list(evaluate(name, tmp_path, lambda e: perfect(e, masks=False), boundary=True)) == ["bbox"]
    cfg.DATASETS.TEST = ("engine_val",)
    assert set(Trainer.evaluate(cfg)) == {"bbox", "segm", "boundary"}
    MetadataCatalog.get("engine_cityscapes").evaluator_type = "cityscapes_instance"
    with pytest.raises(ValueError, match="TEST.BOUNDARY_AP is for data sets with COCO's or LVIS's evaluation"):
        build_evaluator(cfg, "engine_cityscapes")
    MetadataCatalog.remove("engine_cityscapes")


def without_boxes(entry: dict) -> Instances:
    instances = perfect(entry)
    instances.remove("pred_boxes")
    return instances


def test_masks_only(val: Callable[..., str], tmp_path: Path) -> None:
    """The same mask AP as with boxes, no box AP, and results without boxes; order of scores does not matter."""

    def shuffled(entry: dict) -> Instances:
        instances = without_boxes(entry)
        return instances[torch.arange(len(instances)).flip(0)]

    name = val()
    results = evaluate(name, tmp_path, shuffled)
    assert list(results) == ["segm"]
    assert results["segm"]["AP"] == pytest.approx(100)
    assert all(set(result) == {"image_id", "category_id", "score", "segmentation"} for result in written(tmp_path))
    nothing = evaluate(name, tmp_path, lambda entry: without_boxes({**entry, "annotations": []}))
    assert nothing["segm"]["AP"] == 0 and "bbox" not in nothing


def test_masks_only_without_true_masks(val: Callable[..., str], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    def strip(content: dict) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]

    def predict(entry: dict) -> Instances:
        instances = perfect(entry, masks=False)
        instances.pred_masks = torch.ones(len(instances), entry["height"], entry["width"], dtype=torch.bool)
        instances.remove("pred_boxes")
        return instances

    assert evaluate(val(strip), tmp_path, predict) == {}
    assert "without segmentation: no mask AP" in log.text and written(tmp_path)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_no_ground_truth(val: Callable[..., str], tmp_path: Path, log: pytest.LogCaptureFixture, how: str) -> None:
    def strip(content: dict) -> None:
        content["annotations"] = []
        if how == "missing":
            del content["annotations"]

    def predict(entry: dict) -> Instances:
        box = {"bbox": [1, 2, 3, 4], "iscrowd": 0, "category_id": 1, "segmentation": [[1, 2, 9, 2, 9, 9]]}
        return perfect({**entry, "annotations": [box]})

    assert evaluate(val(strip), tmp_path, predict) == {}
    assert len(written(tmp_path)) == 4
    assert written(tmp_path)[0]["category_id"] == 70
    assert "engine_changed has no ground truth: AP is skipped" in log.text


def test_no_ground_truth_end_to_end(cfg: CfgNode, val: Callable[..., str], log: pytest.LogCaptureFixture) -> None:
    cfg.DATASETS.TEST = (val(lambda content: content.pop("annotations")),)
    cfg.VIS_NUM_IMAGES = 1
    assert Trainer.evaluate(cfg) == {}
    assert written(Path(cfg.OUTPUT_DIR) / "inference")
    assert (Path(cfg.OUTPUT_DIR) / "predictions" / "0.png").is_file()
    assert "AP is skipped" in log.text


def test_no_predictions(val: Callable[..., str], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    results = evaluate(val(), tmp_path, lambda entry: perfect({**entry, "annotations": []}))
    assert results["bbox"]["AP"] == results["segm"]["AP50"] == 0
    assert written(tmp_path) == []
    assert log.text.count("predicted nothing on the 4 images of engine_changed") == 1


def test_no_predictions_and_no_ground_truth(val: Callable[..., str], tmp_path: Path) -> None:
    name = val(lambda content: content.pop("annotations"))
    assert evaluate(name, tmp_path, lambda entry: perfect({**entry, "annotations": []})) == {}
    assert written(tmp_path) == []


def test_crowds_only(val: Callable[..., str], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    name = val(lambda content: [annotation.update(iscrowd=1) for annotation in content["annotations"]])

    def predict(entry: dict) -> Instances:
        return perfect({**entry, "annotations": [{**a, "iscrowd": 0} for a in entry["annotations"]]})

    assert math.isnan(evaluate(name, tmp_path, predict)["segm"]["AP"])
    assert "no ground truth other than crowds: AP is NaN" in log.text
    assert math.isnan(evaluate(name, tmp_path, lambda entry: perfect({**entry, "annotations": []}))["segm"]["AP"])


def test_annotations_without_area_and_iscrowd(val: Callable[..., str], tmp_path: Path) -> None:
    def strip(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
        for annotation in content["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    def predict(entry: dict) -> Instances:
        return perfect({**entry, "annotations": [{"iscrowd": 0, **a} for a in entry["annotations"]]})

    results = evaluate(val(strip), tmp_path, predict)
    assert results["segm"]["APs"] == pytest.approx(100)
    assert math.isnan(results["segm"]["APl"])


def test_annotations_without_masks(val: Callable[..., str], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    def strip(content: dict) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]

    def predict(entry: dict) -> Instances:
        instances = perfect(entry, masks=False)
        instances.pred_masks = torch.ones(len(instances), entry["height"], entry["width"], dtype=torch.bool)
        return instances

    results = evaluate(val(strip), tmp_path, predict)
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "without segmentation: no mask AP" in log.text


def test_untrained_model_end_to_end(cfg: CfgNode, log: pytest.LogCaptureFixture) -> None:
    cfg.DATASETS.TEST = ("engine_val",)
    cfg.VIS_NUM_IMAGES = 3
    cfg.VIS_SCORE_THRESHOLD = 0.0
    results = Trainer.evaluate(cfg)
    assert set(results) == {"bbox", "segm"}
    folder = Path(cfg.OUTPUT_DIR)
    assert sorted(path.name for path in (folder / "predictions").iterdir()) == ["0.png", "1.png", "2.png"]
    assert len(written(folder / "inference")) == 4 * 2 * 8  # images, classes and queries: all fit into 100
    assert "a model with random weights is evaluated" in log.text
    assert "results on engine_val:" in log.text


def test_two_test_sets_do_not_overwrite_each_other(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("engine_val", "engine_train")
    cfg.VIS_NUM_IMAGES = 1
    results = Trainer.evaluate(cfg)
    assert set(results) == {"engine_val", "engine_train"}
    for name in results:
        assert (Path(cfg.OUTPUT_DIR) / "inference" / name / "coco_instances_results.json").is_file()
        assert (Path(cfg.OUTPUT_DIR) / "predictions" / name / "0.png").is_file()


def test_no_test_set(cfg: CfgNode) -> None:
    assert Trainer.evaluate(cfg) == {}


def test_evaluator_by_data_set(cfg: CfgNode, val: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = val()
    assert isinstance(build_evaluator(cfg, name), InstanceEvaluator)
    cfg.VIS_NUM_IMAGES = 1
    assert isinstance(build_evaluator(cfg, name), DatasetEvaluators)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).evaluator_type = "cityscapes_instance"
    with pytest.raises(ImportError, match="pip install cityscapesScripts"):
        build_evaluator(cfg, name)
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    with pytest.raises(ValueError, match="'pascal_voc'; known are coco, lvis"):
        build_evaluator(cfg, name)


def test_results_are_those_of_detectron2(val: Callable[..., str], tmp_path: Path) -> None:
    """Also where masks have the memory layout that they are copied from a GPU with."""
    name = val()
    expected = []
    for entry in DatasetCatalog.get(name):
        expected += instances_to_coco_json(perfect(entry), entry["image_id"])

    def by_columns(entry: dict) -> Instances:
        instances = perfect(entry)
        instances.pred_masks = instances.pred_masks.transpose(1, 2).contiguous().transpose(1, 2)
        return instances

    for predict in (perfect, by_columns):
        evaluate(name, tmp_path, predict)
        found = written(tmp_path)
        ids = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
        assert [{**result, "category_id": ids[result["category_id"]]} for result in found] == expected


def test_table() -> None:
    results = {
        "bbox": {"AP": 12.345, "AP50": 30.0, "AP-cat": 1.0, "AP-sea-lion": float("nan")},
        "segm": {"AP": 7.0, "AP50": 100.0, "AP-cat": 2.0, "AP-sea-lion": 3.0},
    }
    assert results_table(results) == "\n".join(
        [
            "         AP    AP50",
            "box   12.35   30.00",
            "mask   7.00  100.00",
            "",
            "class     box AP  mask AP",
            "cat         1.00     2.00",
            "sea-lion     nan     3.00",
        ]
    )
    assert results_table({}) == ""


def test_result_file_gives_what_the_model_gave(cfg: CfgNode, log: pytest.LogCaptureFixture) -> None:
    cfg.DATASETS.TEST = ("engine_val",)
    cfg.TEST.BOUNDARY_AP = True
    results = Trainer.evaluate(cfg)
    path = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
    log.clear()
    again = Trainer.evaluate_results(cfg, str(path))
    assert list(again) == ["bbox", "segm", "boundary"]
    for task, scores in results.items():
        assert again[task] == pytest.approx(scores, nan_ok=True)
    assert "results on engine_val:" in log.text and "random weights" not in log.text
    path.write_text("[]")
    assert Trainer.evaluate_results(cfg, str(path))["bbox"]["AP"] == 0
    assert "predicted nothing" in log.text
    cfg.DATASETS.TEST = ("engine_val", "engine_train")
    with pytest.raises(ValueError, match="DATASETS.TEST names 2"):
        Trainer.evaluate_results(cfg, str(path))
