"""Multi-scale deformable attention (Zhu et al., ICLR 2021) and the geometry of its feature pyramid.

Letters: B images, Q queries, C width, L levels, M heads, P points, S = sum of H_l * W_l tokens. Tokens are the cells of
all levels, concatenated fine to coarse, row-major in each. Positions are (x, y) relative to the unpadded image;
multiplied by a level's valid ratios they are relative to the padded map.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from querymask.common.ops import multi_scale_deformable_attention
from querymask.common.transfer import capturing, constants_to_device

SpatialShapes = tuple[tuple[int, int], ...]


def _level_sizes(shapes: SpatialShapes, like: torch.Tensor) -> torch.Tensor:
    """(L, 2): width and height of every level, in the type and on the device of ``like``."""
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:  # a tracer's tensors must not be kept
        return torch.tensor([(w, h) for h, w in shapes], dtype=like.dtype, device=like.device)
    if capturing():  # nor may a graph read what is dropped one day
        return _make_level_sizes(shapes, like.dtype, like.device)
    return _kept_level_sizes(shapes, like.dtype, like.device)


def _make_level_sizes(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return constants_to_device([(w, h) for h, w in shapes], dtype, device)


@lru_cache(maxsize=64)
def _kept_level_sizes(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept because every layer would copy it from the host."""
    with torch.inference_mode(False):  # else it could not be used in training later on
        return _make_level_sizes(shapes, dtype, device)


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
        # Broadcasting over the last axis of 2 is slow: points and their coordinates are one axis here.
        offsets = self.sampling_offsets(query).view(batch, num_queries, heads, levels * points * 2)
        weights = self.attention_weights(query).view(batch, num_queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, num_queries, heads, levels, points)
        offsets = offsets.to(reference.dtype)  # under autocast: positions stay in float32

        def per_point(x: torch.Tensor) -> torch.Tensor:  # (..., L, 2) -> (..., L * P * 2)
            return x[..., None, :].expand(*x.shape[:-1], points, 2).flatten(-3)

        if reference.shape[-1] == 2:
            offsets = offsets / per_point(_level_sizes(shapes, offsets))
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
    ratios = [torch.stack(((~m[:, 0]).to(dtype).mean(1), (~m[:, :, 0]).to(dtype).mean(1)), dim=-1) for m in masks]
    return torch.stack(ratios, dim=1)


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
    sizes = _level_sizes(shapes, ratios)
    centres = [cell_centres(shape, ratios.dtype, ratios.device) for shape in shapes]
    return torch.cat([centre / (ratios[:, None, level] * sizes[level]) for level, centre in enumerate(centres)], dim=1)


def flatten_levels(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """L maps (B, C, H_l, W_l) -> tokens (B, S, C)."""
    return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
