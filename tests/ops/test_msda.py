"""Multi-scale deformable attention: kernels and PyTorch form against the definition and each other."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from querymask.common.ops import (
    flop_formulas,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
)

FORMS = pytest.mark.parametrize(
    "form", [multi_scale_deformable_attention, multi_scale_deformable_attention_reference], ids=["op", "reference"]
)
LOW_PRECISION = (torch.float16, torch.bfloat16)


def from_the_definition(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The formula in the docstring, pixel by pixel."""
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    output = value.new_zeros(batch, queries, heads, value.shape[3])
    starts = [0, *itertools.accumulate(height * width for height, width in spatial_shapes)]
    for b, q, m, level, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        height, width = spatial_shapes[level]
        x = sampling_locations[b, q, m, level, p, 0].item() * width - 0.5
        y = sampling_locations[b, q, m, level, p, 1].item() * height - 0.5
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        for row, column in itertools.product(*[(math.floor(c), math.floor(c) + 1) for c in (y, x)]):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column)) * attention_weights[b, q, m, level, p]
                output[b, q, m] += share * value[b, starts[level] + row * width + column, m]
    return output.flatten(2)


def gradients(form: Callable[..., Tensor], inputs, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients of one call."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
    output = form(tensors[0], inputs.spatial_shapes, *tensors[1:])
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]


