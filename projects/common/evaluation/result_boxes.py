"""Whether the boxes of a result file are [x, y, width, height] in pixels, as COCO defines them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from querymask.common.data.annotations.findings import Findings

_OTHER_FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    # name: (boxes [N, 4], sides [N, 4]: width, height, width, height of the images) -> corners [N, 4]
    "[x0, y0, x1, y1]": lambda boxes, sides: boxes,
    "[centre x, centre y, width, height]": lambda boxes, sides: _from_centres(boxes),
    "parts of the image's width and height": lambda boxes, sides: _from_corner(boxes) * sides,
    "corners in parts of the image's width and height": lambda boxes, sides: boxes * sides,
    "[centre x, centre y, width, height] in parts of the image": lambda boxes, sides: _from_centres(boxes) * sides,
}


def check_boxes(
    results: Sequence[Mapping[str, Any]], images: Mapping[Any, Mapping[str, Any]], findings: Findings
) -> None:
    """Refuse boxes of another form. Their masks show it, else the borders of the images.

    A model may find masks and boxes that differ: another form counts only where boxes in that form are those of the
    masks, and better so than in COCO's.

    Args:
        results: with "bbox"; masks as compressed RLE.
        images: by id, with height and width.

    Raises:
        AnnotationError: naming the form and the first result.
    """
    if not results or "bbox" not in results[0]:
        return
    boxes = np.array([result["bbox"] for result in results], dtype=np.float64)
    sides = np.array([[images[result["image_id"]][key] for key in ("width", "height")] * 2 for result in results])
    if "segmentation" in results[0]:
        extents = _from_corner(np.array(mask_util.toBbox([dict(result["segmentation"]) for result in results])))
        used = np.flatnonzero((extents[:, 2:] > extents[:, :2]).all(axis=1))
        if not len(used):
            return
        boxes, sides, extents = boxes[used], sides[used], extents[used]
        usual = _overlaps(_from_corner(boxes), extents).mean()
        for name, corners in _OTHER_FORMS.items():
            fit = _overlaps(corners(boxes, sides), extents).mean()
            if fit > 0.7 and fit > usual + 0.05:
                findings.refuse(
                    f"result {used[0]}",
                    f"'bbox' {boxes[0].tolist()}, as most of the others, fits its mask as {name}, not as [x, y, width, "
                    f"height] (mean IoU {fit:.2f} and {usual:.2f})",
                    "Write boxes as [x, y, width, height] in pixels",
                )
        return
    if boxes.max() <= 1 and (boxes[:, 2:] > 0).any():
        findings.refuse(
            "result 0",
            f"'bbox' {boxes[0].tolist()} lies within the first pixel of the image, as all others do: they seem to be "
            "parts of its width and height",
            "Write boxes as [x, y, width, height] in pixels",
        )
    leaving = np.flatnonzero((_from_corner(boxes) > sides + 1).any(axis=1))
    if len(leaving) and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= sides + 1).all():
        findings.refuse(
            f"result {leaving[0]}",
            f"'bbox' {boxes[leaving[0]].tolist()} leaves the image as [x, y, width, height], and it and all others fit "
            "as [x0, y0, x1, y1]",
            "Write boxes as [x, y, width, height] in pixels",
        )


def _from_corner(boxes: np.ndarray) -> np.ndarray:
    """Corners of [x, y, width, height]."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _from_centres(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (corners [N, 4]), one by one; 0 where one is empty."""
    sides = np.clip(np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2]), 0, None)
    both = sides.prod(axis=1)
    areas = sum(np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (first, second))
    return both / np.maximum(areas - both, 1e-12)
