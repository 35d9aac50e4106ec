"""Feature pyramids (Lin et al. 2017) on the backbones that Detectron2 lacks, without levels beyond the backbone's."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone

from querymask.common.backbones.basic_resnet import build_basic_resnet_backbone
from querymask.common.backbones.swin import build_swin_backbone
from querymask.common.backbones.timm_model import build_timm_backbone


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Swin with ``p2``..``p5`` on the outputs that ``MODEL.FPN.IN_FEATURES`` names (``"stage0"``..``"stage3"``)."""
    return _with_fpn(cfg, build_swin_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet-18 or -34 of any width with ``p2``..``p5`` on ``MODEL.FPN.IN_FEATURES``."""
    return _with_fpn(cfg, build_basic_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A model of timm with ``p2``..``p5`` on ``MODEL.FPN.IN_FEATURES``."""
    return _with_fpn(cfg, build_timm_backbone(cfg, input_shape))


def _with_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    keys = cfg.MODEL.FPN
    missing = [name for name in keys.IN_FEATURES if name not in bottom_up.output_shape()]
    if missing or not keys.IN_FEATURES:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(keys.IN_FEATURES)}, but the backbone gives "
            f"{sorted(bottom_up.output_shape())}: name some of these, or have it give more by its OUT_FEATURES"
        )
    return FPN(bottom_up, keys.IN_FEATURES, keys.OUT_CHANNELS, norm=keys.NORM, fuse_type=keys.FUSE_TYPE)
