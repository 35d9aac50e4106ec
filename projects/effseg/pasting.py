"""From the square masks of regions to masks of the image, and how sure their pixels are.

Letters: n regions, S side of a mask; the canvas is the padded image.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from querymask.common.masks import box_windows, paste_by_products, paste_probabilities, resize_masks, uses_windows
from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision
from querymask.common.transfer import numbers_to_device

THRESHOLD = 0.5
"""Foreground is what exceeds it."""
EXPORTS = ("any", "paste")
"""How a mask of the original image comes about: from the canvas's binary mask, where any positive bilinear weight on
foreground makes foreground (release), or from the probabilities, pasted anew (as Detectron2 does)."""
PIXELS_AT_ONCE = 2**25
"""Of all canvases that are held at a time."""


def foreground_certainty(pasted: Tensor) -> Tensor:
    """(n,) mean probability of the foreground of pasted masks (n, H, W); 0 where there is none."""
    foreground = pasted > THRESHOLD
    return (pasted * foreground).sum((1, 2)) / (foreground.sum((1, 2)) + 1e-6)


def _paste_whole(
    maps: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    image_size: tuple[int, int],
    size: tuple[int, int],
    export: str = "any",
) -> tuple[Tensor, Tensor]:
    maps, boxes = full_precision(maps), full_precision(boxes)
    pasted = paste_by_products(maps, boxes, *canvas)
    if export == "paste":
        scale = torch.tensor([size[1] / image_size[1], size[0] / image_size[0]] * 2, dtype=boxes.dtype)
        masks = paste_by_products(maps, boxes * scale, *size) > THRESHOLD
    else:
        masks = resize_masks(pasted[:, : image_size[0], : image_size[1]] > THRESHOLD, *size)
    return masks, foreground_certainty(pasted)


@exportable(_paste_whole)
def paste_and_resize(
    maps: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    image_size: tuple[int, int],
    size: tuple[int, int],
    export: str = "any",
) -> tuple[Tensor, Tensor]:
    """Masks of the image as it was before it was resized and padded, in parts that bound the memory.

    Args:
        maps: (n, S, S) probabilities.
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the canvas.
        canvas: height and width of the padded image.
        image_size: those of the image without padding.
        size: those of the result.
        export: one of ``EXPORTS``.

    Returns:
        (n, *size) bool, and the certainty (n,) of the foreground on the whole canvas.
    """
    maps, boxes = full_precision(maps), full_precision(boxes)
    masks = torch.zeros(len(maps), *size, dtype=torch.bool, device=maps.device)
    certainty = maps.new_zeros(len(maps))
    for part, rows, columns in _parts(boxes, canvas):
        pasted = paste_probabilities(maps[part], boxes[part].to(maps.dtype), rows, columns)
        certainty[part] = foreground_certainty(pasted)
        if export == "paste":
            continue
        binary = torch.zeros(len(pasted), *canvas, dtype=torch.bool, device=maps.device)
        binary[:, slice(*rows), slice(*columns)] = pasted > THRESHOLD
        masks[part] = resize_masks(binary[:, : image_size[0], : image_size[1]], *size)
    if export == "paste":
        scale = [size[1] / image_size[1], size[0] / image_size[0]] * 2
        boxes = boxes * numbers_to_device(scale, boxes.dtype, boxes.device)
        for part, rows, columns in _parts(boxes, size):
            pasted = paste_probabilities(maps[part], boxes[part].to(maps.dtype), rows, columns)
            masks[part, slice(*rows), slice(*columns)] = pasted > THRESHOLD
    return masks, certainty


def _parts(boxes: Tensor, canvas: tuple[int, int]) -> Iterator[tuple[slice, tuple[int, int], tuple[int, int]]]:
    """Regions that are pasted together, with the rows and columns that they need.

    On a GPU they are many and have the whole canvas, on a CPU each is alone and has the surroundings of its box.
    """
    height, width = canvas
    if not uses_windows(boxes.device):
        count = max(1, PIXELS_AT_ONCE // (height * width))
        for first in range(0, len(boxes), count):
            yield slice(first, first + count), (0, height), (0, width)
        return
    for index, (rows, columns) in enumerate(box_windows(boxes, canvas)):
        yield slice(index, index + 1), rows, columns
