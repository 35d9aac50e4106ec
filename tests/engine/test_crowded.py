"""375 objects in an image: from its file to AP, and what is said where a limit is lower."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util
from tiny_models import tiny_cfg
from torch import nn

from querymask.common.engine import Trainer

OBJECTS, SIDE, PITCH = 375, 256, 13
SIZES = {"NUM_CLASSES": 1, "NUM_QUERIES": 400, "NUM_HEADS": 4, "DIM_FEEDFORWARD": 24}
TRANSFORMER = {"HIDDEN_DIM": 64, "ENC_LAYERS": 1, "DEC_LAYERS": 2}
VECTORS = {"CODING_SIZE": 16, "CODING_LENGTH": 20}
METHODS: dict[str, dict[str, Any]] = {
    "SOLQ": {**TRANSFORMER, **VECTORS, "VECTOR_HIDDEN_DIM": 24},
    "ISDA": {**TRANSFORMER, "KERNEL_MASK_FEATURE_DIM": 32},
    "ISTR": {"HIDDEN_DIM": 64, "NUM_STAGES": 2, "DIM_DYNAMIC": 4, "POOL_SIZE": 3, "CODING_NAME": "dct", **VECTORS},
    "EffSeg": {"HIDDEN_DIM": 64, "DEC_LAYERS": 1, "LEVELS": [2, 3, 4, 5, 6], "EFFSEG_REFINEMENTS": 1000},
}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What our loggers say (once set up, they do not pass it on)."""
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    return caplog


@pytest.fixture
def crowd(tmp_path: Path, register: Callable[..., str]) -> str:
    """Name of a data set of one image with 375 discs, as nuclei lie."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    annotations = []
    for k in range(OBJECTS):
        x, y = PITCH * (k % 19) + 8 + rng.uniform(-1, 1), PITCH * (k // 19) + 6 + rng.uniform(-1, 1)
        mask = np.hypot(columns - x, rows - y) < rng.uniform(3, 5)
        pixels[mask] = rng.integers(120, 250)
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        common = {"id": k + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": int(mask.sum())}
        segmentation = {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
        annotations.append({**common, "bbox": mask_util.toBbox(rle).tolist(), "segmentation": segmentation})
    (tmp_path / "crowd").mkdir()
    Image.fromarray(pixels).save(tmp_path / "crowd" / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE}]
    content = {"images": images, "categories": [{"id": 1, "name": "nucleus"}], "annotations": annotations}
    (tmp_path / "crowd.json").write_text(json.dumps(content))
    return register("engine_crowd", tmp_path / "crowd.json")


def crowded_cfg(method: str, name: str, folder: Path) -> CfgNode:
    cfg = tiny_cfg(method, ["res2", "res3", "res4", "res5"], {**SIZES, **METHODS[method]})
    if method == "ISTR":
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.OUT_CHANNELS = "build_basic_resnet_fpn_backbone", 64
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP = (SIDE,), SIDE, "none"
    cfg.TEST.DETECTIONS_PER_IMAGE = 380
    cfg.VIS_NUM_IMAGES = 0
    cfg.SEED = 1
    cfg.OUTPUT_DIR = str(folder)
    return cfg


@pytest.mark.parametrize("method", list(METHODS))
def test_from_mapper_to_ap(crowd: str, tmp_path: Path, method: str, log: pytest.LogCaptureFixture) -> None:
    cfg = crowded_cfg(method, crowd, tmp_path / "output")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch[0]["instances"]) == OBJECTS and len(batch[0]["instances"].gt_masks) == OBJECTS
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    results = Trainer.test(cfg, model.eval())
    assert set(results) == ({"segm"} if method == "ISDA" else {"bbox", "segm"})
    found = json.loads((tmp_path / "output" / "inference" / "coco_instances_results.json").read_text())
    assert 150 < len(found) <= 380 and "more objects" not in log.text


class Perfect(nn.Module):
    """Finds every object of a data set."""

    def __init__(self, name: str) -> None:
        super().__init__()
        (self.entry,) = DatasetCatalog.get(name)

    def forward(self, inputs: list[dict]) -> list[dict]:
        annotations = self.entry["annotations"]
        found = Instances((SIDE, SIDE), scores=torch.linspace(1, 0.5, len(annotations)))
        found.pred_classes = torch.zeros(len(annotations), dtype=torch.int64)
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        masks = [mask_util.decode(annotation["segmentation"]) for annotation in annotations]
        found.pred_masks = torch.from_numpy(np.stack(masks)).bool()
        return [{"instances": found}]


def test_all_of_them_count(crowd: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    cfg = crowded_cfg("SOLQ", crowd, tmp_path / "output")
    results = Trainer.test(cfg, Perfect(crowd))
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    assert "more objects" not in log.text
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.SOLQ.NUM_QUERIES = 100, 300
    assert Trainer.test(cfg, Perfect(crowd))["segm"]["AP"] == pytest.approx(100 * 100 / OBJECTS, abs=1)
    for limit, key in ((100, "TEST.DETECTIONS_PER_IMAGE"), (300, "MODEL.SOLQ.NUM_QUERIES")):
        assert any(
            f"more objects (up to {OBJECTS}) than the {limit} that" in line and f"raise {key}" in line
            for line in log.text.splitlines()
        )


def test_fewer_queries_than_objects(crowd: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    cfg = crowded_cfg("SOLQ", crowd, tmp_path / "output")
    cfg.MODEL.SOLQ.NUM_QUERIES = 30
    model = build_model(cfg).train()
    losses = model(next(iter(Trainer.build_train_loader(cfg))))
    assert all(torch.isfinite(value) for value in losses.values())
    assert f"1 training images have more objects (up to {OBJECTS}) than the model has queries, 30" in log.text
    assert "Raise MODEL.SOLQ.NUM_QUERIES (and TEST.DETECTIONS_PER_IMAGE" in log.text
