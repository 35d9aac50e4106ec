"""One annotation, checked: whether it is a crowd, its mask, its box."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from querymask.common.data.annotations.boxes import (
    Box,
    clean_box,
    clip_box,
    corners,
    is_about,
    is_line,
    may_be_xyxy,
    overlap,
    read_box,
)
from querymask.common.data.annotations.findings import XYXY, Findings, show
from querymask.common.data.annotations.images import ImageInfo
from querymask.common.data.run_lengths import REST
from querymask.common.data.segmentation import Segmentation, UnusableMask, clean_segmentation, segmentation_box

_YES = {"1", "1.0", "true", "yes", "y", "t"}
_NO = {"0", "0.0", "false", "no", "n", "f", "", "none", "null"}
_CROWD_KEYS = ("iscrowd", "is_crowd", "isCrowd", "isCrowded", "crowd")
_IGNORE_KEYS = ("ignore", "ignored")


def clean_object(
    annotation: Mapping[str, Any], image: ImageInfo, where: str, findings: Findings, from_corners: bool = False
) -> dict[str, Any] | None:
    """An annotation in COCO's form, its other keys as they are.

    ``iscrowd`` is 0 or 1: crowd regions, regions to be ignored, and objects whose mask nobody can read, which are
    neither trained on nor counted in evaluation. ``bbox`` is [x, y, width, height]. ``segmentation`` is there where
    there is a mask, as polygons or compressed RLE; ``area`` where the file has a usable one.

    Args:
        from_corners: whether ``bbox`` was given as corners.

    Returns:
        None for an object that is but a line.

    Raises:
        AnnotationError: it can be neither used nor ignored.
    """
    clean = dict(annotation)
    clean["iscrowd"] = _flag(annotation, _CROWD_KEYS, where, findings)
    if _flag(annotation, _IGNORE_KEYS, where, findings) and not clean["iscrowd"]:
        clean["iscrowd"] = 1
        findings.mend("annotation to be ignored, taken as a crowd region: not trained on, not evaluated", where)
    segmentation, unusable = _segmentation(annotation, image, where, findings)
    extent = None if segmentation is None else segmentation_box(segmentation)
    if extent is not None and clip_box(extent, image.height, image.width) is None:
        numbers = read_box(annotation.get("bbox"))
        if numbers is not None and is_line(numbers, image.height, image.width):  # COCO's training set has some
            findings.mend("annotation whose box and mask are a line, left out", where)
            return None
        segmentation, extent, unusable = None, None, "'segmentation' has no pixel within the image"
    area = _area(annotation, where, findings)
    try:
        box, mended = clean_box(annotation.get("bbox"), extent, area, image.height, image.width, from_corners)
    except ValueError as error:
        problem, _, remedy = str(error).rpartition(". ")
        findings.refuse(where, problem if unusable is None else f"{problem} ({unusable})", remedy)
    converted, numbers = box, read_box(annotation.get("bbox"))
    ambiguous = mended == XYXY and extent is not None and is_about(corners(numbers), extent)
    if ambiguous:
        box = numbers
    elif mended:
        findings.mend(mended, where)
    if extent is None and area is None and may_be_xyxy(box, image.height, image.width):
        findings.note_undecided(where)
    if extent is not None:
        fit = corners(box)
        findings.count_fit(overlap(fit, extent) >= 0.5, is_about(fit, extent, 0.5))
    clean["bbox"] = box
    if ambiguous:
        findings.note_ambiguous(clean, converted, where)
    if area is not None and not _possible(area, box, extent, image):
        findings.mend("'area' that is not that of the object in pixels, computed anew", f"{where}: {area:g}")
        area = None
    if clean.get("keypoints") is not None and not _are_keypoints(clean["keypoints"]):
        wrong = clean.pop("keypoints")
        findings.mend("'keypoints' that are not x, y, visibility, ..., left out", f"{where}: {show(wrong)}")
    clean.pop("area", None)
    if area is not None:
        clean["area"] = area
    clean.pop("segmentation", None)
    if segmentation is not None:
        clean["segmentation"] = segmentation
    if unusable is not None:
        findings.mend(
            "mask that is unusable: the object is ignored, in training and in evaluation", f"{where}: {unusable}"
        )
        x0, y0, x1, y1 = corners(box)
        clean.update(iscrowd=1, segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]])
    return clean


def _flag(annotation: Mapping[str, Any], keys: tuple[str, ...], where: str, findings: Findings) -> int:
    """0 or 1 of a key in any spelling; 0 where it is missing."""
    for key in keys:
        if key not in annotation:
            continue
        value = annotation[key]
        if key != keys[0]:
            findings.mend(f"key {key!r}, read as {keys[0]!r}", where)
        if type(value) is int and value in (0, 1):
            return value
        if getattr(value, "shape", None) == ():  # of a NumPy or Torch array
            value = value.item()
        text = str(value).strip().lower()
        if text not in _YES | _NO or isinstance(value, (list, dict)):
            findings.refuse(where, f"{key!r} is {show(value)}", "Write 1 for a crowd region or 0")
        if not isinstance(value, bool):
            findings.mend(f"{key!r} that is neither 0 nor 1, read as such", f"{where}: {show(value)}")
        return int(text in _YES)
    return 0


def _segmentation(
    annotation: Mapping[str, Any], image: ImageInfo, where: str, findings: Findings
) -> tuple[Segmentation | None, str | None]:
    """The mask if there is one, and why it is unusable if so."""
    try:
        segmentation, mended = clean_segmentation(annotation.get("segmentation"), image.height, image.width)
    except UnusableMask as error:
        return None, str(error).rpartition(". ")[0]
    except ValueError as error:
        problem, _, remedy = str(error).rpartition(". ")
        findings.refuse(where, f"'segmentation': {problem}", remedy)
    for what in mended:
        findings.mend(what, where)
    if REST in mended and (box := read_box(annotation.get("bbox"))) is not None:
        extent = segmentation_box(segmentation)
        if max(overlap(corners(box), extent), overlap(box, extent)) < 0.5:  # XYWH or XYXY
            total, pixels = sum(annotation["segmentation"]["counts"]), image.height * image.width
            findings.refuse(
                where,
                f"the runs of 'counts' sum to {total:g}, the image has {pixels} pixels, and 'bbox' is not at the mask",
                "Encode the mask again",
            )
    return segmentation, None


def _area(annotation: Mapping[str, Any], where: str, findings: Findings) -> float | None:
    value = annotation.get("area")
    if value is None:
        return None
    try:
        area = float(value)
    except (TypeError, ValueError, OverflowError):
        area = math.nan
    if isinstance(value, (str, bool)) or not math.isfinite(area) or area < 0:
        findings.mend("'area' that is no number, computed anew", f"{where}: {show(value)}")
        return None
    return area


def _possible(area: float, box: Sequence[float], extent: Box | None, image: ImageInfo) -> bool:
    """Whether an object in this box (or mask's extent) may have so many pixels, by whatever convention.

    Those of large objects are neither 0 nor a part of the image from 0 to 1.
    """
    room = (box[2] + 2) * (box[3] + 2)
    if extent is not None:
        room = max(room, (extent[2] - extent[0] + 2) * (extent[3] - extent[1] + 2))
    if area >= 1:
        return area <= 1.5 * room
    return room < 100 or 1.5 * room < area * image.height * image.width


def _are_keypoints(keypoints: Any) -> bool:
    return (
        isinstance(keypoints, (list, tuple, np.ndarray))
        and len(keypoints) % 3 == 0
        and all(isinstance(v, (int, float, np.number)) and math.isfinite(v) for v in keypoints)
    )


def refuse_relative(boxes: list, findings: Findings) -> None:
    """Boxes in parts of the image would all lie within its first pixel."""
    if boxes and all(max(box) <= 1 for box in boxes):
        findings.refuse(
            f"all {len(boxes)} annotations",
            "their boxes lie within the first pixel of the image: they seem to be parts of its width and height",
            "Multiply x and width by the image's width, y and height by its height",
        )
