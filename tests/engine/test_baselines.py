"""Detectron2's own models from this project's configs, trainer and evaluators."""

import argparse
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.model_zoo import get_checkpoint_url
from tiny_configs import LEAVES, tiny_config

from querymask.common.engine import Trainer, default_setup
from querymask.common.engine.unused_keys import BASIC_RESNET, check_unused_keys
from querymask.common.flops import count_parameters, measure
from querymask.common.measured_models import build_on_meta, random_image, random_model
from querymask.model_zoo import find_leaves

BASELINES = {leaf.name: leaf for leaf in find_leaves() if leaf.method == "baselines"}
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
LOSSES = {
    "faster_rcnn_r50_fpn_3x": {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"},
    "mask_rcnn_r50_fpn_3x": {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
    "mask_rcnn_fpn_shapes": {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
    "pointrend_r50_fpn_3x": {
        "loss_rpn_cls",
        "loss_rpn_loc",
        "loss_cls",
        "loss_box_reg",
        "loss_mask",
        "loss_mask_point",
    },
}


def linear(inputs: int, outputs: int, cells: int = 1) -> int:
    return inputs * outputs * cells + outputs


def size(name: str, depth: int) -> int:
    """Parameters of the paper's networks with 80 classes, without those of frozen batch norms."""
    total, inputs = 3 * 64 * 49, 64
    for blocks, width in zip(DEPTHS[depth], (64, 128, 256, 512), strict=True):
        total += inputs * 4 * width  # the projection of the first block
        for _ in range(blocks):
            total += inputs * width + 9 * width**2 + width * 4 * width
            inputs = 4 * width
    total += sum(linear(c, 256) + linear(256, 256, 9) for c in (256, 512, 1024, 2048))  # pyramid
    total += linear(256, 256, 9) + linear(256, 3) + linear(256, 12)  # proposals
    total += linear(256, 1024, 49) + linear(1024, 1024) + linear(1024, 81) + linear(1024, 320)  # boxes
    if name.startswith("mask_rcnn"):
        total += 4 * linear(256, 256, 9) + linear(256, 256, 4) + linear(256, 80)
    if name.startswith("pointrend"):  # a coarse head of 7x7, and a perceptron that reads the coarse masks in each layer
        total += linear(256, 256, 4) + linear(256, 1024, 49) + linear(1024, 1024) + linear(1024, 80 * 49)
        total += 3 * linear(256 + 80, 256) + linear(256 + 80, 80)
    return total


@pytest.mark.parametrize("name", [name for name in BASELINES if name.endswith("_3x")])
def test_size(name: str) -> None:
    depth = 101 if "r101" in name else 50
    assert count_parameters(build_on_meta(BASELINES[name].config()))[""].total == size(name, depth)


@pytest.mark.parametrize("name", LOSSES)
def test_trains_and_evaluates(name: str, cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    """With the trainer of the other methods; no key of the configs is refused or without effect."""
    tiny = tiny_config(f"baselines/{name}")
    with caplog.at_level(logging.WARNING, logger="querymask"):
        check_unused_keys(BASELINES[name].config())
    assert "without effect" not in caplog.text
    for section in ("DATASETS", "DATALOADER", "OUTPUT_DIR"):
        tiny[section] = cfg[section]
    tiny.DATASETS.TEST = ("engine_val",)
    tiny.MODEL.ROI_HEADS.NUM_CLASSES = 2
    if "POINT_HEAD" in tiny.MODEL:
        tiny.MODEL.POINT_HEAD.NUM_CLASSES = 2
    tiny.INPUT.MIN_SIZE_TRAIN, tiny.INPUT.MIN_SIZE_TEST = (64,), 64
    tiny.SOLVER.IMS_PER_BATCH, tiny.SOLVER.MAX_ITER, tiny.SOLVER.STEPS = 2, 2, ()
    default_setup(tiny, argparse.Namespace())
    results = Trainer(tiny).train()
    assert list(results) == (["bbox"] if name.startswith("faster") else ["bbox", "segm"])
    lines = (Path(tiny.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert LOSSES[name] <= set().union(*map(json.loads, lines))


@pytest.mark.parametrize("name", ["mask_rcnn_fpn_shapes", "pointrend_r50_fpn_3x"])
def test_costs_are_those_of_a_full_image(name: str) -> None:
    """Without weights, too, as many objects are found as may be."""
    cfg = tiny_config(f"baselines/{name}")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 0.9, 7
    model = random_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([random_image(64, 96)])
    assert output["instances"].pred_masks.shape == (7, 64, 96)
    assert measure(model, random_image(64, 96)).flops_by_module["roi_heads.mask_head"] > 0


@pytest.mark.parametrize("name", [name for name in BASELINES if name.rpartition("_")[2] == "3x"])
def test_weights_are_in_the_zoo(name: str) -> None:
    """Under the name at the config's head; with the schedule that made them."""
    leaf = BASELINES[name]
    cfg = leaf.config()
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (16, 270_000, (210_000, 250_000))
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.INPUT.FORMAT) == ("SGD", 0.02, "BGR")
    if "Weights" in leaf.facts:
        zoo_name = leaf.facts["Weights"].partition(", ")[2]
        folder = "COCO-InstanceSegmentation" if zoo_name.startswith("mask") else "COCO-Detection"
        url = get_checkpoint_url(f"{folder}/{zoo_name}.yaml")
        if name == "mask_rcnn_r50_fpn_3x":
            readme = (leaf.path.parents[1] / "README.md").read_text()
            assert url.partition("/detectron2/")[2] in readme


def test_budget_of_effseg_shapes() -> None:
    """The same images, backbone, width, optimiser and rate."""
    own, other = BASELINES["mask_rcnn_fpn_shapes"].config(), LEAVES["effseg/effseg_shapes"].config()
    for key in BASIC_RESNET:
        assert own.MODEL.RESNETS[key] == other.MODEL.RESNETS[key], key
    assert (own.MODEL.PIXEL_MEAN, own.MODEL.PIXEL_STD) == (other.MODEL.PIXEL_MEAN, other.MODEL.PIXEL_STD)
    assert own.MODEL.FPN.OUT_CHANNELS == other.MODEL.EFFSEG.HIDDEN_DIM
    for key in ("OPTIMIZER", "IMS_PER_BATCH", "BASE_LR", "BACKBONE_MULTIPLIER", "LR_SCHEDULER_NAME", "WARMUP_ITERS"):
        assert own.SOLVER[key] == other.SOLVER[key], key
    assert (own.INPUT, own.DATASETS, own.DATALOADER) == (other.INPUT, other.DATASETS, other.DATALOADER)
    assert (own.TEST.DETECTIONS_PER_IMAGE, own.SEED) == (other.TEST.DETECTIONS_PER_IMAGE, other.SEED)


def test_keys_of_pointrend_are_refused_elsewhere() -> None:
    cfg = LEAVES["solq/solq_r50"].config()
    cfg.MODEL.POINT_HEAD.FC_DIM = 64
    cfg.INPUT.COLOR_AUG_SSD = True
    with pytest.raises(ValueError, match=r"(?s)POINT_HEAD\.FC_DIM 64: use MODEL\.MASK_BRANCH\.NAME PointRendBranch"):
        check_unused_keys(cfg)
    cfg = BASELINES["pointrend_r50_fpn_3x"].config()
    cfg.INPUT.COLOR_AUG_SSD = True
    with pytest.raises(ValueError, match="COLOR_AUG_SSD True: nothing in this project reads it"):
        check_unused_keys(cfg)
