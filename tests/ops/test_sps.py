"""Convolution on structure-preserving sparsity: kernels and PyTorch form against a dense convolution and each other."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from querymask.common.ops import (
    fvcore_handles,
    multi_dilation_sparse_conv2d,
    sparse_conv2d,
    sparse_conv2d_reference,
)

FORMS = pytest.mark.parametrize("form", [sparse_conv2d, sparse_conv2d_reference], ids=["op", "reference"])
LOW_PRECISION = (torch.float16, torch.bfloat16)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, float32 products may be rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dense_conv2d(
    features: Tensor, index_map: Tensor, cells: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, ...]
) -> Tensor:
    """The definition: a dense convolution of the expanded map for each branch, read at the active cells."""
    expanded = features[index_map.long()].permute(0, 3, 1, 2)
    pairs = list(zip(dilation[::2], dilation[1::2]))
    biases = [None] * len(pairs) if bias is None else bias.chunk(len(pairs))
    outputs = []
    for pair, *parameters in zip(pairs, weight.chunk(len(pairs)), biases, strict=True):
        padding = [size // 2 * step for size, step in zip(weight.shape[2:], pair)]
        outputs.append(conv2d(expanded, *parameters, padding=padding, dilation=pair))
    region, y, x = cells.long().unbind(1)
    return torch.cat(outputs, 1)[region, :, y, x]


def random_grad(inputs: Any, seed: int = 1) -> Tensor:
    shape = (len(inputs.cells), len(inputs.weight))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(inputs.features)


def gradients(form: Callable[..., Tensor], inputs: Any, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients of one call."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
    output = form(*inputs.replace_tensors(tensors))
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@FORMS
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    regions=st.integers(1, 4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    active=st.integers(0, 60),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel_size=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    branches=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    bias=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_dense_convolution_of_the_expanded_map(form, make_sps_inputs, branches, channels, **sizes):
    """Cells that share rows, several regions, borders, all kernels and dilations, branches; the gradients too."""
    channels = (channels[0], channels[1] * len(branches))
    inputs = make_sps_inputs(dilation=sum(branches, ()), channels=channels, **sizes)
    grad = random_grad(inputs)
    assert_all_close(gradients(form, inputs, grad), gradients(dense_conv2d, inputs, grad), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [(1, 1), (8, 16), (32, 32), (33, 17), (128, 64), (300, 5)])
def test_several_tiles(channels, dtype, device, make_sps_inputs):
    """More cells than a tile has, and gradients that are added up over tiles."""
    inputs = make_sps_inputs(
        3000, size=(50, 41), active=3001, channels=channels, dilation=(3, 2), dtype=dtype, device=device
    )
    grad = random_grad(inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    actual = gradients(sparse_conv2d, inputs, grad)
    assert_all_close(actual, gradients(sparse_conv2d_reference, inputs, grad), tolerance)
    assert all(tensor.dtype == dtype for tensor in actual)


@FORMS
def test_centre_and_border(form, device):
    """A tap at a time over one region of 2 x 2."""
    features = torch.tensor([[1.0], [10.0], [100.0]], device=device)
    index_map = torch.tensor([[[0, 1], [2, 1]]], device=device)
    cells = torch.tensor([[0, 0, 0], [0, 1, 1]], device=device)
    expected = {
        0: [0, 1],
        1: [0, 10],
        2: [0, 0],
        3: [0, 100],
        4: [1, 10],
        5: [10, 0],
        6: [0, 0],
        7: [100, 0],
        8: [10, 0],
    }
    for tap, values in expected.items():
        weight = torch.zeros(1, 1, 9, device=device)
        weight[..., tap] = 1
        assert form(features, index_map, cells, weight.view(1, 1, 3, 3)).flatten().tolist() == values


@FORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3), (1, 2, 3, 1)])
def test_gradcheck(form, bias, dilation, device, make_sps_inputs):
    sizes = {"size": (4, 3), "active": 8, "channels": (2, 3 * len(dilation) // 2)}
    inputs = make_sps_inputs(9, **sizes, bias=bias, dilation=dilation, device=device)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]

    def call(*tensors: Tensor) -> Tensor:
        return form(*inputs.replace_tensors(tensors))

    assert torch.autograd.gradcheck(call, tensors, nondet_tol=1e-12 if device == "cuda" else 0.0)


@FORMS
@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradients_of_a_subset(form, wanted, device, make_sps_inputs):
    inputs = make_sps_inputs(device=device)
    expected = gradients(form, inputs, random_grad(inputs))[1:]
    for i, tensor in enumerate(inputs.tensors):
        tensor.requires_grad_(bool(wanted >> i & 1))
    form(*inputs).backward(random_grad(inputs))
    for i, (tensor, grad) in enumerate(zip(inputs.tensors, expected, strict=True)):
        if wanted >> i & 1:
            torch.testing.assert_close(tensor.grad, grad)
        else:
            assert tensor.grad is None


@FORMS
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(form, dtype, device, make_sps_inputs):
    """On the CPU, at most twice the error of rounding exact results: sums are in float32, and rounded once."""
    low = make_sps_inputs(300, size=(20, 21), active=500, channels=(32, 16), dtype=dtype, device=device)
    exact = low.replace_tensors([tensor.double() for tensor in low.tensors])
    grad = random_grad(low)
    slack = 1e-5 if device == "cpu" else 4 * torch.finfo(dtype).eps  # CUDA rounds the products of a chunk
    for ours, theirs in zip(gradients(form, low, grad), gradients(form, exact, grad.double()), strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (theirs - theirs.to(dtype).double()).abs().max().item() + slack * theirs.abs().max().item()
        assert (ours.double() - theirs).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("channels", [(8, 8), (32, 64), (64, 32), (128, 128), (24, 136)])
def test_tensor_cores(channels, dtype, device, make_sps_inputs):
    """Widths that GPUs with tensor cores multiply there, several tiles; TF32 and float16 hold bfloat16's numbers."""
    sizes = {"size": (20, 21), "active": 300, "channels": channels, "dilation": (3, 2), "kernel_size": (3, 5)}
    exact = make_sps_inputs(200, **sizes, dtype=torch.bfloat16, device=device)
    grad = random_grad(exact)
    exact = exact.replace_tensors([tensor.double() for tensor in exact.tensors])
    inputs = exact.replace_tensors([tensor.to(dtype) for tensor in exact.tensors])
    with tf32():
        actual = gradients(sparse_conv2d, inputs, grad.to(dtype))
    tolerance = 3e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_all_close([tensor.double() for tensor in actual], gradients(dense_conv2d, exact, grad.double()), tolerance)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("channels", [(5, 3), (8, 8), (32, 64), (128, 136)])
