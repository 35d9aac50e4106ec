"""Backbones that Detectron2 lacks."""

from querymask.common.backbones.basic_resnet import build_basic_resnet_backbone
from querymask.common.backbones.fpn import (
    build_basic_resnet_fpn_backbone,
    build_swin_fpn_backbone,
    build_timm_fpn_backbone,
)
from querymask.common.backbones.swin import SwinTransformer, build_swin_backbone
from querymask.common.backbones.timm_model import TimmBackbone, build_timm_backbone

__all__ = [
    "SwinTransformer",
    "TimmBackbone",
    "build_basic_resnet_backbone",
    "build_basic_resnet_fpn_backbone",
    "build_swin_backbone",
    "build_swin_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
