"""Swin transformer (Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021).

The form that detectors use: any image size, zero padding inside the stages, and a layer norm for every output.
Detectron2 0.5 has no Swin, so it is written here from the paper; parameter names are those of the published weights.
The merging of patches is torchvision's. Its window attention is not used: it does not shift where a window covers the
map, keeps an index among the weights, and needs memory for all logits; timm would be a dependency more.

Shapes: B batch, H and W the grid of one stage, C channels, R windows of one image, N tokens of a window (side squared),
M heads, D channels of a head. Maps are channels-last, (B, H, W, C), inside the backbone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torchvision.models.swin_transformer import PatchMerging
from torchvision.ops import StochasticDepth

from querymask.common.layers import Recomputable

# Added to the attention logits of pairs that are neighbours only because the map was rolled (the published value).
MASKED_LOGIT = -100.0


def window_partition(x: torch.Tensor, side: int) -> torch.Tensor:
    """(B, H, W, C) with H and W multiples of ``side`` -> (B, R, N, C), windows and tokens in row-major order."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(batch, -1, side * side, channels)


def window_reverse(windows: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`window_partition`: (B, R, N, C) -> (B, height, width, C)."""
    batch, _, _, channels = windows.shape
    x = windows.view(batch, height // side, width // side, side, side, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def shifted_window_mask(
    height: int, width: int, side: int, shift: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Logits to add in the windows of a map that was rolled by ``shift`` up and to the left.

    After the roll, the last window of each row and column holds cells from opposite borders of the map. Such cells do
    not see each other.

    Args:
        height, width: size of the rolled map, multiples of ``side``.
        side: side of a window.
        shift: cells rolled, between 0 and ``side``.

    Returns:
        (R, N, N), 0 or ``MASKED_LOGIT``.
    """

    def regions(size: int) -> torch.Tensor:
        position = torch.arange(size, device=device)
        return (position >= size - shift).to(torch.int8)

    # Within one window, two regions a dimension are enough: cells before and cells after the seam
    region = regions(height)[:, None] * 2 + regions(width)[None, :]
    region = window_partition(region[None, :, :, None], side)[0, :, :, 0]
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill_(apart, MASKED_LOGIT)


def relative_position_index(side: int) -> torch.Tensor:
    """(N, N) row of the bias table for each query and key of a window: (dy + side - 1) * (2 side - 1) + dx + side - 1.

    dy and dx are the query's position minus the key's.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    dy = rows[:, None] - rows[None, :] + side - 1
    dx = columns[:, None] - columns[None, :] + side - 1
    return dy * (2 * side - 1) + dx


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each relative position (paper, eq. 4)."""

    def __init__(self, dim: int, side: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(side), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, R, N, C) -> (B, R, N, C); ``mask`` (R, N, N) is added to the logits of every head."""
        batch, windows, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, windows, tokens, 3, self.num_heads, dim // self.num_heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, B, R, M, N, D)
        index = self.relative_position_index.flatten()
        bias = self.relative_position_bias_table[index].view(tokens, tokens, self.num_heads).permute(2, 0, 1)
        # The fused kernels take four dimensions and broadcast the added logits over the first: all windows of all
        # images where they share the bias, else the images
        if mask is None:
            query, key, value = qkv.flatten(1, 2)  # (B*R, M, N, D)
            logits = bias[None]
        else:
            query, key, value = qkv.flatten(2, 3)  # (B, R*M, N, D)
            logits = (bias + mask[:, None]).flatten(0, 1)[None]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=logits)
        x = x.view(batch, windows, self.num_heads, tokens, -1).transpose(2, 3).reshape(batch, windows, tokens, dim)
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(Recomputable):
    """Window attention and an MLP, pre-norm, each with a residual branch (paper, eq. 3)."""

    def __init__(self, dim: int, num_heads: int, side: int, shift: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.side = side
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, side, num_heads)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``mask`` is that of the shifted windows and unused without a shift."""
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        height, width = x.shape[1:3]
        # Zeros after the norm: padded cells are keys with logits of their own, as in the published models
        x = F.pad(x, (0, 0, 0, -width % self.side, 0, -height % self.side))
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(window_partition(x, self.side), mask if self.shift else None)
        x = window_reverse(windows, self.side, padded_height, padded_width)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class SwinStage(nn.Module):
    """Blocks with plain and shifted windows in turn, then the merging of patches if a further stage follows."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.side = side
        self.shift = side // 2
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, side, self.shift * (index % 2), mlp_ratio, rate)
            for index, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C), before the merging."""
        height, width = x.shape[1:3]
        mask = None
        if len(self.blocks) > 1 and self.shift:
            # Once for all blocks; 0.2 % of a forward pass, so not kept between images of different sizes
            padded_height, padded_width = height + -height % self.side, width + -width % self.side
            mask = shifted_window_mask(padded_height, padded_width, self.side, self.shift, x.dtype, x.device)
        for block in self.blocks:
            x = block.run(x, mask)
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded and normalised."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, height, width) -> (B, ceil(height/patch), ceil(width/patch), C)."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class SwinTransformer(Backbone):
    """Swin transformer with normalised outputs.

    Stages beyond the deepest output are not built. The parameters' names are those of the published weights.

    Args:
        embed_dim: channels of the first stage; each later stage has twice those before it.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: side of the attention windows, in cells of a stage.
        mlp_ratio: hidden width of the MLPs relative to the channels.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first one.
        out_features: outputs, some of ``"stage0"`` (stride 4) to ``"stage3"`` (stride 32).
        freeze_at: as Detectron2 counts for ResNets: 0 trains everything, 1 freezes the patch embedding, 2 stage 0 as
            well, and so on. Frozen parts drop no paths. The norms of the outputs are trained: ImageNet has no weights
            for them.
        patch_size: side of the first patches in pixels; the stride of ``"stage0"``.
        in_channels: channels of the images.

    Raises:
        ValueError: for lists that do not fit together or an unknown output.
    """

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        out_features: Sequence[str] = ("stage1", "stage2", "stage3"),
        freeze_at: int = 0,
        patch_size: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        names = [f"stage{index}" for index in range(len(depths))]
        if len(num_heads) != len(depths):
            raise ValueError(f"MODEL.SWIN: {len(depths)} DEPTHS but {len(num_heads)} NUM_HEADS; give one per stage")
        if not out_features or not set(out_features) <= set(names):
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES is {list(out_features)}; choose from {names}")
        dims = [embed_dim * 2**index for index in range(len(depths))]
        for name, dim, heads in zip(names, dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(
                    f"MODEL.SWIN: {name} has {dim} channels, not a multiple of its {heads} heads; "
                    "change EMBED_DIM or NUM_HEADS"
                )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"MODEL.SWIN.DROP_PATH_RATE is {drop_path_rate}; it must be in [0, 1)")

        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        last = max(names.index(name) for name in out_features)
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.layers = nn.ModuleList(
            SwinStage(dims[i], num_heads[i], window_size, mlp_ratio, rates[i].tolist(), downsample=i < last)
            for i in range(last + 1)
        )
        self._out_features = [name for name in names if name in out_features]
        self._out_feature_channels = dict(zip(names, dims, strict=True))
        self._out_feature_strides = {name: patch_size * 2**index for index, name in enumerate(names)}
        for name in self._out_features:
            index = names.index(name)
            self.add_module(f"norm{index}", nn.LayerNorm(dims[index]))
        self.apply(self._init_weights)
        if not 0 <= freeze_at <= len(depths) + 1:
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; for a Swin of {len(depths)} stages it is 0 (nothing), "
                f"1 (patch embedding) to {len(depths) + 1} (all stages)"
            )
        self._frozen = [self.patch_embed, *self.layers][:freeze_at]
        for module in self._frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SwinTransformer":
        """As usual, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, object]:
        """Arguments of the constructor from ``MODEL.SWIN`` and ``MODEL.BACKBONE.FREEZE_AT``."""
        return {
            "embed_dim": cfg.MODEL.SWIN.EMBED_DIM,
            "depths": cfg.MODEL.SWIN.DEPTHS,
            "num_heads": cfg.MODEL.SWIN.NUM_HEADS,
            "window_size": cfg.MODEL.SWIN.WINDOW_SIZE,
            "mlp_ratio": cfg.MODEL.SWIN.MLP_RATIO,
            "drop_path_rate": cfg.MODEL.SWIN.DROP_PATH_RATE,
            "out_features": cfg.MODEL.SWIN.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": input_shape.channels,
        }

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, in_channels, height, width) -> normalised maps by output name.

        The map of stride s is (B, channels, ceil(height/s), ceil(width/s)), channels-last in memory.
        """
        outputs = {}
        x = self.patch_embed(images)
        for index, stage in enumerate(self.layers):
            x = stage(x)
            name = f"stage{index}"
            if name in self._out_features:
                outputs[name] = self.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """The backbone that ``MODEL.SWIN`` describes."""
    return SwinTransformer(cfg, input_shape)
