"""Pooling on a pyramid against Detectron2's ROIPooler."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from querymask.common.roi_pooling import FeaturePyramid

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


@pytest.mark.parametrize(("size", "samples"), [(7, 2), (4, 1), (3, 3)])
def test_pool(size: int, samples: int) -> None:
    maps = make_maps(requires_grad=True)
    boxes = make_boxes(60)
    images = torch.arange(60) // 30
    pyramid = FeaturePyramid(maps, STRIDES)
    assert len(pyramid.level_of(boxes).unique()) == 4
    pooled = pyramid.pool(boxes, images, size, samples)
    pooler = ROIPooler(size, [1 / s for s in STRIDES], samples, "ROIAlignV2")
    expected = pooler(maps, [Boxes(boxes[:30]), Boxes(boxes[30:])])
    assert torch.allclose(pooled, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-9)

    weights = torch.randn_like(pooled)
    gradients = torch.autograd.grad((pooled * weights).sum(), maps)
    others = torch.autograd.grad((expected.flatten(2).transpose(1, 2) * weights).sum(), maps)
    assert max(other.abs().max() for other in others) > 0.1
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=1e-9)


def test_no_boxes_and_boxes_of_nan() -> None:
    pyramid = FeaturePyramid(make_maps(), STRIDES)
    assert pyramid.pool(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7).shape == (0, 49, 3)
    nan = torch.full((1, 4), float("nan"))
    assert not pyramid.pool(nan, torch.zeros(1, dtype=torch.int64), 7).any()


def test_other_strides() -> None:
    maps = make_maps()
    with pytest.raises(ValueError, match=r"consecutive powers of two, not \[4, 16\]"):
        FeaturePyramid([maps[0], maps[2]], [4, 16])
