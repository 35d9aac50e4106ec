"""ResNet-18 and -34 of any width, for small experiments; Detectron2's builder knows 64 channels only."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet of basic blocks whose stages have RES2_OUT_CHANNELS * (1, 2, 4, 8) channels.

    Reads ``MODEL.RESNETS.{DEPTH, NORM, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, OUT_FEATURES}`` and
    ``MODEL.BACKBONE.FREEZE_AT``.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in BLOCKS_PER_STAGE:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}: basic blocks make {sorted(BLOCKS_PER_STAGE)}; for others set "
            "MODEL.BACKBONE.NAME to build_resnet_backbone"
        )
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    in_channels, stages = resnets.STEM_OUT_CHANNELS, []
    for index, num_blocks in enumerate(BLOCKS_PER_STAGE[resnets.DEPTH]):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**index
        strides = [1 if index == 0 else 2] + [1] * (num_blocks - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=num_blocks,
                stride_per_block=strides,
                in_channels=in_channels,
                out_channels=out_channels,
                norm=resnets.NORM,
            )
        )
        in_channels = out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES).freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
