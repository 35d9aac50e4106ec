"""Batches, and tiny models of all methods, for what must not depend on how a batch is spread."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_models import set_keys


def record(num_instances: int, generator: torch.Generator) -> dict:
    """A model input of 48 x 64 pixels."""
    instances = Instances((48, 64))
    corners = torch.rand(num_instances, 2, generator=generator) * 30
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 15], 1))
    instances.gt_classes = torch.arange(num_instances) % 2
    instances.gt_masks = BitMasks(torch.rand(num_instances, 48, 64, generator=generator) > 0.4)
    image = torch.randint(0, 256, (3, 48, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 48, "width": 64}


def solq_configs(cfg: CfgNode) -> dict[str, str]:
    cfg.MODEL.SOLQ.DROPOUT = 0.0
    one_stage = cfg.dump()
    cfg.MODEL.SOLQ.TWO_STAGE = True
    cfg.MODEL.SOLQ.DEC_LAYERS = 2
    cfg.MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION = "sum"
    return {"one-stage": one_stage, "two-stage": cfg.dump()}


def isda_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 8, "HIDDEN_DIM": 64, "NUM_HEADS": 4, "ENC_LAYERS": 1, "DEC_LAYERS": 2}
    section |= {"DIM_FEEDFORWARD": 32, "DROPOUT": 0.0, "KERNEL_MASK_FEATURE_DIM": 32}
    set_method(cfg, "ISDA", section)
    return {"dice": cfg.dump()}


def istr_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 8, "NUM_STAGES": 2, "HIDDEN_DIM": 8, "NUM_HEADS": 2, "DROPOUT": 0.0}
    section |= {"DIM_FEEDFORWARD": 16, "DIM_DYNAMIC": 4, "POOL_SIZE": 3, "HEAD_LAYERS": 1, "CODE_HEAD_LAYERS": 1}
    section |= {"CODING_SIZE": 16, "CODING_LENGTH": 16, "IN_FEATURES": ["res2", "res3", "res4", "res5"]}
    set_method(cfg, "ISTR", section)
    sigmoid = cfg.dump()
    cfg.MODEL.ISTR.CLASSIFIER = "softmax"
    return {"sigmoid": sigmoid, "softmax": cfg.dump()}


EFFSEG_HEADS = {
    "no masks": {"BRANCH": "none", "VERSION": 2},
    "limits": {
        "BRANCH": "EffSegBranch",
        "EFFSEG_REFINEMENTS": 100,
        "REGION_MAX_TRAIN_REGIONS": 7,
    },  # of 196 cells in a region
    "one region": {"BRANCH": "EffSegBranch", "EFFSEG_REFINEMENTS": 10, "REGION_MAX_TRAIN_REGIONS": 1},
    "boundary": {"BRANCH": "EffSegBranch", "EFFSEG_REFINEMENTS": 100, "EFFSEG_CHOOSE_BY": "boundary"},
    "no limits": {"BRANCH": "EffSegBranch", "EFFSEG_PROCESSING": "dense_sfm"},
    "Mask R-CNN": {"BRANCH": "MaskRCNNBranch", "REGION_MAX_TRAIN_REGIONS": 7},
    "PointRend": {"BRANCH": "PointRendBranch", "POINTREND_SUBDIVISIONS": 1},
    "RefineMask": {"BRANCH": "RefineMaskBranch"},
}


def effseg_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 500, "LEVELS": [2, 3, 4, 5], "HIDDEN_DIM": 32, "DEC_LAYERS": 1}
    section |= {"NUM_HEADS": 2, "DIM_FEEDFORWARD": 16}
    set_method(cfg, "EffSeg", section)
    configs = {}
    for form, settings in EFFSEG_HEADS.items():
        changed = cfg.clone()
        set_keys(changed, settings)
        configs[form] = changed.dump()
    return configs


def set_method(cfg: CfgNode, name: str, settings: dict[str, Any]) -> None:
    """Change the tiny SOLQ to another method, on four maps."""
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.BACKBONE.NAME = "build_engine_test_fine_backbone"
    set_keys(cfg, settings)
