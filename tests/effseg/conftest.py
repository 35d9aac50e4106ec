"""A tiny EffSeg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_models import tiny_cfg
from torch import nn


@pytest.fixture
def make_cfg() -> Callable[..., CfgNode]:
    """Function (keys as in `tiny_cfg`) that gives the config of a tiny detector without a segmentation head."""

    def make(**overrides: Any) -> CfgNode:
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
            "EFFSEG_REFINEMENTS": 300,
            "BRANCH": "none",
            **overrides,
        }
        return tiny_cfg("EffSeg", ["res2", "res3", "res4", "res5"], settings)

    return make


@pytest.fixture
def make_model(make_cfg: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """Function (keys as in `tiny_cfg`) that gives a model in training mode."""

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        return build_model(make_cfg(**overrides)).train()

    return make
