"""From the backbone's maps to the pyramid that FQDet and the segmentation heads read."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from querymask.common.deformable_attention import flatten_levels, of_tokens
from querymask.common.deformable_transformer import Encoder, EncoderLayer
from querymask.common.layers import LevelProjections
from querymask.common.position_encoding import sine_position_encoding
from querymask.common.precision import full_precision

FINE_GROUPS = 32
FIRST_ENCODED_LEVEL = 3
"""Of the deformable encoder: maps of stride 4 have too many cells for it."""


class ExtendedFPN(nn.Module):
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


class DeformEncoder(nn.Module):
    """Pixel decoder of Mask DINO (Li et al. 2023): a deformable encoder on the levels of stride 8 and more.

    Its tokens are ordered from coarse to fine. Padding counts as image.

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        width: C, channels of the levels; a multiple of 32.
        num_levels: at least the number of the backbone's maps; further ones come from the last map.
        num_fine: of the backbone's maps, the first so many are not encoded but joined to the encoded level after
            them: 1 for a map of stride 4, or 0.
        num_layers, num_heads, num_points, ffn_dim: of the encoder.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int,
        num_levels: int,
        num_fine: int = 1,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
    ) -> None:
        super().__init__()
        encoded = num_levels - num_fine
        self.width = width
        self.input_proj = LevelProjections(list(in_channels[num_fine:]), width, encoded)
        self.level_embed = nn.Parameter(torch.empty(encoded, width))
        self.encoder = Encoder(
            [EncoderLayer(width, ffn_dim, 0.0, num_heads, encoded, num_points) for _ in range(num_layers)]
        )
        self.fine = nn.ModuleList(FineLevel(channels, width) for channels in in_channels[:num_fine])
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(num_levels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix of the encoder but those of deformable attention, and for the last convolutions."""
        for layer in self.encoder.layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)
        for conv in self.outputs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.level_embed)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i) of the backbone, fine to coarse -> levels (B, C, H_l, W_l)."""
        fine, coarse = features[: len(self.fine)], features[len(self.fine) :]
        levels = self.encode(self.input_proj(list(coarse)))
        for join, feature in zip(reversed(self.fine), reversed(fine), strict=True):
            levels.insert(0, join(feature, levels[0]))
        return [output(level) for output, level in zip(self.outputs, levels, strict=True)]

    def encode(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C, H_l, W_l), fine to coarse, from and to."""
        levels = list(reversed(levels))
        shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
        tokens = full_precision(flatten_levels(levels))  # under autocast too: they are sums along the layers
        unpadded = [torch.zeros(1, *shape, dtype=torch.bool, device=tokens.device) for shape in shapes]
        encoding = sine_position_encoding(unpadded, self.width // 2, tokens.dtype, shift=0.0)
        position = encoding + of_tokens(self.level_embed, shapes)
        ratios = tokens.new_ones(len(tokens), len(levels), 2)
        memory = self.encoder(tokens, position, shapes, ratios, padding_mask=None)
        parts = memory.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
        return [part.unflatten(2, shape) for part, shape in zip(reversed(parts), reversed(shapes), strict=True)]


class FineLevel(nn.Module):
    """A level that is not encoded: a map of the backbone joined with the next, coarser level."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.GroupNorm(FINE_GROUPS, width))
        self.join = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(FINE_GROUPS, width), nn.ReLU()
        )
        self.projection = nn.Conv2d(width, width, 1)
        for conv in (self.lateral[0], self.join[0], self.projection):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.projection.bias)

    def forward(self, feature: Tensor, coarser: Tensor) -> Tensor:
        """Map (B, C_i, H, W), level (B, C, H', W') -> (B, C, H, W)."""
        lateral = self.lateral(feature)
        upsampled = F.interpolate(coarser, lateral.shape[2:], mode="bilinear", align_corners=False)
        return self.projection(self.join(lateral + upsampled))


def build_neck(effseg: CfgNode, in_channels: Sequence[int]) -> nn.Module:
    """The neck that ``MODEL.EFFSEG`` describes, on maps of ``in_channels``: maps -> levels.

    Raises:
        ValueError: there is no such neck.
    """
    if effseg.NECK == "fpn":
        return ExtendedFPN(in_channels, effseg.HIDDEN_DIM, len(effseg.LEVELS))
    if effseg.NECK == "deform_encoder":
        return DeformEncoder(
            in_channels,
            effseg.HIDDEN_DIM,
            len(effseg.LEVELS),
            num_fine=sum(level < FIRST_ENCODED_LEVEL for level in effseg.LEVELS),
            num_layers=effseg.ENC_LAYERS,
            num_heads=effseg.NUM_HEADS,
            num_points=effseg.ENC_POINTS,
            ffn_dim=effseg.ENC_DIM_FEEDFORWARD,
        )
    raise ValueError(f"MODEL.EFFSEG.NECK is {effseg.NECK!r}: choose 'fpn' or 'deform_encoder'")
