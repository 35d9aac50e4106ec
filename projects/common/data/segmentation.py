"""COCO's forms of segmentation: brought into a safe form, and as bitmasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from querymask.common.data.run_lengths import check_rle

Segmentation = list[list[float]] | dict[str, Any]
"""Polygons (x0, y0, x1, y1, ... each; their union counts), or compressed RLE with counts of type str."""

FAR = 10
"""Coordinates of polygons may lie outside of the image by so many of its sides."""


class UnusableMask(ValueError):
    """Polygons that enclose nothing or cannot be read: the object is there, but nobody can say where its pixels are."""


def clean_segmentation(segmentation: Any, height: int, width: int) -> tuple[Segmentation | None, list[str]]:
    """A segmentation in a form that pycocotools can work with.

    Args:
        segmentation: polygons as lists, tuples or arrays; one polygon that is in no list; polygons of (x, y) pairs;
            COCO RLE dictionary, compressed or not; bitmask (array [H, W], non-zero inside).
        height, width: of the image.

    Returns:
        polygons or RLE, None if there is none (null, [], [[]]); and what was mended.

    Raises:
        UnusableMask: no polygon has three points, an odd number of coordinates, coordinates that are no finite numbers
            or are far outside.
        ValueError: a mask or RLE of another size than the image, run lengths that do not fill it, another type.
    """
    if segmentation is None:
        return None, []
    if isinstance(segmentation, Mapping):
        return check_rle(segmentation, height, width) if segmentation else (None, [])
    if hasattr(segmentation, "__array__"):
        array = np.asarray(segmentation)
        if array.ndim > 2:  # [H, W, 1], or a contour of OpenCV, [N, 1, 2]
            array = array.squeeze()
        if array.ndim > 2:
            raise ValueError(
                f"a mask has shape {array.shape}: it must be one of height and width. Give each annotation its own"
            )
        if array.ndim == 2 and array.dtype.kind in "biuf" and (array.shape == (height, width) or min(array.shape) > 2):
            return _encode(array, height, width), []
        segmentation = array.tolist()
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(
            f"a segmentation is of type {type(segmentation).__name__}. Use a list of polygons, a COCO RLE dictionary "
            "or a NumPy array of the image's height and width"
        )
    return _clean_polygons(segmentation, height, width)


def segmentation_box(segmentation: Segmentation) -> tuple[float, float, float, float]:
    """Extent (x0, y0, x1, y1) of a clean segmentation; of no area if it is empty."""
    if isinstance(segmentation, dict):
        x, y, width, height = mask_util.toBbox(segmentation).tolist()
        return x, y, x + width, y + height
    xs, ys = [polygon[0::2] for polygon in segmentation], [polygon[1::2] for polygon in segmentation]
    return min(map(min, xs)), min(map(min, ys)), max(map(max, xs)), max(map(max, ys))


def encode_segmentation(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """A clean segmentation as compressed RLE."""
    if isinstance(segmentation, dict):
        return segmentation
    return as_text(mask_util.merge(mask_util.frPyObjects(segmentation, height, width)))


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of an image of ``height`` x ``width`` as uint8 [H, W] of zeros and ones.

    Args:
        segmentation: as ``clean_segmentation`` takes it.

    Raises:
        ValueError: as there, or there is none.
    """
    if isinstance(segmentation, np.ndarray) and segmentation.shape == (height, width):
        return np.ascontiguousarray(segmentation != 0).astype(np.uint8)
    clean, _ = clean_segmentation(segmentation, height, width)
    if clean is None:
        raise UnusableMask("a segmentation is empty. Correct or remove the annotation")
    columns = mask_util.decode(encode_segmentation(clean, height, width)).T
    return cv2.transpose(columns)  # 20 times as fast as NumPy's, and transforms need rows


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (n, H, W) bool as compressed RLE; fastest where they lie column by column, as run lengths are counted."""
    columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    return [as_text(rle) for rle in mask_util.encode(columns.transpose(2, 1, 0))] if len(masks) else []


def crop_polygons(polygons: Sequence[Sequence[float]], box: Sequence[float], size: int) -> np.ndarray:
    """The part of an instance inside a box, as a square mask: vertices are moved and scaled, then rasterised.

    Args:
        polygons: each x0, y0, x1, y1, ... in pixels; their union counts.
        box: XYXY in the same pixels. Sides below 0.1 count as 0.1.
        size: side of the result.

    Returns:
        bool [size, size].
    """
    origin = np.asarray(box[:2], dtype=np.float64)
    scale = size / np.maximum(np.asarray(box[2:], dtype=np.float64) - origin, 0.1)
    moved = [((np.asarray(p, dtype=np.float64).reshape(-1, 2) - origin) * scale).reshape(-1).tolist() for p in polygons]
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(moved, size, size))).astype(bool)


def _encode(array: np.ndarray, height: int, width: int) -> dict[str, Any]:
    if array.shape != (height, width):
        raise ValueError(
            f"a mask has height and width {array.shape}, the image {(height, width)}. Make the sizes in the annotation "
            "equal to the image's"
        )
    return as_text(mask_util.encode(np.asfortranarray(array != 0, dtype=np.uint8)))


def as_text(rle: dict[str, Any]) -> dict[str, Any]:
    """With counts that JSON can hold."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _clean_polygons(parts: Sequence[Any], height: int, width: int) -> tuple[list[list[float]] | None, list[str]]:
    mended = []
    if len(parts) == 1 and isinstance(parts[0], Mapping) and "counts" in parts[0]:
        return check_rle(parts[0], height, width)
    if len(parts) == height and all(_is_list(part) and len(part) == width for part in parts):
        array = np.asarray(parts)
        if array.dtype.kind in "biuf" and ((array == 0) | (array == 1)).all():
            return _encode(array, height, width), []
    if parts and not any(_is_list(part) for part in parts):
        parts = [parts]
        mended.append("a polygon that is not in a list of polygons")
    elif len(parts) > 2 and all(_is_list(part) and len(part) == 2 and not _is_list(part[0]) for part in parts):
        parts = [parts]
        mended.append("a polygon of (x, y) pairs that is not in a list of polygons")
    polygons, short = [], False
    for part in parts:
        polygon = _numbers(part, height, width)
        if len(polygon) >= 6:
            polygons.append(polygon)
        short |= 0 < len(polygon) < 6
    if polygons and short:  # a line or a point has no pixels
        mended.append("a polygon of less than three points beside others, left out")
    elif short:
        raise UnusableMask("a polygon must be a list of at least three pairs of coordinates. Correct the annotation")
    return polygons or None, mended