def random_grad(inputs, seed: int = 1) -> Tensor:
    value = inputs.value
    shape = (value.shape[0], inputs.sampling_locations.shape[1], value.shape[2] * value.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(value)


@FORMS
@pytest.mark.parametrize("channels", [1, 7, 16, 30, 33, 64, 71])
def test_definition(form, channels, device, make_msda_inputs):
    inputs = make_msda_inputs(channels=channels, device=device)
    expected = from_the_definition(*inputs)
    torch.testing.assert_close(form(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("points", [1, 3, 4, 8])
@pytest.mark.parametrize("channels", [1, 4, 8, 16, 30, 32, 33, 48, 64, 71, 128, 300])
def test_op_equals_reference(channels, points, dtype, device, make_msda_inputs):
    inputs = make_msda_inputs(
        [(9, 12), (5, 6), (3, 3), (1, 2)], queries=9, channels=channels, points=points, dtype=dtype, device=device
    )
    grad = random_grad(inputs)
    actual = gradients(multi_scale_deformable_attention, inputs, grad)
    expected = gradients(multi_scale_deformable_attention_reference, inputs, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@FORMS
@pytest.mark.parametrize("channels", [1, 7, 30, 33])
def test_gradcheck(form, channels, device, make_msda_inputs):
    inputs = make_msda_inputs([(3, 2), (1, 1)], batch=2, queries=2, heads=2, channels=channels, device=device)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
    nondeterminism = 1e-12 if device == "cuda" else 0.0

    def call(*args: Tensor) -> Tensor:
        return form(args[0], inputs.spatial_shapes, *args[1:])

    assert torch.autograd.gradcheck(call, tensors, nondet_tol=nondeterminism)


@FORMS
@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradients_of_a_subset(form, wanted, device, make_msda_inputs):
    inputs = make_msda_inputs(device=device)
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
def test_low_precision(form, dtype, device, make_msda_inputs):
    """At most twice the error of rounding exact results: sums are in float32, and rounded once."""
    low = make_msda_inputs([(9, 12), (5, 6)], channels=32, points=4, dtype=dtype, device=device)
    exact = type(low)(low[0].double(), low[1], low[2].double(), low[3].double())
    grad = random_grad(low)
    actual = gradients(form, low, grad)
    expected = gradients(form, exact, grad.double())
    for ours, theirs, dtypes in zip(actual, expected, (dtype, dtype, torch.float32, dtype), strict=True):
        assert ours.dtype == dtypes
        allowed = 2 * (theirs - theirs.to(dtypes).double()).abs().max().item() + 1e-5 * theirs.abs().max().item()
        assert (ours.double() - theirs).abs().max().item() <= allowed


@FORMS
def test_float64_locations_with_float32_values(form, device, make_msda_inputs):
    inputs = make_msda_inputs(dtype=torch.float32, device=device)
    wide = inputs._replace(sampling_locations=inputs.sampling_locations.double())
    grad = random_grad(inputs)
    for ours, theirs in zip(gradients(form, wide, grad), gradients(form, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False)
    assert gradients(form, wide, grad)[2].dtype == torch.float64


@FORMS
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast(form, dtype, device, make_msda_inputs):
    inputs = make_msda_inputs(channels=32, dtype=torch.float32, device=device)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
    with torch.autocast(device, dtype):
        output = form(*inputs)
    assert output.dtype == dtype
    rounded = inputs._replace(value=tensors[0].to(dtype), attention_weights=tensors[2].to(dtype))
    torch.testing.assert_close(output, form(*rounded))
    output.backward(torch.ones_like(output))
    assert [tensor.grad.dtype for tensor in tensors] == [torch.float32] * 3


@FORMS
def test_autocast_keeps_locations(form, device, make_msda_inputs):
    """On a wide level, a location in bfloat16 would be off by up to half a pixel."""
    width = 134
    value = torch.arange(width, dtype=torch.float32, device=device).view(1, width, 1, 1)
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
    locations[..., 0] = 0.7931
    with torch.autocast(device, torch.bfloat16):
        output = form(value, [(1, width)], locations, torch.ones(1, 1, 1, 1, 1, device=device))
    exact = 0.7931 * width - 0.5
    assert output.item() == torch.tensor(exact).bfloat16().item()


@FORMS
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}, {"points": 0}],
    ids=str,
)
def test_empty(form, sizes, device, make_msda_inputs):
    inputs = make_msda_inputs(device=device, **sizes)
    output, *grads = gradients(form, inputs, random_grad(inputs))
    assert output.shape == random_grad(inputs).shape
    assert not output.any()
    for tensor, grad in zip(inputs.tensors, grads, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@FORMS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wild_locations(form, bad, dtype, device, make_msda_inputs):
    """They count as outside: zero in the output, no gradient, nothing of them in other samples."""
    inputs = make_msda_inputs(dtype=dtype, device=device)
    inputs.sampling_locations[0, 1, 0, 0, 0, 0] = bad
    inputs.sampling_locations[0, 2, 1, 1, 1, 1] = bad
    inputs.sampling_locations[1, 3] = bad
    outside = inputs._replace(sampling_locations=torch.where(inputs.sampling_locations == bad, 5, inputs[2]))
    outside = outside._replace(sampling_locations=torch.where(outside[2].isnan(), 5, outside[2]))
    grad = random_grad(inputs)
    for ours, theirs in zip(gradients(form, inputs, grad), gradients(form, outside, grad), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.isfinite().all()


@FORMS
def test_values_that_are_not_finite_stay_where_they_are(form, device, make_msda_inputs):
    """NaN in one token or weight reaches the outputs that use it, and no other."""
    inputs = make_msda_inputs(device=device)
    clean = form(*inputs)
    value = inputs.value.clone()
    value[0, :, 1] = math.nan
    output = form(*inputs._replace(value=value)).unflatten(2, (3, 7))
    expected = clean.unflatten(2, (3, 7))
    torch.testing.assert_close(output[:, :, ::2], expected[:, :, ::2])
    torch.testing.assert_close(output[1], expected[1])
    weights = inputs.attention_weights.clone()
    weights[0, 2, 1, 0, 0] = math.nan
    output = form(*inputs._replace(attention_weights=weights)).unflatten(2, (3, 7))
    assert output[0, 2, 1].isnan().all()
    assert output.isnan().sum() == 7


@FORMS
def test_pixel_centres_and_borders(form, device):
    """At a pixel's centre its value alone counts; on the outer edge half of it; half a pixel outside, nothing."""
    value = torch.arange(1.0, 7, dtype=torch.float64, device=device).view(1, 6, 1, 1)  # 2 x 3
    points = [(0.5 / 3, 0.25), (2.5 / 3, 0.75), (0.0, 0.25), (1.0, 0.75), (-0.5 / 3, 0.25), (1 + 0.5 / 3, 0.75)]
    locations = torch.tensor(points, dtype=torch.float64, device=device).view(1, 6, 1, 1, 1, 2)
    output = form(value, [(2, 3)], locations, value.new_ones(1, 6, 1, 1, 1))
    assert output.flatten().tolist() == pytest.approx([1, 6, 0.5, 3, 0, 0], abs=1e-12)


@FORMS
def test_not_contiguous(form, device, make_msda_inputs):
    inputs = make_msda_inputs(device=device)
    expected = gradients(form, inputs, random_grad(inputs))

    def strided(tensor: Tensor) -> Tensor:  # first dimension last in memory, every other element
        return torch.stack([tensor, tensor.neg()], -1).movedim(0, -1).contiguous().movedim(-1, 0)[..., 0]

    scattered = type(inputs)(strided(inputs[0]), inputs[1], strided(inputs[2]), strided(inputs[3]))
    assert not any(tensor.is_contiguous() for tensor in scattered.tensors)
    tensors = [tensor.requires_grad_() for tensor in scattered.tensors]
    output = form(*scattered)
    grads = torch.autograd.grad(output, tensors, strided(random_grad(inputs)))
    for ours, theirs in zip((output, *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    ones = torch.ones_like(output)  # the gradient of a sum has stride zero
    grads = torch.autograd.grad(form(*scattered).sum(), tensors)
    for ours, theirs in zip(grads, gradients(form, inputs, ones)[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
@pytest.mark.parametrize("channels", [7, 32, 80])
def test_bits_do_not_depend_on_threads(threads, channels, make_msda_inputs):
    """Whatever the number of threads is: fewer than heads or more, so that heads are split by channel or query."""
    inputs = make_msda_inputs([(16, 21), (8, 11)], queries=150, channels=channels, points=4, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = gradients(multi_scale_deformable_attention, inputs, random_grad(inputs))
        torch.set_num_threads(threads)
        actual = gradients(multi_scale_deformable_attention, inputs, random_grad(inputs))
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """The copies of the kernels for lesser processors. torch picks the instruction set once in a process."""
    # The rest of the environment as it is: threads, and where the reference cases are.
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    tests = f"{__file__}::test_op_equals_reference"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "cpu and 4 and (32 or 33)"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [7, 32, 64])
def test_deterministic_mode(channels, dtype, device, make_msda_inputs):
    """The same bits in every run, and the numbers of the ordinary mode."""
    inputs = make_msda_inputs(queries=70, channels=channels, points=4, dtype=dtype, device=device)
    grad = random_grad(inputs)
    expected = gradients(multi_scale_deformable_attention, inputs, grad)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients(multi_scale_deformable_attention, inputs, grad) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, first, other))
    for ours, theirs in zip(first, expected, strict=True):  # sums in another order
        torch.testing.assert_close(ours, theirs, **({"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {}))


def test_second_derivative_is_refused(device, make_msda_inputs):
    inputs = make_msda_inputs(device=device)
    inputs.value.requires_grad_()
    output = multi_scale_deformable_attention(*inputs)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs.value, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "sizes", [{}, {"channels": 32, "points": 4}, {"batch": 0}, {"queries": 0}, {"queries": 1, "batch": 1}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(sizes, dtype, device, make_msda_inputs):
    inputs = make_msda_inputs(dtype=dtype, device=device, **sizes)
    value, shapes, locations, weights = inputs.flat
    ops = torch.ops.querymask
    torch.library.opcheck(ops.multi_scale_deformable_attention_backward, (random_grad(inputs), *inputs.flat))
    for tensor in inputs.tensors:
        tensor.requires_grad_()
    torch.library.opcheck(ops.multi_scale_deformable_attention, inputs.flat)


def test_compile(device, make_msda_inputs):
    """In one graph, level sizes that change included, with the gradients of the eager call."""

    def layer(value: Tensor, feature: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        shapes = [feature.shape[-2:], (1, 1)]
        return 2 * multi_scale_deformable_attention(value, shapes, locations, weights.softmax(-1))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((4, 5), (6, 3), (7, 2)):
        inputs = make_msda_inputs([(height, width), (1, 1)], device=device)
        feature = torch.zeros(1, height, width)
        results = []
        for function in (layer, compiled):
            tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
            output = function(tensors[0], feature, *tensors[1:])
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        torch.testing.assert_close(*results)


@FORMS
def test_flops(form, make_msda_inputs):
    """Four multiply-adds of two operations each for a bilinear sample, twice as many for its gradients."""
    inputs = make_msda_inputs([(5, 4), (3, 6)], batch=2, queries=5, heads=3, channels=7, points=2)
    samples = 2 * 5 * 3 * 2 * 2 * 7
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        form(*inputs)
    assert counter.get_total_flops() == 8 * samples
    for tensor in inputs.tensors:
        tensor.requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        form(*inputs).sum().backward()
    assert counter.get_total_flops() == 24 * samples


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_tracing(make_msda_inputs):
    """``torch.jit.trace``, which fvcore's counters use, makes tensors of the sizes that a model reads."""
    inputs = make_msda_inputs([(4, 5)])

    def layer(value: Tensor, feature: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return multi_scale_deformable_attention(value, [feature.shape[-2:]], locations, weights)

    arguments = (inputs[0], torch.zeros(1, 4, 5), *inputs[2:])
    traced = torch.jit.trace(layer, arguments)
    assert "querymask::multi_scale_deformable_attention" in str(traced.graph)
    torch.testing.assert_close(traced(*arguments), layer(*arguments))
