"""A tiny EffSeg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from querymask import get_cfg


@pytest.fixture
def make_cfg() -> Callable[..., CfgNode]:
    """Function (keys of MODEL.EFFSEG) that gives the config of a tiny detector without a segmentation head."""

    def make(**overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "EffSeg"
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.TEST.DETECTIONS_PER_IMAGE = 9
        settings = {
            "NUM_CLASSES": 5,
            "NUM_QUERIES": 500,  # so many that some are matched without any training
            "LEVELS": [2, 3, 4, 5, 6],
            "HIDDEN_DIM": 32,
            "DEC_LAYERS": 2,
            "NUM_HEADS": 4,
            "DIM_FEEDFORWARD": 24,
            "ENC_LAYERS": 1,
            "ENC_DIM_FEEDFORWARD": 24,
            "REFINEMENTS": 300,
            "MASK_HEAD": "none",
            **overrides,
        }
        for key, value in settings.items():
            assert key in cfg.MODEL.EFFSEG, f"MODEL.EFFSEG has no key {key}"
            cfg.MODEL.EFFSEG[key] = value
        return cfg

    return make


@pytest.fixture
def make_model(make_cfg: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """Function (keys of MODEL.EFFSEG) that gives a model in training mode."""

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        return build_model(make_cfg(**overrides)).train()

    return make