def test_branches(form, channels, dtype, device, make_sps_inputs):
    """Several tiles, one of them on tensor cores, with exact numbers as above: each branch by itself."""
    sizes = {"size": (20, 21), "active": 300, "channels": (channels[0], 3 * channels[1])}
    exact = make_sps_inputs(200, **sizes, dilation=(3, 2, 1, 1, 2, 5), dtype=torch.bfloat16, device=device)
    grad = random_grad(exact)
    exact = exact.replace_tensors([tensor.double() for tensor in exact.tensors])
    inputs = exact.replace_tensors([tensor.to(dtype) for tensor in exact.tensors])
    with tf32():
        actual = gradients(form, inputs, grad.to(dtype))
    expected = [[], 0, [], []]
    for i in range(3):
        own = slice(i * channels[1], (i + 1) * channels[1])
        branch = exact._replace(
            weight=exact.weight[own], bias=exact.bias[own], dilation=exact.dilation[2 * i : 2 * i + 2]
        )
        output, grad_features, *others = gradients(dense_conv2d, branch, grad[:, own].double())
        expected[1] = expected[1] + grad_features
        for number, tensor in zip((0, 2, 3), (output, *others)):
            expected[number].append(tensor)
    expected = [torch.cat(expected[0], 1), expected[1], torch.cat(expected[2]), torch.cat(expected[3])]
    tolerance = {torch.float64: 1e-11, torch.float32: 3e-5}.get(dtype) or 4 * torch.finfo(dtype).eps
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in actual)
    assert_all_close([tensor.double() for tensor in actual], expected, tolerance)


@FORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast(form, bias, dtype, device, make_sps_inputs):
    inputs = make_sps_inputs(bias=bias, dtype=torch.float32, device=device)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
    with torch.autocast(device, dtype):
        output = form(*inputs)
    grads = torch.autograd.grad(output.sum(), tensors)
    assert output.dtype == dtype
    assert [grad.dtype for grad in grads] == [torch.float32] * len(tensors)
    rounded = inputs.replace_tensors([tensor.detach().to(dtype) for tensor in tensors])
    torch.testing.assert_close(output, form(*rounded))
    expected = gradients(form, rounded, torch.ones_like(output))[1:]
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_backward_pass_within_autocast(dtype, device, make_sps_inputs):
    """The products inside the operator are not cast once more."""
    inputs = make_sps_inputs(dtype=torch.float32, device=device)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
    grads = []
    for within in (False, True):
        with torch.autocast(device, dtype):
            output = sparse_conv2d(*inputs)
        with torch.autocast(device, dtype, enabled=within):
            grads.append(torch.autograd.grad(output.sum(), tensors))
    torch.testing.assert_close(*grads)


@FORMS
def test_autocast_leaves_float64(form, device, make_sps_inputs):
    inputs = make_sps_inputs(device=device)
    with torch.autocast(device, torch.bfloat16):
        output = form(*inputs)
    torch.testing.assert_close(output, form(*inputs), rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize(
    "sizes",
    [{"active": 0}, {"channels": (0, 3)}, {"channels": (4, 0)}, {"active": 0, "rows": 0, "regions": 0}],
    ids=str,
)
def test_empty(form, sizes, device, make_sps_inputs):
    inputs = make_sps_inputs(device=device, **({"active": 5} | sizes))
    output, *grads = gradients(form, inputs, random_grad(inputs))
    assert output.shape == (len(inputs.cells), len(inputs.weight))
    assert torch.equal(output, inputs.bias.expand_as(output))
    for tensor, grad in zip(inputs.tensors, grads, strict=True):
        assert grad.shape == tensor.shape
    assert not grads[0].any() and not grads[1].any()
    torch.testing.assert_close(grads[2], random_grad(inputs).sum(0))


@FORMS
def test_what_is_not_finite_stays_where_it_is(form, device, make_sps_inputs):
    """NaN in a row reaches the cells that read it, and no other, beyond the border neither."""
    inputs = make_sps_inputs(device=device)
    clean = form(*inputs)
    features = inputs.features.clone()
    features[7] = math.nan
    reads = sparse_conv2d_reference(
        (torch.arange(30, device=device) == 7).double().unsqueeze(1),
        *inputs[1:3],
        torch.ones(1, 1, 3, 3, dtype=torch.float64, device=device),
    ).flatten()
    output = form(*inputs._replace(features=features))
    assert 0 < int((reads > 0).sum()) < len(reads)
    assert torch.equal(output.isnan().all(1), reads > 0)
    torch.testing.assert_close(output[reads == 0], clean[reads == 0])


@FORMS
def test_not_contiguous(form, device, make_sps_inputs):
    inputs = make_sps_inputs(device=device)
    expected = gradients(form, inputs, random_grad(inputs))

    def strided(tensor: Tensor) -> Tensor:  # every other element, and but for bias the first dimension last in memory
        pairs = torch.stack([tensor, -tensor - 1], -1)
        return (pairs if tensor.dim() == 1 else pairs.movedim(0, -1).contiguous().movedim(-1, 0))[..., 0]

    scattered = type(inputs)(*(strided(tensor) for tensor in inputs[:5]), inputs.dilation)
    assert not any(tensor.is_contiguous() for tensor in scattered[:5])
    tensors = [tensor.requires_grad_() for tensor in scattered.tensors]
    output = form(*scattered)
    grads = torch.autograd.grad(output, tensors, strided(random_grad(inputs)))
    for ours, theirs in zip((output, *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    grads = torch.autograd.grad(form(*scattered).sum(), tensors)  # the gradient of a sum has stride zero
    for ours, theirs in zip(grads, gradients(form, inputs, torch.ones_like(output))[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@FORMS
def test_index_types_may_differ(form, device, make_sps_inputs):
    inputs = make_sps_inputs(device=device)
    expected = form(*inputs)
    for map_type in (torch.int32, torch.int64):
        for cell_type in (torch.int32, torch.int64):
            mixed = inputs._replace(index_map=inputs.index_map.to(map_type), cells=inputs.cells.to(cell_type))
            assert torch.equal(form(*mixed), expected)


@FORMS
def test_one_number_as_dilation(form, make_sps_inputs):
    inputs = make_sps_inputs(dilation=(2, 2))
    assert torch.equal(form(*inputs[:5], 2), form(*inputs))
    assert torch.equal(form(*inputs[:4], dilation=2), form(*inputs._replace(bias=None)))


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
@pytest.mark.parametrize("active", [40, 2500])
@pytest.mark.parametrize("channels", [(7, 5), (32, 32), (80, 33)])
def test_bits_do_not_depend_on_threads(threads, active, channels, make_sps_inputs):
    """With less than a tile of cells, in which BLAS would have more threads to itself, and with several tiles."""
    for dilation in ((1, 1), (1, 2, 3, 1)):
        sizes = {"size": (30, 31), "active": active, "channels": (channels[0], channels[1] * len(dilation) // 2)}
        inputs = make_sps_inputs(900, **sizes, dilation=dilation, dtype=torch.float32)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = gradients(sparse_conv2d, inputs, random_grad(inputs))
            torch.set_num_threads(threads)
            actual = gradients(sparse_conv2d, inputs, random_grad(inputs))
        finally:
            torch.set_num_threads(before)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("channels", [(4, 3), (16, 8), (16, 16)])
def test_deterministic_mode(channels, device, make_sps_inputs, monkeypatch):
    """The same bits every time, where several cells share a row; and the gradients of the usual mode."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which PyTorch's own products raise
    dilation = (1, 1, 2, 3) if channels == (16, 16) else (1, 1)
    inputs = make_sps_inputs(5, active=70, channels=channels, dilation=dilation, dtype=torch.float32, device=device)
    expected = gradients(sparse_conv2d, inputs, random_grad(inputs))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(sparse_conv2d, inputs, random_grad(inputs)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert_all_close(first, expected, 3e-5)


def test_second_derivative_is_refused(device, make_sps_inputs):
    inputs = make_sps_inputs(device=device)
    inputs.features.requires_grad_()
    output = sparse_conv2d(*inputs)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs.features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_nothing_but_the_inputs_is_saved(make_sps_inputs):
    """No gathered matrix, kH * kW times the features."""
    inputs = make_sps_inputs()
    inputs.features.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        sparse_conv2d(*inputs)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in inputs[:4]}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": False},
        {"active": 0},
        {"active": 1, "kernel_size": (1, 5)},
        {"channels": (4, 6), "dilation": (1, 1, 2, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(sizes, dtype, device, make_sps_inputs):
    inputs = make_sps_inputs(dtype=dtype, device=device, **sizes)
    features, index_map, cells, weight, _, dilation = inputs.flat
    ops = torch.ops.querymask
    backward = (random_grad(inputs), features, index_map, cells, weight, dilation)
    torch.library.opcheck(ops.sparse_conv2d_backward, backward)
    for tensor in inputs.tensors:
        tensor.requires_grad_()
    torch.library.opcheck(ops.sparse_conv2d, inputs.flat)


def test_compile(device, make_sps_inputs):
    """In one graph, numbers of active cells that change included, with the gradients of the eager call."""

    def layer(features: Tensor, index_map: Tensor, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 2 * sparse_conv2d(features.relu(), index_map, cells, weight, bias, 2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for active in (23, 5, 31):
        inputs = make_sps_inputs(active=active, device=device)
        results = []
        for function in (layer, compiled):
            tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
            output = function(*inputs.replace_tensors(tensors)[:5])
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        torch.testing.assert_close(*results)


def test_flops(make_sps_inputs):
    """Both counters, both forms: as many as the product of the gathered matrix."""
    expected = 23 * 6 * 15 * 4
    for form, dilation in itertools.product((sparse_conv2d, sparse_conv2d_reference), ((1, 1), (1, 2, 3, 1))):
        inputs = make_sps_inputs(active=23, channels=(4, 6), kernel_size=(3, 5), dilation=dilation)
        with FlopCounterMode(display=False) as counter:
            form(*inputs)
        assert counter.get_total_flops() == 2 * expected
        tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
        with FlopCounterMode(display=False) as counter:
            form(*inputs.replace_tensors(tensors)).sum().backward()
        assert counter.get_total_flops() == 6 * expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning", "ignore::torch.jit.TracerWarning")
@FORMS
def test_fvcore_flops(form, make_sps_inputs):
    fvcore = pytest.importorskip("fvcore.nn")

    class Layer(torch.nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return form(features, *inputs[1:])

    inputs = make_sps_inputs(active=23, channels=(4, 3), kernel_size=(3, 5))
    analysis = fvcore.FlopCountAnalysis(Layer(), inputs.features).set_op_handle(**fvcore_handles())
    assert analysis.total() == 23 * 3 * 15 * 4


@pytest.mark.parametrize("dilations", [(1,), (1, 3, 5), ((2, 1), 4)])
def test_several_dilations(dilations, device, make_sps_inputs):
    """The sum of rectified convolutions, each rectified before the sum; with gradients."""
    inputs = make_sps_inputs(device=device)
    others = [make_sps_inputs(device=device, seed=seed) for seed in range(len(dilations))]
    weights, biases = [other.weight for other in others], [other.bias for other in others]
    leaves = [tensor.requires_grad_() for tensor in (inputs.features, *weights, *biases)]
    output = multi_dilation_sparse_conv2d(*inputs[:3], weights, biases, dilations)
    expected = 0
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        pair = (dilation, dilation) if isinstance(dilation, int) else dilation
        expected = expected + dense_conv2d(*inputs[:3], weight, bias, pair).clamp(min=0)
    grad = random_grad(inputs)
    actual = [output, *torch.autograd.grad(output, leaves, grad)]
    assert_all_close(actual, [expected, *torch.autograd.grad(expected, leaves, grad)], 1e-11)


def test_several_dilations_compile(device, make_sps_inputs):
    """In one graph, without active cells, too; the saved result of the branches is not changed afterwards."""
    others = [make_sps_inputs(device=device, seed=seed) for seed in range(3)]
    weights, biases = [other.weight for other in others], [other.bias for other in others]

    def layer(features: Tensor, index_map: Tensor, cells: Tensor) -> Tensor:
        return multi_dilation_sparse_conv2d(features.relu(), index_map, cells, weights, biases, (1, 3, 5)).square()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for active in (23, 0, 31):
        inputs = make_sps_inputs(active=active, device=device)
        results = []
        for function in (layer, compiled):
            features = inputs.features.clone().requires_grad_()
            output = function(features, *inputs[1:3])
            results.append([output, *torch.autograd.grad(output.sum(), features)])
        torch.testing.assert_close(*results)
