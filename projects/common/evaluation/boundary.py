"""Boundary AP: how well the outlines of masks fit (Cheng et al. 2021, "Boundary IoU").

The boundary of a mask is what an erosion by d pixels takes away from it, where d is 2 % of the image's diagonal and
what lies beyond the image counts as background. The IoU of two masks is replaced by the smaller one of their own and
their boundaries'; everything else is COCO's evaluation.
"""

import math
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DILATION_RATIO = 0.02
"""Width of the boundary in parts of the image's diagonal."""


def boundary_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """Pixels that the erosion takes from each side, for an image of this size; at least 1."""
    return max(1, round(ratio * math.sqrt(height**2 + width**2)))


def mask_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a mask that are within ``distance`` (in both axes) of its outside or of the image's border.

    Equals the mask minus its erosion by a 3x3 square, ``distance`` times, with a border of zeros around the image.

    Args:
        mask: uint8 [H, W] of zeros and ones.
        distance: pixels, as ``boundary_width`` gives them.

    Returns:
        uint8 [H, W].
    """
    boundary = mask.copy(order="K")
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask))
    if min(w, h) <= 2 * distance:  # nothing is so far inside
        return boundary
    window = np.s_[y : y + h, x : x + w]
    # Zeros around the box are the mask's outside or the image's; OpenCV's own border beyond them takes nothing away
    padded = cv2.copyMakeBorder(mask[window], 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    boundary[window] -= cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return boundary


def rle_boundary(rle: dict[str, Any], ratio: float = DILATION_RATIO) -> dict[str, Any]:
    """``mask_boundary`` of a compressed RLE of the whole image, as such."""
    distance = boundary_width(*rle["size"], ratio)
    if min(mask_util.toBbox(rle)[2:]) <= 2 * distance:  # as in mask_boundary, without decoding
        return rle
    return mask_util.encode(np.asfortranarray(mask_boundary(mask_util.decode(rle), distance)))


class BoundaryEval(COCOeval):
    """COCO's evaluation of masks with the smaller one of mask IoU and boundary IoU.

    Boundaries are made only where the mask IoU reaches the lowest threshold: below it the smaller one cannot match,
    whatever the boundaries are. There ``ious`` hold the mask IoU alone.
    """

    def __init__(self, truth: COCO, detections: COCO, dilation_ratio: float = DILATION_RATIO) -> None:
        super().__init__(truth, detections, "segm")
        self.dilation_ratio = dilation_ratio

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """(detections by descending score, ground truth) of a class in an image; an empty list if either lacks."""
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        candidates = ious >= self.params.iouThrs.min()
        rows, columns = candidates.any(axis=1).nonzero()[0], candidates.any(axis=0).nonzero()[0]
        if not len(rows):
            return ious
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-detection["score"] for detection in found], kind="mergesort")
        boundaries = mask_util.iou(
            [rle_boundary(found[order[row]]["segmentation"], self.dilation_ratio) for row in rows],
            [rle_boundary(truth[column]["segmentation"], self.dilation_ratio) for column in columns],
            [int(truth[column]["iscrowd"]) for column in columns],
        )
        chosen = np.ix_(rows, columns)
        ious[chosen] = np.minimum(ious[chosen], boundaries)
        return ious
