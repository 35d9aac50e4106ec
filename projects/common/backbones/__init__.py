"""Backbones that Detectron2 lacks."""

from querymask.common.backbones.basic_resnet import build_basic_resnet_backbone
from querymask.common.backbones.swin import SwinTransformer, build_swin_backbone

__all__ = ["build_basic_resnet_backbone", "SwinTransformer", "build_swin_backbone"]
