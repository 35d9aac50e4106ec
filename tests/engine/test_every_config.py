"""Every config of every method, at a tiny size: it builds, detects, and is evaluated.

Those that are one method's make a training step in its own tests (``test_*configs.py``), the pairs here.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from mask_bases import give_basis
from tiny_configs import LEAVES, NUM_CLASSES, NUM_THINGS, tiny_config
from torch import nn

from querymask.common.evaluation import InstanceEvaluator
from querymask.common.measured_models import prepare_for_measurement
from querymask.common.meta_arch import mask_branch_name, uses_masks
from querymask.common.solver import build_lr_scheduler, build_optimizer

DATASET = "every_config_val"
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """The images of a registered data set of one image with an object of every class."""
    image = {"id": 7, "file_name": "7.png", "height": HEIGHT, "width": WIDTH}
    boxes = [[16 * index, 8 * index, 20, 24] for index in range(NUM_CLASSES)]
    annotations = [
        {
            "id": index + 1,
            "image_id": 7,
            "category_id": index + 1,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for index, (x, y, w, h) in enumerate(boxes)
    ]
    categories = [{"id": index + 1, "name": f"class {index}"} for index in range(NUM_CLASSES)]
    path = tmp_path_factory.mktemp("every_config") / "val.json"
    path.write_text(json.dumps({"images": [image], "annotations": annotations, "categories": categories}))
    register_coco_instances(DATASET, {}, str(path), str(path.parent))
    yield DatasetCatalog.get(DATASET)
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def built(name: str) -> tuple[CfgNode, nn.Module]:
    """Config and model of a leaf, with weights that leave boxes in the image and masks that are not empty."""
    torch.manual_seed(0)
    cfg = tiny_config(name)
    model = build_model(cfg)
    give_basis(getattr(getattr(model, "mask_branch", None), "coding", None))
    prepare_for_measurement(model)
    for key, parameter in model.named_parameters():  # EffSeg leaves out detections whose mask is empty
        if re.search(r"mask_branch\.head\.(segmentation\.\d\.2|.*classifiers?(\.\d)?)\.(weight|bias)$", key):
            nn.init.constant_(parameter, 4 if key.endswith("bias") else 1e-3)
    return cfg, model


@pytest.mark.parametrize("name", [name for name in LEAVES if "/pairs/" in name or "baselines" in name])
def test_training_step(name: str, make_batch: Callable[..., list[dict[str, Any]]]) -> None:
    cfg, model = built(name)
    cfg.SOLVER.WARMUP_ITERS = 0  # whose first steps may be of length zero
    optimizer = build_optimizer(cfg, model.train())
    scheduler = build_lr_scheduler(cfg, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with EventStorage():  # in which Detectron2's models log
        losses = model(make_batch([2, 0], [(HEIGHT, WIDTH), (80, 50)]))
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    for (key, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert torch.isfinite(parameter).all(), key
        assert parameter.requires_grad or torch.equal(parameter, old), f"{key} is frozen but moved"
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def check_panoptic_map(model: nn.Module, inputs: list[dict[str, Any]]) -> None:
    """Segments of all labels, which tile a part of the image; scores of random weights are below the thresholds."""
    model.panoptic = dataclasses.replace(model.panoptic, score=0.0, agreement=0.0, area=0)
    with torch.no_grad():
        ((ids, segments),) = (output["panoptic_seg"] for output in model(inputs))
    assert ids.shape == (HEIGHT, WIDTH) and ids.dtype == torch.int32 and segments
    assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    for segment in segments:
        assert segment["isthing"] is (segment["category_id"] < NUM_THINGS) and 0 < segment["score"] <= 1
    stuff = [segment["category_id"] for segment in segments if not segment["isthing"]]
    assert stuff == sorted(set(stuff)) and max(stuff, default=0) < NUM_CLASSES


@pytest.mark.parametrize("name", LEAVES)
def test_detect_evaluate(
    name: str, ground_truth: list[dict[str, Any]], make_batch: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    cfg, model = built(name)
    if cfg.MODEL.PANOPTIC.ENABLED:
        check_panoptic_map(model.eval(), make_batch([0], [(HEIGHT, WIDTH)]))
        return
    evaluator = InstanceEvaluator(DATASET, str(tmp_path))
    evaluator.reset()
    model.eval()
    with torch.no_grad():
        for entry in ground_truth:
            inputs = [{**entry, "image": make_batch([0], [(HEIGHT, WIDTH)])[0]["image"]}]
            outputs = model(inputs)
            evaluator.process(inputs, outputs)
    instances = outputs[0]["instances"]
    assert 0 < len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE and instances.image_size == (HEIGHT, WIDTH)
    assert torch.isfinite(instances.scores).all()
    if mask_branch_name(cfg) != "KernelBranch":  # which multiplies the scores by its masks' certainty
        assert instances.scores.min() > 0 and (instances.scores.diff() <= 0).all()
    assert instances.pred_classes.max() < NUM_CLASSES
    assert instances.has("pred_masks") == uses_masks(cfg)
    if uses_masks(cfg):
        assert instances.pred_masks.shape == (len(instances), HEIGHT, WIDTH)
        assert instances.pred_masks.dtype == torch.bool
    if instances.has("pred_boxes"):
        assert torch.isfinite(instances.pred_boxes.tensor).all()
    scores = evaluator.evaluate()
    tasks = [task for task, field in (("bbox", "pred_boxes"), ("segm", "pred_masks")) if instances.has(field)]
    assert list(scores) == tasks and tasks
    assert all(0 <= scores[task]["AP"] <= 100 for task in tasks)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(results) == len(instances) and {result["image_id"] for result in results} == {7}
    assert {result["category_id"] for result in results} <= set(range(1, NUM_CLASSES + 1))
