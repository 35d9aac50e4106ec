"""Deformable convolution on structure-preserving sparsity, against torchvision's on the expanded map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from querymask.common.ops import deformable_sparse_conv2d, sparse_conv2d


def make_offsets(inputs, seed: int = 2, scale: float = 3.0) -> Tensor:
    """Random displacements, most of them by several cells."""
    taps = inputs.weight.shape[2] * inputs.weight.shape[3]
    generator = torch.Generator().manual_seed(seed)
    offsets = scale * torch.randn(len(inputs.cells), taps, 2, generator=generator, dtype=torch.float64)
    return offsets.to(inputs.features.device)


def call(inputs, offsets: Tensor) -> Tensor:
    return deformable_sparse_conv2d(*inputs[:3], offsets, *inputs[3:])


def dense_deform_conv2d(inputs, offsets: Tensor) -> Tensor:
    """torchvision's operator reads (y, x) offsets from a map: that of one cell at a time here."""
    from torchvision.ops import deform_conv2d

    features, index_map, cells, weight, bias, dilation = inputs
    expanded = features[index_map.long()].permute(0, 3, 1, 2)
    padding = [size // 2 * step for size, step in zip(weight.shape[2:], dilation)]
    outputs = []
    for (region, y, x), offset in zip(cells.tolist(), offsets):
        offset_map = offset.flip(-1).flatten().view(1, -1, 1, 1).expand(-1, -1, *index_map.shape[1:])
        image = expanded[region : region + 1]
        output = deform_conv2d(image, offset_map, weight, bias, padding=padding, dilation=dilation)
        outputs.append(output[0, :, y, x])
    return torch.stack(outputs)


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel_size=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dense_deformable_convolution_of_the_expanded_map(make_sps_inputs, **sizes):
    """Positions inside, on the border and outside; the gradients too."""
    pytest.importorskip("torchvision")
    inputs = make_sps_inputs(9, active=6, channels=(3, 2), **sizes)
    offsets = make_offsets(inputs, sizes["seed"]).requires_grad_()
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors] + [offsets]
    results = []
    for output in (call(inputs, offsets), dense_deform_conv2d(inputs, offsets)):
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_no_offsets(device, make_sps_inputs):
    inputs = make_sps_inputs(dilation=(1, 2), device=device)
    torch.testing.assert_close(call(inputs, 0 * make_offsets(inputs)), sparse_conv2d(*inputs))


def test_whole_cells(device, make_sps_inputs):
    """An offset by whole cells moves the tap: one to the right, (1, 0), turns the left tap into the centre."""
    inputs = make_sps_inputs(bias=False, device=device)
    weight = torch.zeros_like(inputs.weight)
    weight[:, :, 1, 0] = inputs.weight[:, :, 1, 1]
    offsets = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device).expand(len(inputs.cells), 9, 2)
    expected = sparse_conv2d(*inputs[:3], inputs.weight[:, :, 1:2, 1:2])
    torch.testing.assert_close(call(inputs._replace(weight=weight), offsets), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, make_sps_inputs):
    inputs = make_sps_inputs(7, regions=1, size=(4, 3), active=4, channels=(2, 2), bias=bias)
    tensors = [tensor.requires_grad_() for tensor in (make_offsets(inputs, scale=1.5), *inputs.tensors)]
    assert torch.autograd.gradcheck(lambda *args: call(inputs.replace_tensors(args[1:]), args[0]), tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**63])
def test_wild_offsets(bad, device, make_sps_inputs):
    """They count as outside: zero in the output, no gradient, nothing of them in other samples."""
    inputs = make_sps_inputs(device=device)
    offsets = make_offsets(inputs)
    offsets[0, 1, 0] = offsets[2, 3, 1] = offsets[5] = bad
    outside = torch.where(offsets == bad, 100, offsets.nan_to_num(100, 100, 100))
    results = []
    for moved in (offsets, outside):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in (moved, *inputs.tensors)]
        output = call(inputs.replace_tensors(tensors[1:]), tensors[0])
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    torch.testing.assert_close(*results)
    assert all(tensor.isfinite().all() for tensor in results[0])


def test_no_active_cells(device, make_sps_inputs):
    inputs = make_sps_inputs(active=0, device=device)
    assert call(inputs, make_offsets(inputs)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(dtype, device, make_sps_inputs):
    """Sums are in float32 and rounded once; under autocast the offsets stay as they are."""
    inputs = make_sps_inputs(dtype=torch.float32, device=device)
    offsets = make_offsets(inputs).float()
    low = inputs.replace_tensors([tensor.to(dtype) for tensor in inputs.tensors])
    exact = inputs.replace_tensors([tensor.to(dtype).double() for tensor in inputs.tensors])
    expected = call(exact, offsets)
    output = call(low, offsets)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))
    with torch.autocast(device, dtype):
        cast = call(inputs, offsets)
    assert cast.dtype == dtype
    torch.testing.assert_close(cast, output)
