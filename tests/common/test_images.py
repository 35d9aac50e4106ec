"""Batches of images and the masks of their padding against loops."""

import pytest
import torch

from querymask.common.images import batch_images, padding_mask, resize_padding

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
SIZES = [(5, 9), (8, 4), (8, 9)]


def make_batch(sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)} for h, w in sizes]


def columns(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "divisibility", "expected"),
    [
        (SIZES, 0, (8, 9)),
        (SIZES[:2], 0, (8, 9)),
        (SIZES[:1], 0, (5, 9)),
        (SIZES, 4, (8, 12)),
        (SIZES[:1], 32, (32, 32)),
    ],
)
def test_batch_images(sizes: list[tuple[int, int]], divisibility: int, expected: tuple[int, int]) -> None:
    items = make_batch(sizes)
    images = batch_images(items, columns(MEAN), columns(STD), divisibility)
    assert images.tensor.shape == (len(sizes), 3, *expected)
    assert images.tensor.dtype == torch.float32
    assert [tuple(size) for size in images.image_sizes] == sizes
    mask = padding_mask(images)
    assert mask.shape == (len(sizes), *expected) and mask.dtype == torch.bool
    for b, (height, width) in enumerate(sizes):
        for y in range(expected[0]):
            for x in range(expected[1]):
                inside = y < height and x < width
                assert mask[b, y, x].item() == (not inside)
                for c in range(3):
                    value = (items[b]["image"][c, y, x].item() - MEAN[c]) / STD[c] if inside else 0.0
                    assert images.tensor[b, c, y, x].item() == pytest.approx(value, rel=1e-6)


def test_batch_images_leaves_its_input_alone() -> None:
    items = make_batch(SIZES)
    before = [item["image"].clone() for item in items]
    batch_images(items, columns(MEAN), columns(STD))
    assert all(torch.equal(item["image"], image) for item, image in zip(items, before, strict=True))


def test_batch_images_in_double_precision() -> None:
    images = batch_images(make_batch(SIZES), columns(MEAN).double(), columns(STD).double())
    assert images.tensor.dtype == torch.float64


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (3, 5), (13, 17), (20, 40)])
def test_resize_padding(size: tuple[int, int]) -> None:
    """Cell i of n takes pixel floor(i * N / n)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 13, 17, generator=generator) < 0.5
    resized = resize_padding(mask, size)
    assert resized.shape == (2, *size) and resized.dtype == torch.bool
    for y in range(size[0]):
        for x in range(size[1]):
            assert torch.equal(resized[:, y, x], mask[:, y * 13 // size[0], x * 17 // size[1]])


def test_every_level_keeps_a_valid_cell() -> None:
    """The first cell takes the first pixel, which is never padding: valid ratios cannot be zero."""
    images = batch_images(make_batch([(1, 1), (200, 300)]), columns(MEAN), columns(STD))
    for level in range(1, 8):
        assert not resize_padding(padding_mask(images), (200 >> level, 300 >> level))[:, 0, 0].any()
