"""Cases of multi-scale deformable attention for the simulated kernels, against the PyTorch twin in float64."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from kernel_simulation import at_offset, check_close, check_deterministic
from torch import Tensor

from querymask.common.ops import multi_scale_deformable_attention_reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = [(9, 13), (5, 7), (3, 3), (1, 2), (1, 1)]
WILD = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31), -0.0, 0.0, 1.0, 0.5, 3e9, -3e9, 1e-40]
NAMES = ("output", "grad_value", "grad_locations", "grad_attention")
Shapes = Sequence[tuple[int, int]]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # value, locations, attention weights, gradient of the output


def make_inputs(
    shapes: Shapes,
    dtype: torch.dtype,
    batch: int = 2,
    queries: int = 7,
    heads: int = 2,
    channels: int = 32,
    points: int = 4,
    spread: float = 1.6,
    seed: int = 0,
) -> Inputs:
    """Locations lie in a square of ``spread`` times the map's size around its centre."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    samples = (batch, queries, heads, len(shapes), points)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    locations = spread * (torch.rand(*samples, 2, generator=generator, dtype=torch.float64) - 0.5) + 0.5
    weights = torch.rand(samples, generator=generator, dtype=torch.float64).to(dtype)
    value, grad = normal(batch, tokens, heads, channels), normal(batch, queries, heads * channels)
    return value, locations.to(torch.float64 if dtype == torch.float64 else torch.float32), weights, grad


def run_kernels(shapes: Shapes, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of the simulated kernels."""
    value, locations, weights, grad = inputs
    flat = [size for shape in shapes for size in shape]
    operators = torch.ops.querymask_simulated
    output = operators.msda(value, flat, locations, weights)
    return [output, *operators.msda_backward(grad, value, flat, locations, weights)]


def run_cpu_operator(shapes: Shapes, inputs: Inputs) -> list[Tensor]:
    value, locations, weights, grad = inputs
    flat = [size for shape in shapes for size in shape]
    operators = torch.ops.querymask
    output = operators.multi_scale_deformable_attention(value, flat, locations, weights)
    gradients = operators.multi_scale_deformable_attention_backward(grad, value, flat, locations, weights)
    return [output, *gradients]


def smooth(locations: Tensor, shapes: Shapes) -> Tensor:
    """Where the gradient by a location does not jump within float32's rounding, [B, Q, M, L, P, 1]."""
    sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float64).view(-1, 1, 2)
    pixels = locations.double() * sizes - 0.5
    near = pixels.abs() < 1e6
    jumps = (pixels - pixels.round()).abs() < 1e-3
    return ~(near & jumps).any(-1, keepdim=True)


def check_against_twin(shapes: Shapes, inputs: Inputs) -> None:
    value, locations, weights, grad = inputs
    actual = run_kernels(shapes, inputs)
    exact = [tensor.double().clone().requires_grad_() for tensor in (value, locations, weights)]
    if min(*weights.shape, *value.shape) > 0:
        output = multi_scale_deformable_attention_reference(exact[0], shapes, *exact[1:])
        expected = [output.detach(), *torch.autograd.grad(output, exact, grad.double())]
    else:
        expected = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in (grad, value, locations, weights)]
    dtypes = (value.dtype, value.dtype, locations.dtype, value.dtype)
    where = [None, None, smooth(locations, shapes).expand(locations.shape), None]
    for arguments in zip(NAMES, actual, expected, dtypes, where, strict=True):
        check_close(*arguments)


def random_case(shapes: Shapes, dtype: torch.dtype, offsets: Sequence[int] = (0, 0, 0, 0), **sizes) -> None:
    check_against_twin(shapes, tuple(map(at_offset, make_inputs(shapes, dtype, **sizes), offsets)))


def wild_locations(dtype: torch.dtype, channels: int) -> None:
    shapes = LEVELS[:4]
    inputs = make_inputs(shapes, dtype, queries=11, channels=channels, points=3)
    generator = torch.Generator().manual_seed(channels)
    chosen = torch.rand(inputs[1].shape, generator=generator) < 0.3
    numbers = torch.tensor(WILD, dtype=torch.float64)[
        torch.randint(len(WILD), (int(chosen.sum()),), generator=generator)
    ]
    inputs[1][chosen] = numbers.to(inputs[1].dtype)
    check_against_twin(shapes, inputs)


def pixel_centres_and_borders(dtype: torch.dtype, channels: int) -> None:
    """There the derivative by the location is one-sided: the CPU operator's."""
    for height, width in ((2, 3), (4, 8), (1, 1), (5, 1)):
        y = torch.arange(-2, 2 * height + 3) / (2 * height)
        x = torch.arange(-2, 2 * width + 3) / (2 * width)
        grid = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).view(1, -1, 1, 1, 1, 2)
        shapes = [(height, width)]
        value, locations, weights, grad = make_inputs(
            shapes, dtype, batch=1, queries=grid.shape[1], heads=1, channels=channels, points=1
        )
        inputs = (value, grid.to(locations.dtype), weights, grad)
        for name, ours, theirs in zip(NAMES, run_kernels(shapes, inputs), run_cpu_operator(shapes, inputs)):
            check_close(name, ours, theirs.double(), dtype)


