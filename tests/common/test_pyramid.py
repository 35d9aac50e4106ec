"""Reads of a pyramid: at boxes against Detectron2's ROIPooler, at points against grid_sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from querymask.common.pyramid import ADAPTIVE, FeaturePyramid, LevelRule

STRIDES = [4, 8, 16, 32]


def make_maps(batch: int = 2, channels: int = 3, requires_grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(batch, channels, 256 // s, 320 // s, dtype=torch.float64, requires_grad=requires_grad)
        for s in STRIDES
    ]


def make_boxes(number: int) -> torch.Tensor:
    """Small and large ones, some reaching far beyond the image of 256x320."""
    low = torch.rand(number, 2, dtype=torch.float64) * 400 - 100
    size = torch.exp(torch.rand(number, 2, dtype=torch.float64) * 6.5)
    return (torch.cat((low, low + size), dim=1) * 8).round() / 8 + 1 / 64  # exact in the pooler's float32


@pytest.mark.parametrize(("size", "samples"), [(7, 2), (4, 1), (3, 3), (5, ADAPTIVE)])
def test_pool(size: int, samples: int) -> None:
    maps = make_maps(requires_grad=True)
    boxes = make_boxes(60)
    images = torch.arange(60) // 30
    pyramid = FeaturePyramid(maps, STRIDES)
    assert len(pyramid.level_of(boxes).unique()) == 4
    pooled = pyramid.pool(boxes, images, size, samples)
    pooler = ROIPooler(size, [1 / s for s in STRIDES], samples, "ROIAlignV2")
    expected = pooler(maps, [Boxes(boxes[:30]), Boxes(boxes[30:])])
    assert torch.allclose(pooled, expected, rtol=0, atol=1e-9)

    weights = torch.randn_like(pooled)
    gradients = torch.autograd.grad((pooled * weights).sum(), maps)
    others = torch.autograd.grad((expected * weights).sum(), maps)
    assert max(other.abs().max() for other in others) > 0.1
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=1e-9)


def test_no_boxes_and_boxes_of_nan() -> None:
    pyramid = FeaturePyramid(make_maps(), STRIDES)
    nan = torch.full((1, 4), float("nan"))
    for samples in (2, ADAPTIVE):
        assert pyramid.pool(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7, samples).shape == (0, 3, 7, 7)
    assert not pyramid.pool(nan, torch.zeros(1, dtype=torch.int64), 7).any()


@pytest.mark.parametrize(("rule", "first"), [(LevelRule(56, 2, 1e-6), 112), (LevelRule(224, 4, 1e-8), 112)])
def test_levels(rule: LevelRule, first: float) -> None:
    """The second map from the first side on, the third from twice the side on; of any shape, within the pyramid."""
    sides = torch.tensor([1.0, first - 0.1, first, 2 * first - 0.1, 2 * first, 1e6, 0.0])
    zeros = torch.zeros_like(sides)
    boxes = torch.stack([zeros, zeros, sides / 2, 2 * sides], 1)
    boxes[-1] = math.nan
    pyramid = FeaturePyramid(make_maps(), STRIDES)
    assert pyramid.level_of(boxes, rule).tolist() == [0, 0, 1, 1, 2, 3, 0]
    assert pyramid[1:].level_of(boxes, rule).tolist() == [0, 0, 0, 0, 1, 2, 0]


@pytest.mark.parametrize("extent", [None, (250, 310)])
def test_sample(extent: tuple[int, int] | None) -> None:
    """Every point from its own map and image, with gradients to maps and points."""
    maps, size = make_maps(requires_grad=True), torch.tensor([320.0, 256], dtype=torch.float64)
    points = (torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.4 - 0.2) * size
    points.requires_grad_()
    images, levels = torch.arange(50) % 2, torch.arange(50) % 4
    sampled = FeaturePyramid(maps, STRIDES).sample(points, images, levels, extent)
    grid = 2 * points / (size if extent is None else torch.tensor(extent[::-1])) - 1
    expected = torch.stack(
        [
            F.grid_sample(maps[level][image][None], grid[i].view(1, 1, 1, 2), align_corners=False).flatten()
            for i, (image, level) in enumerate(zip(images.tolist(), levels.tolist()))
        ]
    )
    torch.testing.assert_close(sampled, expected)
    cotangent = torch.randn_like(sampled)
    ours, theirs = (torch.autograd.grad((x * cotangent).sum(), [points, *maps]) for x in (sampled, expected))
    for actual, wanted in zip(ours, theirs):
        torch.testing.assert_close(actual, wanted)


def test_points_of_one_level() -> None:
    pyramid, points = FeaturePyramid(make_maps(), STRIDES), torch.rand(9, 2, dtype=torch.float64) * 250
    images = torch.arange(9) % 2
    for level in range(4):
        expected = pyramid.sample(points, images, torch.full((9,), level))
        assert torch.equal(pyramid.sample(points, images, level), expected)
        torch.testing.assert_close(pyramid[level:].sample(points, images), expected)
        alone = pyramid.of_image(1).sample(points, torch.zeros(9, dtype=torch.int64), level)
        torch.testing.assert_close(alone[images == 1], expected[images == 1])


def test_points_that_are_nowhere() -> None:
    """Far away, infinite or nan they read zeros."""
    points = torch.tensor([[1e9, 3.0], [math.inf, 3], [3, math.nan], [-1e30, -math.inf]], requires_grad=True)
    nowhere = torch.zeros(4, dtype=torch.long)
    pyramid = FeaturePyramid([feature.float() for feature in make_maps()], STRIDES)
    assert not pyramid.sample(points, nowhere, nowhere).any()


def test_other_strides() -> None:
    maps = make_maps()
    with pytest.raises(ValueError, match=r"consecutive powers of two, not \[4, 16\]"):
        FeaturePyramid([maps[0], maps[2]], [4, 16])
