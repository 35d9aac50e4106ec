"""An ISDA that makes a training step in a fraction of a second."""

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
    """Function (keys as in `tiny_cfg`) that gives the config of a tiny model with all parts."""

    def make(**overrides: Any) -> CfgNode:
        settings = {
            "NUM_CLASSES": 5,
            "NUM_QUERIES": 6,
            "HIDDEN_DIM": 64,
            "NUM_HEADS": 4,
            "ENC_LAYERS": 2,
            "DEC_LAYERS": 2,
            "DIM_FEEDFORWARD": 48,
            "DROPOUT": 0.0,
            "KERNEL_MASK_FEATURE_DIM": 64,
            **overrides,
        }
        return tiny_cfg("ISDA", ["res2", "res3", "res4", "res5"], settings)

    return make


@pytest.fixture
def make_model(make_cfg: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """Function (keys as in `tiny_cfg`) that gives a model in training mode, whose weights leave no term negligible."""

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(make_cfg(**overrides)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        return model

    return make
