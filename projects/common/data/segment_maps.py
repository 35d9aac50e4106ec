"""Maps of segment ids of panoptic segmentation: PNG files whose pixels are R + 256 G + 65536 B; 0 is void."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np

from querymask.common.data.annotations import AnnotationError
from querymask.common.data.image_files import ImageFileError, read_image


def read_segment_map(path: str | os.PathLike, size: tuple[int, int], segments: Collection[int]) -> np.ndarray:
    """The ids of a PNG file, which must be those of the segments that are listed for it, and 0.

    Args:
        size: (height, width) of the image.
        segments: their ids.

    Returns:
        int32 [H, W].

    Raises:
        AnnotationError: naming the file, what is wrong, and the remedy.
    """
    try:
        pixels = read_image(path).astype(np.int32)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such PNG file of segments. Put it there.") from None
    except ImageFileError as error:
        raise AnnotationError(str(error)) from error
    ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    if ids.shape != tuple(size):
        raise AnnotationError(
            f"{path}: it has {ids.shape[1]}x{ids.shape[0]} pixels (width x height), its image {size[1]}x{size[0]}. "
            "Write the ids at the size of the image."
        )
    present = set(np.unique(ids).tolist()) - {0}
    if strangers := sorted(present - set(segments)):
        raise AnnotationError(
            f"{path}: it has pixels of {len(strangers)} ids that are none of its segments_info, the first "
            f"{strangers[0]}. Ids are R + 256 G + 65536 B: list the segments, or make the pixels 0."
        )
    if missing := sorted(set(segments) - present):
        raise AnnotationError(
            f"{path}: {len(missing)} segments of its segments_info, the first with id {missing[0]}, have no pixel in "
            "it. Take them out of the list."
        )
    return ids


def encode_segment_map(ids: np.ndarray) -> bytes:
    """The PNG file of ids, integers [H, W] from 0 to 2**24 - 1."""
    pixels = np.stack([ids >> 16, ids >> 8, ids], axis=-1) & 255  # OpenCV's order
    return cv2.imencode(".png", pixels.astype(np.uint8))[1].tobytes()


def entry_segment_map(entry: Mapping[str, Any]) -> np.ndarray:
    """``read_segment_map`` of a panoptic entry of a data set."""
    segments = [annotation["id"] for annotation in entry["annotations"]]
    return read_segment_map(entry["pan_seg_file_name"], (entry["height"], entry["width"]), segments)


def annotations_with_masks(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an entry; those of a panoptic one get the pixels of their segment, bool [H, W]."""
    if "pan_seg_file_name" not in entry:
        return entry["annotations"]
    ids = entry_segment_map(entry)
    return [{**annotation, "segmentation": ids == annotation["id"]} for annotation in entry["annotations"]]
