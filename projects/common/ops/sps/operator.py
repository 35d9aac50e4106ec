"""Convolution on structure-preserving sparsity (Picron and Tuytelaars, EffSeg, https://arxiv.org/abs/2307.01545,
Figure 2).

A sparse map keeps a feature for each of R x H x W cells without storing one for each: rows of features, and a map of
row numbers. Cells may share a row. Only the active cells get outputs, but they see all their neighbours, as in a dense
convolution. :class:`querymask.common.sps.SparseMap` builds and refines such maps.

Shape letters: N rows of features, R regions of H x W cells, N_A active cells, kH x kW taps, C_in and C_out channels,
G branches: equal groups of the outputs, one after the other, with a dilation each.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from querymask.common.ops import extension
from querymask.common.ops.exporting import exportable
from querymask.common.ops.registration import Shape, register_operator
from querymask.common.ops.sps.reference import as_pair, check_grad_output, check_inputs, sparse_conv2d_reference


@exportable(sparse_conv2d_reference)
def sparse_conv2d(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves a sparse map at its active cells, with stride 1 and zeros beyond the border of each region.

    ``output[n] = bias + sum_i sum_j weight[:, :, i, j] @ features[index_map[r, y', x']]``, where ``(r, y, x) =
    cells[n]``, ``y' = y + (i - (kH-1)/2) * dilation[0]``, ``x' = x + (j - (kW-1)/2) * dilation[1]``; a tap outside of
    the region counts as zero. So it is a dense convolution of ``features[index_map]``, read at the active cells.

    Runs the compiled kernels on CPU and CUDA, and its PyTorch form elsewhere or where they are missing. The kernels
    look up the neighbours themselves, gather a tile of them at a time and save no more than their inputs for the
    backward pass. Under autocast features, weight and bias take autocast's type. float16 and bfloat16 are summed in
    float32. float32 itself is rounded to TF32 on CUDA where PyTorch's products are
    (``torch.set_float32_matmul_precision``). Differentiable once with respect to features, weight and bias. On the CPU
    the result has the same bits for any number of threads; on CUDA the gradient of ``features`` is summed in no fixed
    order, unless ``torch.use_deterministic_algorithms`` asks for one, which takes more time.

    Args:
        features: [N, C_in] in float16, bfloat16, float32 or float64.
        index_map: [R, H, W] in int32 or int64: the row of features of each cell.
        cells: [N_A, 3] in int32 or int64: (region, y, x) of each active cell.
        weight: [C_out, C_in, kH, kW] in features' type; kH and kW are odd.
        bias: [C_out] in features' type, or None.
        dilation: cells from one tap to the next, as one number or (vertical, horizontal). Of G branches: one such pair
            after the other; the outputs of branch g, from g*C_out/G on, have the g-th. At most 16 on CUDA.

    Returns:
        [N_A, C_out] in features' type.

    Raises:
        ValueError: shapes or devices do not fit together, a dilation is not positive, or C_out is no multiple of G.
        TypeError: a type is not among those above.
        IndexError: a cell is outside of ``index_map``, or an entry that it reads is no row of features. On CUDA a
            device-side assertion fails instead.
    """
    dilation = as_pair(dilation)
    if extension.use_kernels(features.device):
        return torch.ops.querymask.sparse_conv2d(features, index_map, cells, weight, bias, dilation)
    return sparse_conv2d_reference(features, index_map, cells, weight, bias, dilation)


def multi_dilation_sparse_conv2d(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int | Sequence[int]],
) -> Tensor:
    """Sums the rectified convolutions of several branches, as EffSeg's semantic fusion module (SFM) does.

    ``output = sum_k ReLU(sparse_conv2d(features, index_map, cells, weights[k], biases[k], dilations[k]))``, where all
    branches are one call of :func:`sparse_conv2d`, and on tensor cores one launch.

    Args:
        features, index_map, cells: as in :func:`sparse_conv2d`.
        weights, biases, dilations: one or more, one of each for every branch, all weights of one shape.

    Returns:
        [N_A, C_out] in features' type.

    Raises:
        ValueError: no branch, or not as many weights as biases and dilations; and as :func:`sparse_conv2d`.
        TypeError, IndexError: as :func:`sparse_conv2d`.
    """
    if not weights or not len(weights) == len(biases) == len(dilations):
        raise ValueError(
            "weights, biases and dilations must have one entry for each of one or more branches, got "
            f"{len(weights)}, {len(biases)} and {len(dilations)}"
        )
    shapes = [tuple(map(int, weight.shape)) for weight in weights]  # a trace has tensors there: no two are equal
    if len(set(shapes)) > 1:
        raise ValueError(f"the weights of all branches must have one shape, got {shapes}")
    pairs = [step for dilation in dilations for step in as_pair(dilation)]
    outputs = sparse_conv2d(features, index_map, cells, torch.cat(list(weights)), torch.cat(list(biases)), pairs)
    return outputs.relu_().unflatten(1, (len(weights), shapes[0][0])).sum(1)


def _fake(
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
) -> Tensor:
    check_inputs(features, index_map, cells, weight, bias, dilation)
    return features.new_empty(cells.shape[0], weight.shape[0])


def _fake_backward(
    grad_output: Tensor,
    features: Tensor,
    index_map: Tensor,
    cells: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(features, index_map, cells, weight, None, dilation)
    check_grad_output(grad_output, features, cells, weight)
    grad_features, grad_weight = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (features, weight)
    )
    return grad_features, grad_weight, weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, index_map, cells, weight, bias, ctx.dilation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(features, index_map, cells, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor | None, None]:
    grad_features, grad_weight, grad_bias = torch.ops.querymask.sparse_conv2d_backward(
        grad_output, *ctx.saved_tensors, ctx.dilation
    )
    return grad_features, None, None, grad_weight, grad_bias if ctx.has_bias else None, None


def _multiply_adds(features: Shape, index_map: Shape, cells: Shape, weight: Shape, *options: Any) -> int:
    """N_A * C_out * C_in * kH * kW, the zeros beyond the border included, as of a dense convolution."""
    return cells[0] * math.prod(weight)


register_operator(
    "sparse_conv2d",
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    backward=_backward,
    multiply_adds=_multiply_adds,
)
