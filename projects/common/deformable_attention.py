"""Multi-scale deformable attention (Zhu et al., ICLR 2021) and the geometry of its feature pyramid.

Letters: B images, Q queries, C width, L levels, M heads, P points, S = sum of H_l * W_l tokens. Tokens are the cells of
all levels, concatenated fine to coarse, row-major in each. Positions are (x, y) relative to the unpadded image;
multiplied by a level's valid ratios they are relative to the padded map.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from querymask.common.ops import multi_scale_deformable_attention
from querymask.common.ops.autocast import autocast_type, cast
from querymask.common.transfer import constants_to_device, kept

SpatialShapes = tuple[tuple[int, int], ...]


@kept
def _level_sizes(shapes: SpatialShapes, points: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(L, 2 * points): width and height of every level, again for every point."""
    return constants_to_device([(w, h) * points for h, w in shapes], dtype, device)


@kept
def token_centres(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(S, 2): x + 0.5, y + 0.5 of the cells of all levels."""
    return torch.cat([cell_centres(shape, dtype, device) for shape in shapes])


def of_tokens(values: torch.Tensor, shapes: SpatialShapes) -> torch.Tensor:
    """A row for every token from one for every level: (..., L, n) -> (..., S, n)."""
    rows = [x.expand(*x.shape[:-2], h * w, x.shape[-1]) for x, (h, w) in zip(values.split(1, -2), shapes, strict=True)]
    return torch.cat(rows, dim=-2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention of queries to a feature pyramid (equation 3 of the paper).

    Args:
        embed_dim: width C of queries and values, a multiple of ``num_heads``.
        num_heads, num_levels, num_points: M, L, P.
    """

    def __init__(self, embed_dim: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"the width {embed_dim} must be a multiple of the number of heads, {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks in direction 2 pi m / M, point p at p times its distance; weights are uniform."""
        angles = torch.arange(self.num_heads, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (directions[:, None, None, :] * distances).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: torch.Tensor,
        reference: torch.Tensor,
        value: torch.Tensor,
        shapes: SpatialShapes,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (B, Q, C), position added.
            reference: (B, Q, L, 2) points, or (B, Q, L, 4) boxes cx, cy, w, h, relative to the padded maps. Offsets
                from a point are in cells of the level; offsets from a box in half sides, divided by P.
            value: (B, S, C).
            shapes: (H, W) of every level.
            padding_mask: (B, S) bool, true where the value counts as zero.

        Returns:
            (B, Q, C).
        """
        batch, num_queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        if (dtype := autocast_type(query.device.type)) is not None:
            query = cast(query, dtype)  # once for both layers that read it
        # Broadcasting over the last axis of 2 is slow: points and their coordinates are one axis here.
        offsets = self.sampling_offsets(query).view(batch, num_queries, heads, levels * points * 2)
        weights = self.attention_weights(query).view(batch, num_queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, num_queries, heads, levels, points)
        offsets = offsets.to(reference.dtype)  # under autocast: positions stay in float32

        def per_point(x: torch.Tensor) -> torch.Tensor:  # (..., L, 2) -> (..., L * P * 2)
            return x[..., None, :].expand(*x.shape[:-1], points, 2).flatten(-3)

        if reference.shape[-1] == 2:
            offsets = offsets / _level_sizes(shapes, points, like=offsets).flatten()
        else:
            offsets = offsets * per_point(reference[..., 2:] * (0.5 / points))[:, :, None]
        locations = per_point(reference[..., :2])[:, :, None] + offsets
        output = multi_scale_deformable_attention(
            value.view(batch, -1, heads, value.shape[-1] // heads),
            shapes,
            locations.view(batch, num_queries, heads, levels, points, 2),
            weights,
        )
        return self.output_proj(output)


def valid_ratios(masks: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Share of every padded map that is image.

    Args:
        masks: L padding masks (B, H_l, W_l), true on padding.

    Returns:
        (B, L, 2): of the width (counted in the first row) and of the height (in the first column).
    """
    edges = [edge for mask in masks for edge in (mask[:, 0], mask[:, :, 0])]
    valid = (~torch.cat(edges, dim=1)).to(dtype).split([edge.shape[1] for edge in edges], dim=1)
    return torch.stack([edge.mean(1) for edge in valid], dim=1).unflatten(1, (-1, 2))


def cell_centres(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(H * W, 2): x + 0.5, y + 0.5 of the cells, row-major."""
    y, x = torch.meshgrid(
        torch.arange(shape[0], dtype=dtype, device=device) + 0.5,
        torch.arange(shape[1], dtype=dtype, device=device) + 0.5,
        indexing="ij",
    )
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def encoder_reference_points(shapes: SpatialShapes, ratios: torch.Tensor) -> torch.Tensor:
    """Centres of all cells relative to the unpadded image.

    Args:
        shapes: (H, W) of every level.
        ratios: (B, L, 2) valid ratios.

    Returns:
        (B, S, 2); beyond 1 on padding.
    """
    sizes = _level_sizes(shapes, 1, like=ratios)
    return token_centres(shapes, like=ratios) / of_tokens(ratios * sizes, shapes)


def flatten_levels(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """L maps (B, C, H_l, W_l) -> tokens (B, S, C)."""
    return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
