"""Configs of models that make a training step in a fraction of a second."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from devices import DEVICE
from torch import nn

from querymask import get_cfg


def tiny_cfg(meta_architecture: str, features: list[str], settings: Mapping[str, Any]) -> CfgNode:
    """A model on a narrow ResNet-18.

    Args:
        meta_architecture: such as "SOLQ"; its keys are those of the node of that name, in capitals.
        features: maps that the backbone gives.
        settings: for ``set_keys``.
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
    set_keys(cfg, settings)
    return cfg


def small_solq(class_names: Sequence[str]) -> CfgNode:
    """SOLQ of the built-in data set with five queries, for images of 64 to 96 pixels."""
    cfg = get_cfg()
    cfg.merge_from_file(Path(__file__).parents[2] / "projects/solq/configs/solq_shapes.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.CLASS_NAMES = DEVICE, "", list(class_names)
    solq = cfg.MODEL.SOLQ
    solq.NUM_QUERIES, solq.HIDDEN_DIM, solq.NUM_HEADS, solq.DIM_FEEDFORWARD = 5, 64, 2, 8
    solq.ENC_LAYERS = solq.DEC_LAYERS = 1
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    return cfg


@torch.no_grad()
def spread_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Let all weights matter: at their initial values, some outputs hardly depend on what they are made of."""
    for parameter in parameters:
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape).to(parameter)  # the same on every device
            parameter.add_(noise * 0.3 * parameter[0].numel() ** -0.5)


def set_keys(cfg: CfgNode, settings: Mapping[str, Any]) -> None:
    """Set keys of the model's parts by the names of ``find_key``."""
    for name, value in settings.items():
        node, key = find_key(cfg, name)
        node[key] = value


def find_key(cfg: CfgNode, name: str) -> tuple[CfgNode, str]:
    """The section and the key of a short name; one that does not exist is an error.

    Args:
        name: a key of the method's own section (``NUM_QUERIES``), ``BRANCH`` for the mask branch's name, a key of a
            branch behind its section (``VECTOR_LOSS``), or of the coding behind ``CODING`` (``CODING_SIZE``).
    """
    branches = cfg.MODEL.MASK_BRANCH
    sections = {"CODING": cfg.MODEL.MASK_CODING, **{k: v for k, v in branches.items() if isinstance(v, CfgNode)}}
    prefix, _, rest = name.partition("_")
    if name in ("BRANCH", "FREEZE_DETECTOR"):
        node, key = branches, {"BRANCH": "NAME"}.get(name, name)
    elif prefix in sections:
        node, key = sections[prefix], rest
    else:
        node, key = cfg.MODEL[cfg.MODEL.META_ARCHITECTURE.upper()], name
    assert key in node, f"there is no key {name}"
    return node, key
