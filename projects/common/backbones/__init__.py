"""Backbones that Detectron2 lacks."""

from querymask.common.backbones.swin import SwinTransformer, build_swin_backbone

__all__ = ["SwinTransformer", "build_swin_backbone"]