def numbers_that_are_not_finite(dtype: torch.dtype, channels: int, changed: int) -> None:
    """NaN or infinity in an input reaches the results that it reaches in the CPU operator."""
    shapes = LEVELS[:3]
    inputs = make_inputs(shapes, dtype, queries=9, channels=channels, points=2)
    target = inputs[changed]
    generator = torch.Generator().manual_seed(channels)
    target[torch.rand(target.shape, generator=generator) < 0.05] = math.nan if channels % 2 else math.inf
    for name, ours, theirs in zip(NAMES, run_kernels(shapes, inputs), run_cpu_operator(shapes, inputs)):
        same = ours.isfinite() == theirs.isfinite()
        assert same.all(), f"{name} is finite elsewhere, in {int((~same).sum())} places"


def crowded(dtype: torch.dtype, channels: int) -> None:
    """All samples within few pixels: many threads add to the same gradients of values."""
    shapes = [(12, 10), (3, 2)]
    check_against_twin(shapes, make_inputs(shapes, dtype, queries=70, channels=channels, spread=0.1))


def deterministic(shapes: Shapes, dtype: torch.dtype, channels: int) -> None:
    inputs = make_inputs(shapes, dtype, queries=20, channels=channels, points=3, spread=1.2)
    check_deterministic(lambda: run_kernels(shapes, inputs))
    torch.use_deterministic_algorithms(True)
    try:
        check_against_twin(shapes, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def too_many_levels() -> None:
    try:
        random_case([(1, 1)] * 33, torch.float32)
    except ValueError as error:
        assert "at most 32 levels" in str(error)
    else:
        raise AssertionError("33 levels are taken")


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and functions that raise an AssertionError."""
    widths = [1, 3, 8, 16, 30, 32, 33, 48, 64, 71, 128, 300]
    for i, (channels, (name, dtype)) in enumerate(itertools.product(widths, DTYPES.items())):
        levels, points, queries = 1 + i % 5, (1, 2, 3, 4, 8)[i % 5 + i // 5 % 2 - 1], (1, 7, 17, 33)[i // 4 % 4]
        sizes = {"batch": 1 + i % 2, "queries": queries, "heads": 1 + i % 3, "channels": channels, "points": points}
        yield f"widths-{channels}-{name}", partial(random_case, LEVELS[:levels], dtype, seed=i, **sizes)
    encoders = [[(1, 1)], [(8, 8)], [(7, 9), (4, 5)], [(17, 3), (9, 2), (5, 1)], [(2, 33)], [(16, 16), (8, 8), (4, 4)]]
    for i, (shapes, (name, dtype)) in enumerate(itertools.product(encoders, DTYPES.items())):
        tokens, channels = sum(height * width for height, width in shapes), (32, 8, 32, 30, 64)[i % 5]
        sizes = {"batch": 1, "queries": tokens, "channels": channels, "seed": i}
        yield f"encoder-{len(shapes)}x{tokens}-{channels}-{name}", partial(random_case, shapes, dtype, **sizes)
    for channels, (name, dtype) in itertools.product([7, 8, 32, 300], DTYPES.items()):
        yield f"wild-{channels}-{name}", partial(wild_locations, dtype, channels)
        yield f"far-{channels}-{name}", partial(random_case, LEVELS[:3], dtype, channels=channels, spread=40.0)
    for channels, name in itertools.product([1, 8, 32, 33], ["float64", "float32"]):
        yield f"borders-{channels}-{name}", partial(pixel_centres_and_borders, DTYPES[name], channels)
    for channels, name, changed in itertools.product([7, 32], DTYPES, [0, 2, 3]):
        what = ("value", "", "attention", "grad")[changed]
        yield (
            f"infinite-{what}-{channels}-{name}",
            partial(numbers_that_are_not_finite, DTYPES[name], channels, changed),
        )
    for channels, (name, dtype) in itertools.product([32, 33], DTYPES.items()):
        yield f"crowded-{channels}-{name}", partial(crowded, dtype, channels)
    for channels, (name, dtype) in itertools.product([32, 33], DTYPES.items()):  # hundreds of tokens in one tile
        sizes = {"batch": 1, "queries": 18, "heads": 1, "channels": channels, "points": 16}
        yield f"scattered-{channels}-{name}", partial(random_case, [(40, 40)], dtype, **sizes)
    for channels, (name, dtype) in itertools.product([7, 32, 71], DTYPES.items()):
        yield f"deterministic-{channels}-{name}", partial(deterministic, LEVELS[:3], dtype, channels)
    for name, dtype in DTYPES.items():
        for offsets in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 2, 2, 2), (3, 5, 7, 4)]:
            label = "".join(map(str, offsets))
            yield f"offsets-{label}-{name}", partial(random_case, LEVELS[:3], dtype, offsets, points=3)
    for size, (name, dtype) in itertools.product(["batch", "queries", "heads", "channels", "points"], DTYPES.items()):
        yield f"empty-{size}-{name}", partial(random_case, LEVELS[:2], dtype, **{size: 0})
    many = [(1 + i % 3, 1 + i % 4) for i in range(32)]
    for name, dtype in DTYPES.items():
        yield f"levels-32-{name}", partial(random_case, many, dtype, batch=1, queries=5, points=3)
    yield "levels-33", too_many_levels
    sizes = {"batch": 1, "queries": 1, "heads": 65537, "channels": 1, "points": 1}
    yield "large-heads-65537", partial(random_case, [(1, 1)], torch.float32, **sizes)
