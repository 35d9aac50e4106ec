"""FLOP formulas of the operators, for fvcore and for ``torch.utils.flop_counter``.

A bilinear sample costs four multiply-adds a channel, by either counter's habit: fvcore counts a multiply-add once,
``torch.utils.flop_counter`` twice, and neither counts the elementwise product with the attention weights. So a kernel
has the count of its PyTorch form.

A sparse convolution costs N_A * C_out * kH * kW * C_in multiply-adds, the zeros beyond the border included, as a dense
one does; its backward pass twice as many.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from querymask.common.ops.extension import EXTENSION

Shape = Sequence[int]


def _samples(value: Shape, locations: Shape) -> int:
    """The number of bilinear samples, one for each channel: B * Q * M * L * P * D."""
    batch, queries, heads, levels, points, _ = locations
    return batch * queries * heads * levels * points * value[-1]


def _msda_fvcore(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    from fvcore.nn.jit_handles import get_shape

    return 4 * _samples(get_shape(inputs[0]), get_shape(inputs[2]))


def _msda(value: Shape, spatial_shapes: Any, locations: Shape, weights: Shape, **unused: Any) -> int:
    return 8 * _samples(value, locations)


def _msda_backward(
    grad_output: Shape, value: Shape, spatial_shapes: Any, locations: Shape, weights: Shape, **unused: Any
) -> int:
    return 16 * _samples(value, locations)  # once for value, once for locations and weights


def _sparse_conv2d_fvcore(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    from fvcore.nn.jit_handles import get_shape

    return get_shape(inputs[2])[0] * _product(get_shape(inputs[3]))


def _sparse_conv2d(features: Shape, index_map: Shape, cells: Shape, weight: Shape, *options: Any, **unused: Any) -> int:
    return 2 * cells[0] * _product(weight)


def _sparse_conv2d_backward(
    grad_output: Shape, features: Shape, index_map: Shape, cells: Shape, weight: Shape, dilation: Any, **unused: Any
) -> int:
    return 4 * cells[0] * _product(weight)  # once for features, once for weight


def _grid_sampler(image: Shape, grid: Shape, *options: Any, out_shape: Shape, **unused: Any) -> int:
    return 8 * _product(out_shape)


def _grid_sampler_backward(grad_output: Shape, *options: Any, **unused: Any) -> int:
    return 16 * _product(grad_output)


def _product(shape: Shape) -> int:
    return torch.Size(shape).numel()


def fvcore_handles() -> dict[str, Callable[[Sequence[Any], Sequence[Any]], int]]:
    """Handles for ``fvcore.nn.FlopCountAnalysis.set_op_handle``, by the operator's name in a trace."""
    return {
        "querymask::multi_scale_deformable_attention": _msda_fvcore,
        "querymask::sparse_conv2d": _sparse_conv2d_fvcore,
    }


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of the operators that the PyTorch forms consist of and ``torch.utils.flop_counter`` does not know.

    For ``FlopCounterMode(custom_mapping=flop_formulas())``. Those of the compiled operators are registered already.
    """
    return {
        torch.ops.aten.grid_sampler_2d: _grid_sampler,
        torch.ops.aten.grid_sampler_2d_backward: _grid_sampler_backward,
    }


if EXTENSION.error is None:
    register_flop_formula(torch.ops.querymask.multi_scale_deformable_attention)(_msda)
    register_flop_formula(torch.ops.querymask.multi_scale_deformable_attention_backward)(_msda_backward)
    register_flop_formula(torch.ops.querymask.sparse_conv2d)(_sparse_conv2d)
    register_flop_formula(torch.ops.querymask.sparse_conv2d_backward)(_sparse_conv2d_backward)
