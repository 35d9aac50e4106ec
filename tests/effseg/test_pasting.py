"""Pasting and scoring of masks against loops over pixels."""

import math

import pytest
import torch
from torch import Tensor

from querymask.common.masks import resize_masks
from querymask.effseg import pasting
from querymask.effseg.pasting import foreground_certainty, paste_and_resize, paste_probabilities

CANVAS = (9, 12)
BOXES = [[2.3, 1.1, 9.4, 7.9], [-3.0, -2.5, 5.0, 4.25], [8.0, 5.0, 20.0, 14.0], [3.0, 3.0, 3.75, 3.5], [20, 2, 25, 6]]
BOXES += [[4.0, 4, 4, 8], [7.0, 2, 3, 8], [math.nan, 1, 5, 5], [-math.inf, 0, math.inf, 9]]


def make_maps(count: int = len(BOXES), size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(count, size, size, generator=generator, dtype=torch.float64)
    return maps, torch.tensor(BOXES, dtype=torch.float64)


def slow_paste(grid: Tensor, box: Tensor, u: int, v: int) -> float:
    """The map at the centre of pixel (u, v): bilinear between the centres of its cells, zero beyond them."""
    x0, y0, x1, y1 = box.tolist()
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        return 0.0
    size, total = len(grid), 0.0
    x, y = (u + 0.5 - x0) / (x1 - x0) * size - 0.5, (v + 0.5 - y0) / (y1 - y0) * size - 0.5
    for row in range(size):
        for column in range(size):
            weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            total += weight * float(grid[row, column])
    return total


def test_pasting() -> None:
    maps, boxes = make_maps()
    pasted = paste_probabilities(maps, boxes, (0, CANVAS[0]), (0, CANVAS[1]))
    expected = [
        [[slow_paste(grid, box, u, v) for u in range(CANVAS[1])] for v in range(CANVAS[0])]
        for grid, box in zip(maps, boxes)
    ]
    torch.testing.assert_close(pasted, torch.tensor(expected, dtype=torch.float64))
    assert pasted[:3].flatten(1).any(1).all() and not pasted[4:].any()
    part = paste_probabilities(maps, boxes, (2, 7), (3, 4))
    torch.testing.assert_close(part, pasted[:, 2:7, 3:4])


def test_certainty() -> None:
    """The mean over the foreground alone; 0 without one."""
    pasted = torch.tensor([[[0.9, 0.7], [0.5, 0.1]], [[0.5, 0.2], [0.0, 0.4]]], dtype=torch.float64)
    assert foreground_certainty(pasted).tolist() == [pytest.approx(1.6 / 2.000001), 0]


@pytest.mark.parametrize("pixels", [None, 1, 250, 10**6])
def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch, pixels: int | None) -> None:
    """One by one around the boxes, or so many whole canvases at a time: the same masks and certainties."""
    maps, boxes = make_maps()
    if pixels is not None:
        monkeypatch.setattr(pasting, "PIXELS_AT_ONCE", pixels)
        monkeypatch.setattr(pasting, "uses_windows", lambda device: False)
    masks, certainty = paste_and_resize(maps, boxes, CANVAS, (8, 10), (13, 20))
    pasted = paste_probabilities(maps, boxes, (0, CANVAS[0]), (0, CANVAS[1]))
    torch.testing.assert_close(certainty, foreground_certainty(pasted))
    assert torch.equal(masks, resize_masks(pasted[:, :8, :10] > 0.5, 13, 20))
    assert masks.shape == (len(boxes), 13, 20) and masks[:3].flatten(1).any(1).all()


def test_no_masks() -> None:
    masks, certainty = paste_and_resize(torch.zeros(0, 4, 4), torch.zeros(0, 4), CANVAS, (8, 10), (13, 20))
    assert masks.shape == (0, 13, 20) and certainty.shape == (0,)


def test_masks_pasted_at_the_original_size_do_not_grow() -> None:
    """Pixel by pixel the slow formula at boxes scaled to the image; the certainty is still that of the canvas."""
    maps, boxes = make_maps(3)
    masks, certainty = paste_and_resize(maps, boxes[:3], CANVAS, (8, 10), (6, 15), export="paste")
    scaled = boxes[:3] * torch.tensor([1.5, 0.75, 1.5, 0.75])
    for index in range(3):
        for v in range(6):
            for u in range(15):
                assert masks[index, v, u] == (slow_paste(maps[index], scaled[index], u, v) > 0.5)
    grown, same = paste_and_resize(maps, boxes[:3], CANVAS, (8, 10), (6, 15))
    assert torch.equal(certainty, same) and 0 < masks.sum() < grown.sum()
