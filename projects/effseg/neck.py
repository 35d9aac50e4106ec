"""From the backbone's maps to the pyramid that FQDet and the segmentation heads read."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017) with further levels, as EffSeg's release has it.

    Detectron2's pyramid makes further levels of its own last output or of the backbone's last map; here the first of
    them is made of the lateral of that map.

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        width: channels of the levels.
        num_levels: at least the number of the backbone's maps.
    """

    def __init__(self, in_channels: Sequence[int], width: int, num_levels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        strides = [1] * len(in_channels) + [2] * (num_levels - len(in_channels))
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, stride, padding=1) for stride in strides)
        for conv in [*self.laterals, *self.outputs]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i) of the backbone, fine to coarse -> levels (B, C, H_l, W_l)."""
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        top = maps[-1]
        for index in range(len(maps) - 2, -1, -1):
            maps[index] = maps[index] + F.interpolate(maps[index + 1], maps[index].shape[2:], mode="nearest")
        levels = [output(feature) for output, feature in zip(self.outputs, maps, strict=False)]
        for output in self.outputs[len(maps) :]:
            levels.append(output(top))
            top = levels[-1].relu()
        return levels


def build_neck(effseg: CfgNode, in_channels: Sequence[int]) -> nn.Module:
    """The neck that ``MODEL.EFFSEG`` describes, on maps of ``in_channels``: maps -> levels.

    Raises:
        ValueError: there is no such neck.
    """
    if effseg.NECK == "fpn":
        return FPN(in_channels, effseg.HIDDEN_DIM, len(effseg.LEVELS))
    raise ValueError(f"MODEL.EFFSEG.NECK is {effseg.NECK!r}: choose 'fpn' or 'deform_encoder'")
