"""A tiny ISTR."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from mask_bases import give_basis
from tiny_models import tiny_cfg
from torch import nn

from querymask.common.mask_coding import MaskCoding


@pytest.fixture
def make_cfg() -> Callable[..., CfgNode]:
    """Function (keys as in `tiny_cfg`) that gives the config of a tiny model with DCT vectors."""

    def make(**overrides: Any) -> CfgNode:
        settings = {
            "NUM_CLASSES": 5,
            "NUM_QUERIES": 6,
            "NUM_STAGES": 2,
            "HIDDEN_DIM": 16,
            "NUM_HEADS": 4,
            "DIM_FEEDFORWARD": 24,
            "DIM_DYNAMIC": 4,
            "POOL_SIZE": 3,
            "HEAD_LAYERS": 1,
            "CODE_HEAD_LAYERS": 1,
            "CODING_NAME": "dct",
            "CODING_SIZE": 16,
            "CODING_LENGTH": 20,
            "CODE_POOL_SIZE": 8,
            **overrides,
        }
        features = ["res2", "res3", "res4", "res5"]
        cfg = tiny_cfg("ISTR", features, settings)
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_backbone"
        cfg.MODEL.FPN.IN_FEATURES = features
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        return cfg

    return make


@pytest.fixture
def make_model(make_cfg: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """Function (keys as in `tiny_cfg`) that gives a model in training mode whose queries have boxes of their own."""

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(make_cfg(**overrides)).train()
        give_basis(getattr(model.mask_branch, "coding", None))
        with torch.no_grad():
            boxes = model.detector.init_proposal_boxes.weight
            boxes[:, :2] = torch.rand(len(boxes), 2) * 0.6 + 0.2
            boxes[:, 2:] = torch.rand(len(boxes), 2) * 0.4 + 0.2
        return model

    return make


@pytest.fixture(name="give_basis")
def give_basis_fixture() -> Callable[[MaskCoding | None], None]:
    """Function that gives a learned coding a random basis."""
    return give_basis
