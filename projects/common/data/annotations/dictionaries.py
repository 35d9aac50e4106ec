"""Registered data sets in Detectron2's form, checked like files, whoever has made them."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from querymask.common.data.annotations.findings import Findings, show
from querymask.common.data.annotations.images import ImageInfo, file_size, kind_of, read_id
from querymask.common.data.annotations.objects import clean_object, refuse_relative
from querymask.common.data.annotations.segments import clean_segment_records

_MOST_CLASSES = 100_000
"""Of a data set without names of its classes."""


class CheckedEntries(list):
    """Dictionaries of a data set that have been checked already."""


def read_dataset(name: str) -> list[dict[str, Any]]:
    """The dictionaries of a registered data set, checked like a file, whoever has made them.

    Boxes that were mended are [x, y, width, height] (``BoxMode.XYWH_ABS``); masks that were arrays are RLE.

    Raises:
        KeyError: there is no such data set.
        AnnotationError: naming data set, thing, key and remedy.
    """
    if name not in DatasetCatalog:
        raise KeyError(f"there is no data set {name!r}; registered are {', '.join(sorted(DatasetCatalog.keys()))}")
    entries = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    num_things = len(metadata.get("thing_dataset_id_to_contiguous_id") or ())
    return clean_entries(entries, f"data set {name}", metadata.get("thing_classes"), num_things)


def clean_entries(
    entries: Any, source: str, class_names: Iterable[str] | None = None, num_things: int = 0
) -> list[dict[str, Any]]:
    """``read_dataset`` of what is read already; ``entries`` stay as they are.

    Args:
        class_names: None where they are not known.
        num_things: of a panoptic data set, whose first classes they are; the others are stuff.
    """
    if isinstance(entries, CheckedEntries):
        return entries
    findings = Findings(source)
    if isinstance(class_names, (str, Mapping)):
        findings.refuse("the metadata", f"thing_classes is {show(class_names)}", "Give a list of names")
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        findings.refuse("what its function returns", f"it is {show(entries)}", "Return a list of dictionaries")
    count = None if class_names is None else len(list(class_names))
    ids: Counter[int | str] = Counter()
    cleaned = CheckedEntries()
    for number, entry in enumerate(entries):
        name = entry.get("file_name")
        where = f"entry {number}, {name}"
        if not isinstance(name, (str, os.PathLike)) or not str(name):
            findings.refuse(f"entry {number}", f"its 'file_name' is {show(name)}", "Give the path of the image")
        clean = {**entry, "file_name": str(name)}
        if entry.get("image_id") is None:
            findings.mend("entry without 'image_id', which gets its place in the list", where)
            clean["image_id"] = number
        else:
            clean["image_id"] = read_id(entry["image_id"])
            if clean["image_id"] is None:
                findings.refuse(where, f"'image_id' is {show(entry['image_id'])}", "Give a number or a text")
        ids[clean["image_id"]] += 1
        if ids[clean["image_id"]] > 1:
            findings.refuse(
                where, f"'image_id' {show(clean['image_id'])} is that of another entry, too", "Give each its own"
            )
        size = [read_id(entry.get(key)) for key in ("height", "width")]
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = file_size(Path(clean["file_name"]))
            if size is None:
                findings.refuse(
                    where,
                    f"height and width are {show(entry.get('height'))} and {show(entry.get('width'))}",
                    "Give them, in pixels, as positive integers",
                )
            findings.mend("height or width missing, taken from the file", where)
        clean["height"], clean["width"] = size
        info = ImageInfo(str(name), *size)
        if "pan_seg_file_name" in entry:
            records = clean_segment_records(entry.get("segments_info"), info, class_names or (), num_things, findings)
            clean["annotations"] = clean["segments_info"] = records
        elif entry.get("annotations") is not None:
            clean["annotations"] = _clean_records(entry["annotations"], info, count, findings)
        else:
            clean.pop("annotations", None)
        cleaned.append(clean)
    if ids and kind_of(list(ids)) == "of two types":
        findings.refuse("key 'image_id'", "ids are numbers and texts", "Give all of them one type")
    refuse_relative(
        [
            BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
            for entry in cleaned
            for a in entry.get("annotations", ())
        ],
        findings,
    )
    findings.refuse_misfits()
    findings.log()
    return cleaned


def _clean_records(annotations: Any, image: ImageInfo, num_classes: int | None, findings: Findings) -> list[dict]:
    """The annotations of an entry in Detectron2's form."""
    if not isinstance(annotations, (list, tuple)):
        findings.refuse(image.name, f"'annotations' is {show(annotations)}", "Give a list")
    records = []
    for number, annotation in enumerate(annotations):
        where = f"annotation {number} of {image.name}"
        if not isinstance(annotation, Mapping):
            findings.refuse(where, f"it is {show(annotation)}", "Give a dictionary")
        category = read_id(annotation.get("category_id"))
        if not isinstance(category, int) or not 0 <= category < (_MOST_CLASSES if num_classes is None else num_classes):
            known = "0, 1, ..." if num_classes is None else f"0 to {num_classes - 1}"
            findings.refuse(
                where,
                f"'category_id' is {show(annotation.get('category_id'))}, the classes are {known}",
                "Number them from 0 on, in the order of the metadata's thing_classes",
            )
        clean = clean_record(annotation, image, where, findings)
        if clean is not None:
            clean["category_id"] = category
            records.append(clean)
    return records


def clean_record(
    annotation: Mapping[str, Any], image: ImageInfo, where: str, findings: Findings
) -> dict[str, Any] | None:
    """An annotation in Detectron2's form by ``clean_object``; a box that is fine stays as it is written."""
    box = _absolute_box(annotation, image, where, findings)
    from_corners = annotation.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL)
    clean = clean_object({**annotation, "bbox": box}, image, where, findings, from_corners)
    if clean is None:
        return None
    absolute = annotation.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    if absolute and box is not None and clean["bbox"] == list(box):
        clean["bbox"] = annotation["bbox"]
    else:
        clean["bbox_mode"] = BoxMode.XYWH_ABS
    return clean


def _absolute_box(annotation: Mapping[str, Any], image: ImageInfo, where: str, findings: Findings) -> list | None:
    """[x, y, width, height] in pixels of any ``bbox_mode``; what is no box stays as it is."""
    box = annotation.get("bbox")
    if box is None:
        return None
    try:
        mode = BoxMode(annotation["bbox_mode"])
        if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYXY_REL, BoxMode.XYWH_REL):
            raise ValueError(mode)
    except (KeyError, ValueError, TypeError):
        findings.refuse(
            where,
            f"'bbox_mode' is {show(annotation.get('bbox_mode'))}",
            "Give BoxMode.XYXY_ABS or BoxMode.XYWH_ABS, whatever the box is",
        )
    try:
        numbers = [float(value) for value in box]
    except (TypeError, ValueError, OverflowError):
        return box
    if len(numbers) != 4:
        return box
    if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
        numbers = [v * side for v, side in zip(numbers, (image.width, image.height) * 2)]
    if mode in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        numbers[2:] = numbers[2] - numbers[0], numbers[3] - numbers[1]
    return numbers
