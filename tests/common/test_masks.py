"""Cutting masks out and pasting them against Detectron2, pycocotools and loops."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import BitMasks, Instances, PolygonMasks

from querymask.common.mask_coding import DCTMaskCoding, binarize_at_half_range
from querymask.common.masks import crop_masks, instance_masks, paste_masks, resize_masks

HEIGHT, WIDTH = 40, 56


def ellipses(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (count, HEIGHT, WIDTH) bool, some cut by the border, and XYXY boxes (count, 4) about them, off the grid."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    masks, boxes = [], []
    for _ in range(count):
        cx, cy = rng.uniform(10, WIDTH - 5), rng.uniform(10, HEIGHT - 5)
        a, b = rng.uniform(5, 25), rng.uniform(5, 15)
        masks.append(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1)
        boxes.append([max(cx - a, 0), max(cy - b, 0), min(cx + a, WIDTH), min(cy + b, HEIGHT)])
    return torch.from_numpy(np.stack(masks)), torch.tensor(boxes, dtype=torch.float32)


def make_instances(masks: BitMasks | PolygonMasks, count: int) -> Instances:
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_classes = torch.zeros(count, dtype=torch.int64)
    instances.gt_masks = masks
    return instances


def test_masks_of_polygons() -> None:
    polygons = [
        [[3.0, 4, 40, 6, 20, 35]],
        [[1.0, 1, 9, 1, 9, 9, 1, 9], [20.0, 20, 30, 20, 30, 38, 20, 38]],  # two parts
    ]
    masks = instance_masks(make_instances(PolygonMasks(polygons), 2))
    assert masks.shape == (2, HEIGHT, WIDTH) and masks.dtype == torch.bool
    for mask, parts in zip(masks, polygons, strict=True):
        encoded = pycocotools.mask.frPyObjects(parts, HEIGHT, WIDTH)
        expected = pycocotools.mask.decode(pycocotools.mask.merge(encoded)).astype(bool)
        assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("empty", [PolygonMasks([]), BitMasks(torch.zeros(0, HEIGHT, WIDTH))])
def test_masks_of_no_instances(empty: BitMasks | PolygonMasks) -> None:
    masks = instance_masks(make_instances(empty, 0))
    assert masks.shape == (0, HEIGHT, WIDTH) and masks.dtype == torch.bool


def test_bitmasks_pass_through() -> None:
    masks, _ = ellipses(3)
    assert torch.equal(instance_masks(make_instances(BitMasks(masks), 3)), masks)


def test_missing_masks() -> None:
    instances = Instances((HEIGHT, WIDTH), gt_classes=torch.zeros(1))
    with pytest.raises(ValueError, match="no gt_masks.*MASK_BRANCH.NAME none"):
        instance_masks(instances)


@pytest.mark.parametrize("size", [7, 28, 64])
def test_crop(size: int) -> None:
    """As Detectron2 does it, for boxes larger and smaller than the crop, and beyond the image."""
    masks, boxes = ellipses(5)
    boxes[3] += torch.tensor([-8.0, -5.0, 9.0, 4.0])
    boxes[4, 2:] = boxes[4, :2] + 0.75
    crops = crop_masks(masks, boxes, size)
    assert crops.shape == (5, size, size) and crops.dtype == torch.bool
    assert torch.equal(crops, BitMasks(masks).crop_and_resize(boxes, size))
    assert torch.equal(crops, crop_masks(masks, boxes.double(), size))
    assert 0 < crops[3].float().mean() < 1


def test_crop_of_nothing() -> None:
    masks, boxes = ellipses(2)
    assert crop_masks(masks[:0], boxes[:0], 28).shape == (0, 28, 28)
    boxes[0, 2:] = boxes[0, :2]  # no area
    boxes[1] = torch.tensor([-30.0, -30.0, -10.0, -10.0])  # no image
    crops = crop_masks(torch.ones_like(masks), boxes, 28)
    assert crops.shape == (2, 28, 28) and not crops[1].any()


def slow_paste(values: torch.Tensor, box: torch.Tensor, threshold: float) -> np.ndarray:
    """Bilinear sampling at the centres of pixels, pixel by pixel; cells outside of the map are zero."""
    size = len(values)
    x0, y0, x1, y1 = box.tolist()
    pasted = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            u = (x + 0.5 - x0) / (x1 - x0) * size - 0.5
            v = (y + 0.5 - y0) / (y1 - y0) * size - 0.5
            total = 0.0
            for row in (math.floor(v), math.floor(v) + 1):
                for column in (math.floor(u), math.floor(u) + 1):
                    if 0 <= row < size and 0 <= column < size:
                        total += values[row, column].item() * (1 - abs(v - row)) * (1 - abs(u - column))
            pasted[y, x] = total >= threshold
    return pasted


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_paste(threshold: float) -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 6, 6, dtype=torch.float64)
    boxes = torch.tensor([[3.3, 4.1, 30.7, 29.2], [-9.5, -7.5, 20.1, 70.3], [40.2, 3.1, 41.9, 5.3]]).double()
    pasted = paste_masks(maps, boxes, HEIGHT, WIDTH, threshold)
    assert pasted.shape == (3, HEIGHT, WIDTH) and pasted.dtype == torch.bool
    for i in range(3):
        assert np.array_equal(pasted[i].numpy(), slow_paste(maps[i], boxes[i], threshold)), f"map {i}"
        assert pasted[i].any()


def test_paste_of_binary_maps() -> None:
    masks, boxes = ellipses(4)
    crops = crop_masks(masks, boxes, 28)
    pasted = paste_masks(crops, boxes, HEIGHT, WIDTH, threshold=0.5)
    assert torch.equal(pasted, paste_masks_in_image(crops.float(), boxes, (HEIGHT, WIDTH), 0.5).bool())
    overlaps = (pasted & masks).sum((1, 2)) / (pasted | masks).sum((1, 2))
    assert overlaps.min() > 0.9


EMPTY_BOXES = {
    "left": [-20.0, 2, -5, 9],
    "above": [2.0, -30, 9, 0],
    "right": [70.0, 2, 90, 9],
    "below": [2.0, 40, 9, 70],
    "line": [4.0, 4, 4, 9],
    "point": [4.5, 4.5, 4.5, 4.5],
    "inverted": [9.0, 9, 4, 4],
    "nan": [math.nan] * 4,
}


def test_paste_of_boxes_without_pixels() -> None:
    """They give empty masks and leave the masks of other boxes as they are."""
    good = torch.tensor([[3.0, 3, 30, 30], [20.0, 10, 60, 50]])
    boxes = torch.cat((good[:1], torch.tensor(list(EMPTY_BOXES.values())), good[1:]))
    pasted = paste_masks(torch.ones(len(boxes), 8, 8), boxes, HEIGHT, WIDTH, threshold=0.5)
    assert not pasted[1:-1].any()
    assert torch.equal(pasted[[0, -1]], paste_masks(torch.ones(2, 8, 8), good, HEIGHT, WIDTH, threshold=0.5))
    assert pasted[0, 4:29, 4:29].all() and pasted[-1, 11:, 21:].all()
    for name, box in EMPTY_BOXES.items():
        alone = paste_masks(torch.ones(1, 8, 8), torch.tensor([box]), HEIGHT, WIDTH, threshold=0.5)
        assert alone.shape == (1, HEIGHT, WIDTH) and alone.dtype == torch.bool and not alone.any(), name


def test_paste_of_nothing() -> None:
    pasted = paste_masks(torch.zeros(0, 8, 8), torch.zeros(0, 4), HEIGHT, WIDTH, threshold=0.5)
    assert pasted.shape == (0, HEIGHT, WIDTH) and pasted.dtype == torch.bool


@pytest.mark.parametrize("binary", [True, False])
def test_quality_of_the_whole_way(binary: bool) -> None:
    """Crop, code, decode and paste; IoU by pycocotools."""
    masks, boxes = ellipses(5)
    coding = DCTMaskCoding(128, 256)
    maps = coding.decode(coding.encode(crop_masks(masks, boxes, 128)))
    pasted = paste_masks(binarize_at_half_range(maps) if binary else maps, boxes, HEIGHT, WIDTH, threshold=0.5)
    for mask, result in zip(masks, pasted, strict=True):
        a, b = (pycocotools.mask.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in (mask, result))
        assert pycocotools.mask.iou([a], [b], [0]).item() > 0.95


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (9, 20), (13, 3), (24, 16), (1, 1)])
def test_resize_of_booleans(size: tuple[int, int]) -> None:
    """Foreground wherever a bilinear resize of 0 and 1 gives more than 0."""
    torch.manual_seed(0)
    masks = torch.rand(6, 8, 8) < 0.15
    expected = torch.zeros(6, *size, dtype=torch.bool)
    for place in itertools.product(*map(range, size)):
        # In cells of the old mask, whose centres are the whole numbers; beyond the outer ones the outer ones count
        y, x = (min(max(Fraction((2 * k + 1) * 8, 2 * new) - Fraction(1, 2), 0), 7) for k, new in zip(place, size))
        for row, column in itertools.product(range(8), range(8)):
            if abs(row - y) < 1 and abs(column - x) < 1:
                expected[:, place[0], place[1]] |= masks[:, row, column]
    resized = resize_masks(masks, *size)
    assert torch.equal(resized, expected)
    # A weight that should be 0 may be some 1e-16 in floating point
    bilinear = F.interpolate(masks[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(resized, bilinear > 1e-9)


def test_resized_booleans_grow() -> None:
    """The measured example: a square of 3x3 pixels, 8x8 -> 12x12."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = True
    assert resize_masks(mask, 12, 12).sum() == 36
    assert resize_masks(mask[None, None], 8, 8).shape == (1, 1, 8, 8)
    assert resize_masks(torch.zeros(0, 8, 8, dtype=torch.bool), 12, 12).shape == (0, 12, 12)
