"""A SOLQ that makes a training step in a fraction of a second, and images for it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from querymask import get_cfg


@pytest.fixture
def make_cfg() -> Callable[..., CfgNode]:
    """Function (keys of MODEL.SOLQ) that gives the config of a tiny model with all parts."""

    def make(**overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "SOLQ"
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.TEST.DETECTIONS_PER_IMAGE = 9
        settings = {
            "NUM_CLASSES": 5,
            "NUM_QUERIES": 6,
            "HIDDEN_DIM": 64,
            "NUM_HEADS": 4,
            "ENC_LAYERS": 2,
            "DEC_LAYERS": 2,
            "DIM_FEEDFORWARD": 48,
            "DROPOUT": 0.0,
            "VECTOR_HIDDEN_DIM": 48,
            "MASK_SIZE": 32,
            "VECTOR_LENGTH": 40,
            **overrides,
        }
        for key, value in settings.items():
            assert key in cfg.MODEL.SOLQ, f"MODEL.SOLQ has no key {key}"
            cfg.MODEL.SOLQ[key] = value
        return cfg

    return make


@pytest.fixture
def make_model(make_cfg: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """Function (keys of MODEL.SOLQ) that gives a model in training mode, with weights that leave no term negligible."""

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(make_cfg(**overrides)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., list[dict[str, Any]]]:
    """Function (numbers of instances, sizes of the images) that gives model inputs with ellipses in random boxes."""

    def make(counts: Sequence[int], sizes: Sequence[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        items = []
        for index, (count, size) in enumerate(zip(counts, sizes or [(64, 96)] * len(counts), strict=True)):
            extent = torch.tensor([size[1], size[0]])
            low = torch.rand(count, 2, generator=generator) * extent * 0.6
            high = low + (torch.rand(count, 2, generator=generator) * 0.3 + 0.1) * extent
            y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
            position = torch.stack((x, y), dim=-1)
            center, half = ((low + high) / 2)[:, None, None], ((high - low) / 2)[:, None, None]
            instances = Instances(size)
            instances.gt_boxes = Boxes(torch.cat((low, high), dim=1))
            instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
            instances.gt_masks = BitMasks((((position - center) / half) ** 2).sum(-1) < 1)
            image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
            items.append({"image": image, "instances": instances, "file_name": f"{index}.jpg"})
        return items

    return make
