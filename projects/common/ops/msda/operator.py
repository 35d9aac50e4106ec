"""Multi-scale deformable attention (Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3).

Shape letters: B batch, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from querymask.common.ops import extension
from querymask.common.ops.exporting import exportable
from querymask.common.ops.msda.gathering import multi_scale_deformable_attention_gathering
from querymask.common.ops.msda.reference import (
    check_grad_output,
    check_inputs,
    flatten_shapes,
    multi_scale_deformable_attention_reference,
)
from querymask.common.ops.registration import Shape, register_operator


@exportable(multi_scale_deformable_attention_gathering)
def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sums, for every query and head, bilinear samples of all levels with given weights.

    ``output[b, q, m*D + d] = sum_l sum_p attention_weights[b, q, m, l, p] * v_l(x, y)[d]``, where ``v_l`` is head m's
    map of level l, sampled at the pixel ``x = loc_x * W_l - 0.5``, ``y = loc_y * H_l - 0.5``. Each of the four
    neighbours that lies outside the map counts as zero, so does a location that is infinite or NaN.

    Runs the compiled kernels on CPU and CUDA, and its PyTorch form elsewhere or where they are missing. Under autocast
    value and weights take autocast's type, the locations stay as they are. The sums are in float32 (float64 for
    float64). Differentiable once with respect to the three tensors. On CUDA the gradient of ``value`` is summed in no
    fixed order; under ``torch.use_deterministic_algorithms`` it is, with the same bits from run to run, after a sort
    that takes about 30 bytes of memory for each of the B*Q*M*L*P samples.

    Args:
        value: [B, S, M, D] in float16, bfloat16, float32 or float64: the levels' tokens, row-major, concatenated.
        spatial_shapes: (height, width) of each level in Python ints, S in total. No tensor: reading one back from a
            GPU would stall every call.
        sampling_locations: [B, Q, M, L, P, 2] in float32 or float64: (x, y), with (0, 0) the outer upper left corner
            of the map and (1, 1) its outer lower right one; may lie outside.
        attention_weights: [B, Q, M, L, P] in value's type.

    Returns:
        [B, Q, M*D] in value's type.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a type is not among those above, or ``spatial_shapes`` is a tensor.
    """
    shapes = flatten_shapes(spatial_shapes)
    if extension.use_kernels(value.device):
        return torch.ops.querymask.multi_scale_deformable_attention(
            value, shapes, sampling_locations, attention_weights
        )
    return multi_scale_deformable_attention_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
    check_grad_output(grad_output, value, sampling_locations)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (value, sampling_locations, attention_weights)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.querymask.multi_scale_deformable_attention_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _multiply_adds(value: Shape, spatial_shapes: Any, locations: Shape, weights: Shape) -> int:
    """Four for each channel of a bilinear sample; neither counter counts the elementwise product with the weights."""
    return 4 * math.prod(locations[:-1]) * value[-1]


def _grid_sampler(image: Shape, grid: Shape, *options: Any, out_shape: Shape, **unused: Any) -> int:
    return 8 * math.prod(out_shape)


def _grid_sampler_backward(grad_output: Shape, *options: Any, **unused: Any) -> int:
    return 16 * math.prod(grad_output)


register_operator(
    "multi_scale_deformable_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    backward=_backward,
    multiply_adds=_multiply_adds,
    reference_formulas={
        torch.ops.aten.grid_sampler_2d: _grid_sampler,
        torch.ops.aten.grid_sampler_2d_backward: _grid_sampler_backward,
    },
)
