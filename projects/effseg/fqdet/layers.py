"""The layers of FQDet: the selector of anchors, and the decoder's, which are pre-norm."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from querymask.common.deformable_attention import DeformableAttention
from querymask.common.layers import Recomputable, SelfAttention
from querymask.common.losses import PRIOR_LOGIT
from querymask.effseg.fqdet.anchors import ANCHORS_PER_CELL

NORM_GROUPS = 8
BOTTLENECK = 4  # width of the selector over that of its bottleneck


class NormActLinear(nn.Sequential):
    """LayerNorm, ReLU, Linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))


class NormActConv(nn.Sequential):
    """GroupNorm, ReLU, convolution with padding."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 1) -> None:
        super().__init__(
            nn.GroupNorm(NORM_GROUPS, in_dim),
            nn.ReLU(),
            nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2),
        )


class Residual(nn.Module):
    """x + layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Selector(nn.Module):
    """Scores the anchors of every cell, with the same weights on all maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // BOTTLENECK
        bottleneck = nn.Sequential(NormActConv(width, inner), NormActConv(inner, inner, 3), NormActConv(inner, width))
        self.layers = nn.Sequential(NormActConv(width, width), Residual(bottleneck), nn.ReLU())
        self.projection = nn.Conv2d(width, ANCHORS_PER_CELL, 1)
        nn.init.constant_(self.projection.bias, PRIOR_LOGIT)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H_l, W_l) -> logits (B, A), in the order of the anchors."""
        logits = [self.projection(self.layers(feature)) for feature in maps]
        return torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)


class CrossAttention(nn.Module):
    """Adds what deformable attention around the anchors finds; pre-norm."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor | None,
        anchors: Tensor,
        tokens: Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, C).
            positions: (B, Q, C), added to the normalised queries, or None.
            anchors: (B, Q, 4) cx, cy, w, h relative to the padded image.
            tokens: (B, S, C) cells of all maps.
            shapes: (height, width) of the maps.
        """
        found = self.norm(queries)
        found = found if positions is None else found + positions
        reference = anchors[:, :, None].expand(-1, -1, len(shapes), -1)
        return queries + self.attention(found, reference, tokens, shapes)


class QueryAttention(nn.Module):
    """Adds what the queries of an image tell each other; pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)

    def forward(self, queries: Tensor, positions: Tensor | None) -> Tensor:
        value = self.norm(queries)
        key = value if positions is None else value + positions
        return queries + self.attention(key, value)


class FQDetLayer(Recomputable):
    """Cross-attention, self-attention, feed-forward network, in this order."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(width, num_heads, num_levels, num_points)
        self.self_attention = QueryAttention(width, num_heads)
        self.ffn = Residual(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, width))
        )

    def forward(
        self,
        queries: Tensor,
        positions: Tensor | None,
        anchors: Tensor,
        tokens: Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """As :class:`CrossAttention`."""
        queries = self.cross_attention(queries, positions, anchors, tokens, shapes)
        return self.ffn(self.self_attention(queries, positions))
