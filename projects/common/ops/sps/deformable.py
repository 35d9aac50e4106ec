"""Deformable convolution on structure-preserving sparsity (Picron and Tuytelaars, EffSeg,
https://arxiv.org/abs/2307.01545, Table 5; Dai et al., Deformable Convolutional Networks,
https://arxiv.org/abs/1703.06211, equation 2).

A composition of PyTorch's operators. ``embedding_bag`` with a weight for each row is the bilinear read: it sums the
four neighbours of a position without storing them, which is what a kernel of our own would do.

Shape letters: as in operator.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from querymask.common.ops.autocast import autocast_type, cast
from querymask.common.ops.sps.reference import as_pair, check_cells, check_inputs, look_up, multiply, tap_cells


def deformable_sparse_conv2d(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves a sparse map at its active cells, each tap displaced by an offset of its own.

    As :func:`querymask.common.ops.sparse_conv2d`, but tap k of cell n reads the map at ``(x' + offsets[n, k, 0],
    y' + offsets[n, k, 1])``: the bilinear mean of the four cells around it, of which those outside of the region count
    as zero. So it is a dense deformable convolution of ``features[index_map]``, read at the active cells. An offset
    that is infinite or NaN counts as outside.

    float16 and bfloat16 are computed in float32, the result has features' type. Under autocast features, weight and
    bias take autocast's type. The gathered matrix, [N_A, kH*kW*C_in], is kept for the backward pass. Deterministic.
    Differentiable once with respect to features, offsets, weight and bias.

    Args:
        features, index_map, cells, weight, bias, dilation: as in :func:`querymask.common.ops.sparse_conv2d`.
        offsets: [N_A, kH*kW, 2] in float32 or float64: (x, y) in cells, taps row-major.

    Returns:
        [N_A, C_out] in features' type.

    Raises:
        ValueError, TypeError, IndexError: as :func:`querymask.common.ops.sparse_conv2d`.
    """
    device = features.device.type
    if (dtype := autocast_type(device)) is not None:
        features, weight, bias = (cast(tensor, dtype) for tensor in (features, weight, bias))
        offsets = cast(offsets, torch.float32)
        with torch.autocast(device, enabled=False):
            return _compose(features, index_map, cells, offsets, weight, bias, as_pair(dilation))
    return _compose(features, index_map, cells, offsets, weight, bias, as_pair(dilation))


def _compose(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: list[int],
) -> Tensor:
    check_inputs(features, index_map, cells, weight, bias, dilation)
    if len(dilation) != 2:
        raise ValueError(f"a deformable convolution has one branch: dilation must be two numbers, got {dilation}")
    _check_offsets(offsets, features, cells, weight)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    num_rows, channels = features.shape
    kernel_size = weight.shape[2:]
    check_cells(index_map, cells)
    region, y, x = tap_cells(cells, kernel_size, dilation)
    height, width = index_map.shape[1:]
    offsets = offsets.to(compute)
    x, y = x + offsets[..., 0], y + offsets[..., 1]
    near = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN
    x, y = torch.where(near, x, -1), torch.where(near, y, -1)  # where only cells outside are read
    left, upper = x.detach().floor(), y.detach().floor()
    right_share, lower_share = x - left, y - upper
    rows, shares = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows.append(look_up(index_map, region, upper.long() + dy, left.long() + dx, num_rows))
        shares.append((lower_share if dy else 1 - lower_share) * (right_share if dx else 1 - right_share))
    rows = torch.where(near[..., None], torch.stack(rows, -1), num_rows).flatten(0, 1)  # [N_A*kH*kW, 4]
    shares = torch.stack(shares, -1).flatten(0, 1)
    padded = torch.cat([features.to(compute), features.new_zeros(1, channels, dtype=compute)])
    gathered = embedding_bag(rows, padded, mode="sum", per_sample_weights=shares)
    gathered = gathered.view(*near.shape, channels)
    return multiply(gathered, weight.to(compute), bias).to(features.dtype)


def _check_offsets(offsets: Tensor, features: Tensor, cells: Tensor, weight: Tensor) -> None:
    expected = [cells.shape[0], weight.shape[2] * weight.shape[3], 2]
    if list(offsets.shape) != expected:
        raise ValueError(f"offsets must be [N_A, kH*kW, 2] = {expected}, got shape {list(offsets.shape)}")
    if offsets.device != features.device:
        raise ValueError(f"offsets must be on features' device {features.device}, got {offsets.device}")
    if offsets.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"offsets must be float32 or float64, got {offsets.dtype}: fewer digits displace the samples; compute the "
            "offsets in float32"
        )