def _numbers(part: Any, height: int, width: int) -> list[float]:
    """One polygon as a flat list of plain numbers."""
    part = _flat(part)
    polygon = part
    try:
        if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
            polygon = [_number(v) for value in part for v in (value if _is_list(value) else (value,))]
        total = float(sum(map(abs, polygon)))
    except (TypeError, ValueError, OverflowError):
        raise UnusableMask(f"a polygon has coordinates that are no numbers: {str(part)[:60]}. Correct it") from None
    if len(polygon) % 2:
        raise UnusableMask(
            f"a polygon has {len(polygon)} numbers: it must be a list of at least three pairs of coordinates. Correct "
            "the annotation"
        )
    if not polygon:
        return []
    if not math.isfinite(total):
        raise UnusableMask("a polygon has coordinates that are not finite. Correct the annotation")
    x0, x1, y0, y1 = min(polygon[0::2]), max(polygon[0::2]), min(polygon[1::2]), max(polygon[1::2])
    reach_x, reach_y = FAR * width, FAR * height
    if x0 < -reach_x or x1 > width + reach_x or y0 < -reach_y or y1 > height + reach_y:
        raise UnusableMask(
            f"a polygon from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) is far outside of the image of {width} x {height}. "
            "Correct the annotation"
        )
    return polygon


def _flat(part: Any) -> Any:
    """A polygon that is nested deeper, as pairs where it is but one: of OpenCV [N, 1, 2], of GeoJSON [1, N, 2]."""
    if hasattr(part, "__array__"):
        return np.asarray(part).squeeze().tolist()
    if isinstance(part, (list, tuple)) and part and _is_list(part[0]) and len(part[0]) and _is_list(part[0][0]):
        try:
            points = np.asarray(part, dtype=np.float64).squeeze()
        except (TypeError, ValueError, OverflowError):  # rings of different lengths, no numbers
            return part
        return points.tolist() if points.ndim == 2 and points.shape[1] == 2 else part
    return part


def _number(value: Any) -> float:
    if isinstance(value, bool) or isinstance(value, str) and not value.strip():
        raise TypeError
    return float(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or hasattr(value, "__array__") and np.ndim(value) > 0
