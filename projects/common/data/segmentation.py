"""COCO's forms of segmentation as bitmasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of an image of ``height`` x ``width`` as uint8 [H, W] of zeros and ones.

    Args:
        segmentation: list of polygons (each x0, y0, x1, y1, ...; their union counts), COCO RLE dictionary, compressed
            or not, or bitmask (ndarray [H, W], non-zero inside).

    Raises:
        ValueError: another type, or a mask of another size than the image.
    """
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1).tolist() for polygon in segmentation]
        if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise ValueError(
                "a polygon must be a list of at least three pairs of coordinates. Correct or remove the annotation."
            )
        mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, height, width)))
    elif isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        mask = mask_util.decode(segmentation)
    elif isinstance(segmentation, np.ndarray):
        mask = np.ascontiguousarray(segmentation != 0).astype(np.uint8)
    else:
        raise ValueError(
            f"a segmentation is of type {type(segmentation).__name__}. Use a list of polygons, a COCO RLE dictionary "
            "or a NumPy array of the image's height and width."
        )
    if mask.shape != (height, width):
        raise ValueError(
            f"a mask has height and width {mask.shape}, the image {(height, width)}. Make the sizes in the annotation "
            "equal to the image's."
        )
    return mask


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
