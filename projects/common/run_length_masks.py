"""Masks of a large image as COCO's run lengths, where (n, H, W) would take gigabytes."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util

from querymask.common.data.run_lengths import read_counts
from querymask.common.data.segmentation import as_text

RunLengths = dict[str, Any]
"""COCO's compressed RLE, with counts as bytes."""


class RunLengthMasks:
    """The field ``pred_masks`` of the detections in a large image; indexed as a tensor.

    Args:
        size: height and width of the image.
        lengths: of each mask.
    """

    def __init__(self, size: tuple[int, int], lengths: Sequence[RunLengths]) -> None:
        self.size = size
        self.lengths = list(lengths)

    @classmethod
    def place(cls, masks: torch.Tensor, x: int, y: int, size: tuple[int, int]) -> "RunLengthMasks":
        """Masks of a part of an image in the image.

        Args:
            masks: (n, h, w) bool on the host.
            x, y: where the part begins.
            size: height and width of the image.
        """
        return cls(size, [_place(mask, x, y, size) for mask in masks.numpy()])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> "RunLengthMasks":
        chosen = np.arange(len(self))[index if isinstance(index, slice) else np.atleast_1d(index)]
        return RunLengthMasks(self.size, [self.lengths[i] for i in chosen])

    def boxes(self) -> np.ndarray:
        """(n, 4) XYXY of the masks' pixels, of no area where a mask is empty."""
        boxes = np.asarray(mask_util.toBbox(self.lengths) if self.lengths else (), dtype=np.float64).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)

    def texts(self) -> list[dict[str, Any]]:
        """The run lengths with counts as text, as JSON takes them."""
        return [as_text(rle) for rle in self.lengths]

    def decode(self, number: int) -> np.ndarray:
        """One mask, uint8 [H, W]."""
        return mask_util.decode(self.lengths[number])

    def resize(self, height: int, width: int) -> "RunLengthMasks":
        """The masks in a smaller image: the pixels of which they cover half, and none that are not empty vanishes."""
        scale = np.array([width / self.size[1], height / self.size[0]] * 2)
        limit = np.array([width, height])
        lengths = []
        for rle, box in zip(self.lengths, self.boxes().astype(int), strict=True):
            part = np.zeros((1, 1), bool)
            low = np.minimum(np.round(box[:2] * scale[:2]).astype(int), limit - 1)
            if box[2] > box[0]:
                sides = np.maximum(np.round(box[2:] * scale[2:]).astype(int) - low, 1)
                mask = _columns(rle, box[0], box[2])[box[1] : box[3]]
                coverage = cv2.resize(mask * np.uint8(255), sides.tolist(), interpolation=cv2.INTER_AREA)
                part = coverage >= min(128, coverage.max())
            lengths.append(_place(part, *low, (height, width)))
        return RunLengthMasks((height, width), lengths)


def _place(mask: np.ndarray, x: int, y: int, size: tuple[int, int]) -> RunLengths:
    """The run lengths of an image of zeros with a bool mask at (x, y), of which only its own columns are encoded."""
    height, width = size
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return _compress([height * width], size)
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    strip = np.zeros((height, right - left), np.uint8, order="F")
    strip[y + top : y + bottom] = mask[top:bottom, left:right]
    runs = read_counts(mask_util.encode(strip)["counts"]).tolist()
    runs[0] += int(x + left) * height
    rest = int(width - x - right) * height
    if len(runs) % 2:
        runs[-1] += rest
    elif rest:
        runs.append(rest)
    return _compress(runs, size)


def _columns(rle: RunLengths, left: int, right: int) -> np.ndarray:
    """uint8 [H, right - left]: the columns, beyond which there is no foreground."""
    height, width = rle["size"]
    runs = read_counts(rle["counts"]).tolist()
    runs[0] -= int(left) * height
    if len(runs) % 2:
        runs[-1] -= int(width - right) * height
    if runs[-1] == 0:
        runs.pop()
    return mask_util.decode(_compress(runs, (height, int(right - left))))


def _compress(runs: list[int], size: tuple[int, int]) -> RunLengths:
    return mask_util.frPyObjects({"size": list(size), "counts": runs}, *size)
