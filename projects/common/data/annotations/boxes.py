"""Boxes of annotations: read, compared with the mask, and brought into the image."""

import math
from collections.abc import Sequence
from typing import Any

from querymask.common.data.annotations.findings import XYWH, XYXY

Box = tuple[float, float, float, float]


def clean_box(
    box: Any, mask_box: Box | None, area: float | None, height: int, width: int, from_corners: bool = False
) -> tuple[list[float], str | None]:
    """The box [x, y, width, height] of an annotation.

    Args:
        box: as it stands in the file.
        mask_box: extent (x0, y0, x1, y1) of the mask, not empty within the image; None if there is none. It shows what
            a box should be.
        area: as it stands in the file, None if there is none.
        height, width: of the image.
        from_corners: whether the box was corners, and was converted.

    Returns:
        the box, and what was mended.

    Raises:
        ValueError: there is no usable box, and no mask to take one from; or box and mask contradict each other.
    """
    numbers = read_box(box)
    if from_corners and numbers is not None:
        given = list(corners(numbers))
        if _is_right(corners(given), given, mask_box, area):
            return clean_box(given, mask_box, area, height, width)[0], XYWH
    inside = None if mask_box is None else clip_box(mask_box, height, width)
    if numbers is None or clip_box(corners(numbers), height, width) is None:
        if inside is None:
            problem = "is missing" if box is None else f"is {_show(box)}: it has no extent within the image"
            problem = problem if box is None or numbers else f"is {_show(box)}: it must be four numbers, {_FORM}"
            raise ValueError(f"'bbox' {problem}, and there is no mask. Give the box or remove the annotation")
        x0, y0, x1, y1 = inside
        why = "missing" if box is None else "no four numbers" if numbers is None else "empty or outside of the image"
        return [x0, y0, x1 - x0, y1 - y0], f"bbox {why}: that of the mask is taken"
    if not from_corners and _is_right(numbers, corners(numbers), mask_box, area):
        x0, y0, x1, y1 = numbers
        return [x0, y0, x1 - x0, y1 - y0], XYXY
    x0, y0, x1, y1 = corners(numbers)
    if mask_box is not None and not (x0 < mask_box[2] and mask_box[0] < x1 and y0 < mask_box[3] and mask_box[1] < y1):
        raise ValueError(
            f"'bbox' {_show(numbers)} and 'segmentation', from ({mask_box[0]:g}, {mask_box[1]:g}) to ({mask_box[2]:g}, "
            f"{mask_box[3]:g}), are in different places: are both in pixels of the image? bbox is {_FORM}. Correct one"
        )
    if max(-x0, -y0, x1 - width, y1 - height) <= 1:  # what rounding does
        return numbers, None
    if mask_box is None and may_be_xyxy(numbers, height, width):
        raise ValueError(
            f"'bbox' {_show(numbers)} leaves the image of {width} x {height} as {_FORM}, and fits as [x0, y0, x1, y1]. "
            f"Convert the boxes to {_FORM}"
        )
    x0, y0, x1, y1 = clip_box((x0, y0, x1, y1), height, width)
    if mask_box is not None and overlap((x0, y0, x1, y1), mask_box) < 0.5:
        raise ValueError(
            f"'bbox' {_show(numbers)} leaves the image of {width} x {height}, and 'segmentation', from "
            f"({mask_box[0]:g}, {mask_box[1]:g}) to ({mask_box[2]:g}, {mask_box[3]:g}), is elsewhere. bbox is {_FORM}. "
            "Correct one"
        )
    return [x0, y0, x1 - x0, y1 - y0], "bbox reaches out of the image, cut off at its border"


_FORM = "[x, y, width, height]"


def read_box(box: Any) -> list[float] | None:
    """Four finite numbers, None if it is anything else."""
    if not isinstance(box, (Sequence, tuple)) and not hasattr(box, "__array__") or isinstance(box, (str, dict)):
        return None
    try:
        numbers = [float(value) for value in box]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def corners(box: Sequence[float]) -> Box:
    """(x0, y0, x1, y1) of [x, y, width, height]."""
    x, y, width, height = box
    return x, y, x + width, y + height


def clip_box(corners: Box, height: int, width: int) -> Box | None:
    """The part within the image, None if it is empty."""
    x0, y0, x1, y1 = corners
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / (areas - width * height)


def _is_right(right: Box, wrong: Box, mask_box: Box | None, area: float | None) -> bool:
    """Whether the mask, or the area of a box without mask, says that the numbers mean one box and not the other."""
    if right[2] <= right[0] or right[3] <= right[1]:
        return False
    if mask_box is not None:
        first, second = (max(abs(a - b) for a, b in zip(box, mask_box)) for box in (right, wrong))
        return first <= 1 and first + 0.5 < second
    if area is None:
        return False
    first, second = (max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (right, wrong))
    return math.isclose(area, first, rel_tol=1e-6) and not math.isclose(area, second, rel_tol=1e-2)


def is_about(box: Box, other: Box, pixels: float = 1) -> bool:
    """Whether two boxes (x0, y0, x1, y1) differ by a pixel at most, as conventions of the last pixel do."""
    return max(abs(a - b) for a, b in zip(box, other)) <= pixels


def is_line(box: Sequence[float], height: int, width: int) -> bool:
    """Whether [x, y, width, height] has one side without extent and lies in the image."""
    x, y, w, h = box
    return min(w, h) == 0 < max(w, h) and x >= 0 and y >= 0 and x + w <= width + 1 and y + h <= height + 1


def may_be_xyxy(box: Sequence[float], height: int, width: int) -> bool:
    """Whether four numbers could be corners within the image."""
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= width + 1 and 0 <= y0 < y1 <= height + 1


def _show(numbers: Any) -> str:
    return repr(list(numbers)) if isinstance(numbers, (list, tuple)) else repr(numbers)[:60]
