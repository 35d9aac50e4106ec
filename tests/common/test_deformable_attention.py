"""Deformable attention and the geometry of its pyramid against loops."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from querymask.common.deformable_attention import (
    DeformableAttention,
    cell_centres,
    encoder_reference_points,
    flatten_levels,
    valid_ratios,
)

SHAPES = ((4, 5), (2, 3))
TOKENS = 26
HEADS, LEVELS, POINTS, WIDTH = 2, 2, 3, 8


def random_attention(levels: int = LEVELS) -> DeformableAttention:
    """In float64, with weights that leave no term negligible."""
    torch.manual_seed(0)
    attention = DeformableAttention(WIDTH, HEADS, levels, POINTS).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def random_inputs(coordinates: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (2, 3, C), references (2, 3, L, coordinates), values (2, S, C)."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=generator)
    reference = torch.rand(2, 3, LEVELS, coordinates, dtype=torch.float64, generator=generator)
    value = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return query, reference, value


def bilinear(cells: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value at (x, y), in units of the map's sides, of a map (H, W, D); zero outside of it."""
    height, width, _ = cells.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(cells.shape[2], dtype=cells.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += cells[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def slow_attention(
    attention: DeformableAttention,
    query: torch.Tensor,
    reference: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """Equation 3 of the paper for one query (C,), its references (L, 2 or 4) and one image's values (S, C)."""
    value = value @ attention.value_proj.weight.T + attention.value_proj.bias
    value[padding] = 0
    offsets = (attention.sampling_offsets.weight @ query + attention.sampling_offsets.bias).tolist()
    weights = attention.attention_weights.weight @ query + attention.attention_weights.bias
    channels = WIDTH // HEADS
    heads = []
    for m in range(HEADS):
        weight = weights[m * LEVELS * POINTS : (m + 1) * LEVELS * POINTS].exp()
        weight = weight / weight.sum()
        total = torch.zeros(channels, dtype=torch.float64)
        start = 0
        for level, (height, width) in enumerate(SHAPES):
            cells = value[start : start + height * width, m * channels : (m + 1) * channels].view(height, width, -1)
            start += height * width
            x, y, *size = reference[level].tolist()
            for p in range(POINTS):
                index = (m * LEVELS + level) * POINTS + p
                dx, dy = offsets[2 * index : 2 * index + 2]
                if size:
                    dx, dy = dx / POINTS * size[0] * 0.5, dy / POINTS * size[1] * 0.5
                else:
                    dx, dy = dx / width, dy / height
                total += weight[level * POINTS + p] * bilinear(cells, x + dx, y + dy)
        heads.append(total)
    return attention.output_proj.weight @ torch.cat(heads) + attention.output_proj.bias


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention(coordinates: int) -> None:
    """To points, whose offsets are in cells, and to boxes, whose offsets are in half sides."""
    attention = random_attention()
    query, reference, value = random_inputs(coordinates)
    padding = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.3
    with torch.no_grad():
        for mask in (padding, None):
            output = attention(query, reference, value, SHAPES, mask)
            assert output.shape == (2, 3, WIDTH)
            for b in range(2):
                where = padding[b] if mask is not None else torch.zeros(TOKENS, dtype=torch.bool)
                for q in range(3):
                    expected = slow_attention(attention, query[b, q], reference[b, q], value[b], where)
                    assert torch.allclose(output[b, q], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradient_of_attention(coordinates: int) -> None:
    attention = random_attention()
    inputs = [tensor[:1].requires_grad_() for tensor in random_inputs(coordinates)]
    assert gradcheck(lambda query, reference, value: attention(query, reference, value, SHAPES), inputs)


def test_initialisation() -> None:
    """Head m looks in direction 2 pi m / M on the border of a square, point p is p steps away; weights are uniform."""
    torch.manual_seed(0)
    attention = DeformableAttention(64, num_heads=8, num_levels=3, num_points=4)
    assert (attention.sampling_offsets.weight == 0).all()
    bias = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    for m in range(8):
        direction = [math.cos(2 * math.pi * m / 8), math.sin(2 * math.pi * m / 8)]
        direction = [d / max(abs(c) for c in direction) for d in direction]
        for level in range(3):
            for p in range(4):
                assert bias[m, level, p].tolist() == pytest.approx([(p + 1) * d for d in direction], abs=1e-6)
    assert bias[1, 0, 3].tolist() == pytest.approx([4, 4]) and bias[4, 0, 0].tolist() == pytest.approx([-1, 0])
    assert not attention.attention_weights.weight.any() and not attention.attention_weights.bias.any()
    for projection in (attention.value_proj, attention.output_proj):
        bound = (6 / (64 + 64)) ** 0.5
        assert 0.98 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()


def test_width_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="width 36 must be a multiple of the number of heads, 8"):
        DeformableAttention(36, num_heads=8)


def test_valid_ratios() -> None:
    masks = []
    for height, width, valid in (((4, 8, [(4, 8), (3, 2)])), ((2, 4, [(2, 4), (1, 1)]))):
        mask = torch.ones(2, height, width, dtype=torch.bool)
        for b, (h, w) in enumerate(valid):
            mask[b, :h, :w] = False
        masks.append(mask)
    ratios = valid_ratios(masks, torch.float64)
    assert ratios.tolist() == [[[1, 1], [1, 1]], [[2 / 8, 3 / 4], [1 / 4, 1 / 2]]]


def test_cell_centres() -> None:
    centers = cell_centres((2, 3), torch.float64, torch.device("cpu"))
    assert centers.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5]]


def test_encoder_reference_points() -> None:
    ratios = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.6, 0.75], [2 / 3, 0.5]]], dtype=torch.float64)
    points = encoder_reference_points(SHAPES, ratios)
    for b in range(2):
        expected = []
        for level, (height, width) in enumerate(SHAPES):
            ratio_x, ratio_y = ratios[b, level].tolist()
            for i in range(height):
                for j in range(width):
                    expected.append([(j + 0.5) / (ratio_x * width), (i + 0.5) / (ratio_y * height)])
        assert torch.allclose(points[b], torch.tensor(expected, dtype=torch.float64), rtol=1e-14)


def test_flatten_levels() -> None:
    maps = [torch.randn(2, 3, height, width) for height, width in SHAPES]
    tokens = flatten_levels(maps)
    assert tokens.shape == (2, TOKENS, 3)
    assert torch.equal(tokens[1, 1 * 5 + 2], maps[0][1, :, 1, 2])
    assert torch.equal(tokens[1, 20 + 1 * 3 + 2], maps[1][1, :, 1, 2])


def test_training_after_inference_mode() -> None:
    """A tensor that is kept between the calls must not be one of inference mode, which training refuses."""
    attention = random_attention(levels=1)
    query, reference, value = random_inputs(2)
    reference = reference[:, :, :1]
    shapes = ((2, 13),)  # met by no other test
    with torch.inference_mode():
        expected = attention(query, reference, value, shapes)
    output = attention(query, reference, value, shapes)
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert attention.sampling_offsets.weight.grad.abs().sum() > 0


def test_real_tensors_after_fake_ones() -> None:
    shapes = ((3, 11),)  # met by no other test
    with FakeTensorMode():
        encoder_reference_points(shapes, torch.ones(1, 1, 2))
    points = encoder_reference_points(shapes, torch.ones(1, 1, 2))
    assert type(points) is torch.Tensor and points[0, -1].tolist() == pytest.approx([10.5 / 11, 2.5 / 3])
