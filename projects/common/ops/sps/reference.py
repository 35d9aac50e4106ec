"""Convolution on structure-preserving sparsity in pure PyTorch: the fall-back, documentation and oracle of the kernels.

Shape letters: N rows of features, R regions of H x W cells, N_A active cells, kH x kW taps, C_in and C_out channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from querymask.common.ops.autocast import autocast_type, cast

FEATURE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_TYPES = (torch.int32, torch.int64)


def as_pair(dilation: int | Sequence[int]) -> list[int]:
    """2 as [2, 2], (2, 3) as [2, 3]."""
    return [dilation, dilation] if isinstance(dilation, int) else list(dilation)


def check_inputs(
    features: Tensor, index_map: Tensor, cells: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]
) -> None:
    """Raises ValueError or TypeError unless the arguments fit together. csrc/sps/check.cpp has the same texts."""
    if features.dim() != 2:
        raise ValueError(f"features must be [N, C_in], got shape {list(features.shape)}")
    if index_map.dim() != 3:
        raise ValueError(f"index_map must be [R, H, W], got shape {list(index_map.shape)}")
    if cells.dim() != 2 or cells.shape[1] != 3:
        raise ValueError(f"cells must be [N_A, 3] (region, y, x), got shape {list(cells.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [C_out, C_in, kH, kW], got shape {list(weight.shape)}")
    if weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight [C_out, C_in, kH, kW] has shape {list(weight.shape)} but features have C_in = {features.shape[1]}"
        )
    if weight.shape[2] % 2 != 1 or weight.shape[3] % 2 != 1:
        raise ValueError(
            f"weight has a kernel of {weight.shape[2]} x {weight.shape[3]}: both must be odd, so that it has a centre"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias must be [C_out] = [{weight.shape[0]}] or None, got shape {list(bias.shape)}")
    if not dilation or len(dilation) % 2 or min(dilation) <= 0:
        raise ValueError(
            f"dilation must be two positive numbers (vertical, horizontal) for each branch, got {list(dilation)}"
        )
    branches = len(dilation) // 2
    if weight.shape[0] % branches:
        raise ValueError(
            f"the {branches} branches of dilation {list(dilation)} must have equal shares of weight's C_out = "
            f"{weight.shape[0]}"
        )
    others = {"index_map": index_map, "cells": cells, "weight": weight, "bias": features if bias is None else bias}
    if any(tensor.device != features.device for tensor in others.values()):
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in others.items())
        raise ValueError(f"all tensors must be on one device, got features on {features.device}, {places}")
    if features.dtype not in FEATURE_TYPES:
        raise TypeError(f"features must be float16, bfloat16, float32 or float64, got {features.dtype}")
    if index_map.dtype not in INDEX_TYPES:
        raise TypeError(f"index_map must be int32 or int64, got {index_map.dtype}")
    if cells.dtype not in INDEX_TYPES:
        raise TypeError(f"cells must be int32 or int64, got {cells.dtype}")
    if not weight.dtype == others["bias"].dtype == features.dtype:
        raise TypeError(
            f"weight and bias must have features' type {features.dtype}, got {weight.dtype} and "
            f"{others['bias'].dtype}: convert them with .to()"
        )


def check_grad_output(grad_output: Tensor, features: Tensor, cells: Tensor, weight: Tensor) -> None:
    """The same for the gradient of the output."""
    expected = [cells.shape[0], weight.shape[0]]
    if list(grad_output.shape) != expected:
        raise ValueError(f"grad_output must be [N_A, C_out] = {expected}, got shape {list(grad_output.shape)}")
    if grad_output.device != features.device:
        raise ValueError(f"grad_output must be on features' device {features.device}, got {grad_output.device}")
    if grad_output.dtype != features.dtype:
        raise TypeError(f"grad_output must have features' type {features.dtype}, got {grad_output.dtype}")


def tap_cells(cells: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The cells that the taps of a kernel lie on, which may be outside of the region.

    Args:
        cells: [N_A, 3] (region, y, x).
        kernel_size: (kH, kW), odd.
        dilation: (vertical, horizontal).

    Returns:
        Region [N_A, 1], y and x [N_A, kH*kW] in int64, taps row-major.
    """
    region, y, x = cells.long().unsqueeze(-1).unbind(1)
    steps = [
        size[1] * (torch.arange(size[0], device=cells.device) - size[0] // 2)
        for size in zip(kernel_size, dilation, strict=True)
    ]
    step_y, step_x = torch.meshgrid(*steps, indexing="ij")
    return region, y + step_y.flatten(), x + step_x.flatten()


def look_up(index_map: Tensor, region: Tensor, y: Tensor, x: Tensor, num_rows: int) -> Tensor:
    """The entries of ``index_map`` [R, H, W] at the given places.

    Beyond the region's border it is ``num_rows``, the row of zeros that follows the features.

    Raises:
        IndexError: an entry that is read is not below ``num_rows``. CPU only.
    """
    height, width = index_map.shape[1:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rows = index_map.long()[region, y.clamp(0, height - 1), x.clamp(0, width - 1)]
    if _has_values(rows) and (wrong := inside & ((rows < 0) | (rows >= num_rows))).any():
        n, tap = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"index_map[{int(region[n])}, {int(y[n, tap])}, {int(x[n, tap])}] = {int(rows[n, tap])} is not one of the "
            f"{num_rows} rows of features"
        )
    return torch.where(inside, rows, num_rows)


def check_cells(index_map: Tensor, cells: Tensor) -> None:
    """Raises IndexError where a cell lies outside of ``index_map``. CPU only."""
    if not _has_values(cells):
        return
    sizes = torch.tensor(index_map.shape)
    if (wrong := ((cells < 0) | (cells >= sizes)).any(1)).any():
        first = int(wrong.nonzero()[0])
        raise IndexError(
            f"cells[{first}] (region, y, x) = {tuple(cells[first].tolist())} is outside of index_map [R, H, W] = "
            f"{list(index_map.shape)}"
        )


def _has_values(tensor: Tensor) -> bool:
    """Whether its values are at hand: not while a graph is built, and not for the price of waiting for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def neighbour_rows(
    index_map: Tensor, cells: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], num_rows: int
) -> Tensor:
    """The rows of features that the taps of a kernel read, [N_A, kH*kW] in int64, taps row-major; see :func:`look_up`.

    Raises:
        IndexError: as :func:`check_cells` and :func:`look_up`.
    """
    check_cells(index_map, cells)
    return look_up(index_map, *tap_cells(cells, kernel_size, dilation), num_rows)


def sparse_conv2d_reference(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The same as :func:`querymask.common.ops.sparse_conv2d`: all neighbours gathered, then one product.

    float16 and bfloat16 are computed in float32, the result has features' type.
    """
    device = features.device.type
    if (dtype := autocast_type(device)) is not None:
        features, weight, bias = (cast(tensor, dtype) for tensor in (features, weight, bias))
        with torch.autocast(device, enabled=False):
            return _compose(features, index_map, cells, weight, bias, as_pair(dilation))
    return _compose(features, index_map, cells, weight, bias, as_pair(dilation))


def _compose(
    features: Tensor, index_map: Tensor, cells: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int]
) -> Tensor:
    check_inputs(features, index_map, cells, weight, bias, dilation)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    padded = torch.cat([features.to(compute), features.new_zeros(1, features.shape[1], dtype=compute)])
    pairs = list(zip(dilation[::2], dilation[1::2]))
    share = weight.shape[0] // len(pairs)
    outputs = []
    for i, pair in enumerate(pairs):
        rows = neighbour_rows(index_map, cells, weight.shape[2:], pair, features.shape[0])
        own = slice(i * share, (i + 1) * share)
        outputs.append(multiply(padded[rows], weight[own].to(compute), None if bias is None else bias[own]))
    return torch.cat(outputs, 1).to(features.dtype)


def multiply(gathered: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N_A, kH*kW, C_in] times weight [C_out, C_in, kH, kW], plus bias: [N_A, C_out] in weight's type."""
    kernel = weight.permute(0, 2, 3, 1).flatten(1)  # [C_out, kH*kW*C_in]
    return linear(gathered.flatten(1), kernel, None if bias is None else bias.to(weight.dtype))
