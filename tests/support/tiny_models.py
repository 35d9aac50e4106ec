"""Configs of models that make a training step in a fraction of a second."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from devices import DEVICE

from querymask import get_cfg


def tiny_cfg(meta_architecture: str, features: list[str], settings: Mapping[str, Any]) -> CfgNode:
    """A model on a narrow ResNet-18.

    Args:
        meta_architecture: such as "SOLQ"; its keys are those of the node of that name, in capitals.
        features: maps that the backbone gives.
        settings: keys of that node; one that it lacks is an error.
    """
    cfg = get_cfg()
    cfg.MODEL.DEVICE = DEVICE
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    cfg.TEST.DETECTIONS_PER_IMAGE = 9
    section = meta_architecture.upper()
    for key, value in settings.items():
        assert key in cfg.MODEL[section], f"MODEL.{section} has no key {key}"
        cfg.MODEL[section][key] = value
    return cfg
