"""A data set of a few pictures, and a SOLQ that makes a training step in some milliseconds."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from querymask import get_cfg
from querymask.common.engine.step import TrainingStep
from querymask.common.engine.trainer import distribute

CATEGORIES = [{"id": 3, "name": "wide"}, {"id": 70, "name": "tall"}]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU, too, the same training gives the same bits; a pretended one computes on the processor."""
    if os.environ.get("QUERYMASK_TEST_DEVICE", "cpu") == "cpu" or "pretend_cuda" in sys.modules:
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class ToyBackbone(Backbone):
    """Strides 8, 16 and 32 from three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.res4 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.res5 = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        res3 = self.stem(image).relu()
        res4 = self.res4(res3).relu()
        return {"res3": res3, "res4": res4, "res5": self.res5(res4)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=8, stride=s) for name, s in (("res3", 8), ("res4", 16), ("res5", 32))}


class FineToyBackbone(ToyBackbone):
    """Stride 4 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"res2": self.fine(image).relu(), **super().forward(image)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=8, stride=4), **super().output_shape()}


@BACKBONE_REGISTRY.register()
def build_engine_test_fine_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return FineToyBackbone()


@BACKBONE_REGISTRY.register()
def build_engine_test_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return ToyBackbone()


def write_coco(folder: Path, num_images: int, seed: int) -> Path:
    """Pictures with bright rectangles and their COCO JSON; the second picture is empty, the third has a crowd."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    folder.mkdir(parents=True)
    for i in range(num_images):
        height, width = (48, 64) if i % 2 else (64, 48)
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        for k in range(0 if i == 1 else 1 + i % 3):
            w, h = (24, 12) if k % 2 else (12, 24)
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[y : y + h, x : x + w] = 200 + 10 * k
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": CATEGORIES[(k + 1) % 2]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(i == 2 and k == 0),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width})
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def case_gradients(config: str, batches: dict[str, list[dict]], parts: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients by case and parameter of the sum of the losses, in double precision.

    In several processes, each works on its part of a batch. The weights are the same in all of them.

    Args:
        parts: in which a process computes its images.
    """
    torch.manual_seed(0)
    model = build_model(CfgNode.load_cfg(config)).double().train()
    for parameter in model.parameters():  # heads start at zero, which would hide most gradients
        nn.init.normal_(parameter, std=0.1)
    distributed = distribute(model)
    results = {}
    for case, batch in batches.items():
        own = batch[comm.get_rank() :: comm.get_world_size()]
        if parts == 1:
            model.zero_grad()
            sum(distributed(own).values()).backward()
        else:
            step = TrainingStep(distributed, [own], torch.optim.SGD(model.parameters(), lr=0.0), seed=0, parts=parts)
            with EventStorage():
                step.run_step()
        results[case] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return results


@pytest.fixture
def single_process_gradients() -> Callable:
    """``case_gradients`` in this process."""
    return case_gradients


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """Function (name, json file) that registers a COCO file, whose pictures are in the folder of its stem."""
    names = []

    def add(name: str, json_file: Path, images: Path | None = None) -> str:
        register_coco_instances(name, {}, str(json_file), str(images or json_file.with_suffix("")))
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.json and val.json."""
    folder = tmp_path_factory.mktemp("engine")
    write_coco(folder / "train", 10, seed=0)
    write_coco(folder / "val", 4, seed=1)
    return folder


@pytest.fixture
def cfg(coco_folder: Path, tmp_path: Path, register: Callable[..., str]) -> CfgNode:
    """Config of a tiny SOLQ with dropout on the data sets "engine_train" and "engine_val"."""
    from devices import DEVICE  # two_processes.py, which reads this file, does without tests/support

    register("engine_train", coco_folder / "train.json")
    register("engine_val", coco_folder / "val.json")
    cfg = get_cfg()
    cfg.MODEL.DEVICE = DEVICE
    cfg.MODEL.META_ARCHITECTURE = "SOLQ"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = "build_engine_test_backbone"
    solq = cfg.MODEL.SOLQ
    solq.NUM_CLASSES = 2
    solq.NUM_QUERIES = 8
    solq.HIDDEN_DIM = 64  # GroupNorm(32) needs two channels in a group where a level has one cell
    solq.NUM_HEADS = 4
    solq.ENC_LAYERS = solq.DEC_LAYERS = 1
    solq.DIM_FEEDFORWARD = cfg.MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM = 32
    cfg.MODEL.MASK_CODING.SIZE, cfg.MODEL.MASK_CODING.LENGTH = 16, 16
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("engine_train",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (32, 48, 64), 96
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 48, 96
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.MAX_ITER = 20
    cfg.SOLVER.STEPS = (15,)
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 10
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    cfg.VIS_NUM_IMAGES = 0
    cfg.SEED = 7
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg
