"""The mask feature head: one map that all kernels of an image are applied to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from querymask.common.ops.exporting import exportable

GROUPS = 32


def _line_by_steps(steps: int, like: torch.Tensor) -> torch.Tensor:
    count = torch.arange(steps, dtype=like.dtype, device=like.device)
    return 2 * count / count[-1].clamp(min=1) - 1


@exportable(_line_by_steps)  # the number of linspace's steps is no symbol
def line(steps: int, like: torch.Tensor) -> torch.Tensor:
    """(steps,) from -1 to 1."""
    return torch.linspace(-1, 1, steps, dtype=like.dtype, device=like.device)


def coordinate_channels(like: torch.Tensor) -> torch.Tensor:
    """x, then y, each from -1 in the first to 1 in the last cell, padding included: (B, C, H, W) -> (B, 2, H, W)."""
    batch, _, height, width = like.shape
    x, y = line(width, like), line(height, like)
    grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))
    return grid.expand(batch, -1, -1, -1)


def append_coordinates(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C + 2, H, W), in x's memory format: concatenation would lose it."""
    joined = torch.cat((x, coordinate_channels(x)), dim=1)
    return joined.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else joined


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def conv_unit(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, GroupNorm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.01)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out_channels), nn.ReLU())


class MaskFeatureHead(nn.Module):
    """Sum of a pyramid's levels, each brought to one resolution step by step.

    A level that is to be enlarged by 2^i has i units, each followed by bilinear upsampling by 2; one that has the
    resolution already has one unit. The coarsest level is given two coordinate channels, so that what lies behind it
    knows where in the image it is.

    Args:
        in_channels: of every level.
        strides: of the levels, fine to coarse.
        stride: of the result; at most that of the finest level.
        width: channels of the units.
        out_channels: channels of the result.
        positions: coordinate channels at the coarsest level.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        stride: int,
        width: int = 128,
        out_channels: int = 256,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if stride > strides[0]:
            raise ValueError(f"mask features of stride {stride} cannot be made of levels of strides {list(strides)}")
        for name, channels in {"MASK_FEATURE_DIM": width, "HIDDEN_DIM": out_channels}.items():
            if channels % GROUPS:
                raise ValueError(f"{name} is {channels}; it must be a multiple of {GROUPS} (GroupNorm)")
        self.stride = stride
        self.positions = positions
        self.upsamplings = [(level // stride).bit_length() - 1 for level in strides]
        self.branches = nn.ModuleList()
        for level, upsamplings in enumerate(self.upsamplings):
            first = in_channels + (2 if positions and level == len(strides) - 1 else 0)
            units = max(upsamplings, 1)
            self.branches.append(nn.ModuleList(conv_unit(first if i == 0 else width, width, 3) for i in range(units)))
        self.output = conv_unit(width, out_channels, 1)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Levels (B, in_channels, H_l, W_l) -> mask features (B, out_channels, h, w), none negative.

        Every level's size must be the finest one's divided by its stride, so images are padded to a multiple of the
        coarsest stride.
        """
        levels = list(levels)
        if self.positions:
            levels[-1] = append_coordinates(levels[-1])
        total: torch.Tensor | None = None
        for x, branch, upsamplings in zip(levels, self.branches, self.upsamplings, strict=True):
            for unit in branch:
                x = unit(x)
                if upsamplings:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = x if total is None else total + x  # one map is kept, not all
        return self.output(total)
