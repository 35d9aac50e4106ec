"""Multi-scale deformable attention as reads of rows: the form for export, as runtimes differ in ``grid_sample``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from querymask.common.ops.msda.reference import check_inputs, flatten_shapes


def multi_scale_deformable_attention_gathering(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same as :func:`querymask.common.ops.multi_scale_deformable_attention`: four rows for each sample, level by
    level, and a weighted sum of them. Heights and widths may be symbols.
    """
    check_inputs(value, flatten_shapes(spatial_shapes), sampling_locations, attention_weights)
    batch, tokens, heads, channels = value.shape
    near = ((sampling_locations > -1) & (sampling_locations < 2)).all(-1, keepdim=True)  # false for nan
    locations = torch.where(near, sampling_locations, -1)
    rows = value.reshape(-1, channels)
    head = torch.arange(heads, device=value.device)[:, None]
    first = torch.arange(batch, device=value.device)[:, None, None, None] * tokens
    output = value.new_zeros(())
    for level, (height, width) in enumerate(spatial_shapes):
        x, y = locations[:, :, :, level].unbind(-1)  # [B, Q, M, P]
        columns, column_weights = _neighbours(x, width)
        lines, line_weights = _neighbours(y, height)
        cells = (lines[..., :, None] * width + columns[..., None, :]).flatten(3)  # [B, Q, M, P * 4]
        weights = line_weights[..., :, None] * column_weights[..., None, :]
        weights = (weights * attention_weights[:, :, :, level, :, None, None]).flatten(3)
        samples = rows[(first + cells) * heads + head]
        output = output + (weights[..., None, :].to(value.dtype) @ samples)[..., 0, :]
        first = first + height * width
    return output.flatten(2)


def _neighbours(position: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """The cells on both sides of positions [...] in [0, 1], within the map, and their weights: [..., 2] each."""
    place = position * extent - 0.5
    low = place.floor()
    cells = torch.stack((low, low + 1), dim=-1)
    inside = (cells >= 0) & (cells < extent)
    share = place - low
    weights = torch.stack((1 - share, share), dim=-1) * inside
    return cells.long().clamp(min=0).clamp(max=extent - 1), weights
