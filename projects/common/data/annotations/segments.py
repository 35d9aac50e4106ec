"""The segments of a panoptic image, checked."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from detectron2.structures import BoxMode

from querymask.common.data.annotations.findings import Findings, show
from querymask.common.data.annotations.images import ImageInfo, read_id
from querymask.common.data.annotations.objects import clean_object

MAX_SEGMENT_ID = 2**24 - 1
"""An id is R + 256 G + 65536 B of a pixel; 0 is void."""


def clean_segments(
    segments: Collection[Mapping[str, Any]],
    image: ImageInfo,
    categories: Collection[Mapping[str, Any]],
    findings: Findings,
) -> list[dict[str, Any]]:
    """The segments of an image, checked as annotations are; ``bbox`` is [x, y, width, height].

    Args:
        categories: with ``id``, ``name`` and ``isthing``.
    """
    known = {category["id"]: category for category in categories}
    cleaned, taken = [], set()
    stuff: Counter[str] = Counter()
    for number, segment in enumerate(segments):
        key, category_id = read_id(segment.get("id")), read_id(segment.get("category_id"))
        where = f"segment {number}, id {show(segment.get('id'))}, of {image.name}"
        if not isinstance(key, int) or not 0 < key <= MAX_SEGMENT_ID or key in taken:
            remedy = f"Give every segment of an image an id of its own, from 1 to {MAX_SEGMENT_ID}"
            findings.refuse(where, "its id is that of another" if key in taken else "it is no id of a segment", remedy)
        if category_id not in known:
            remedy = "Add the category, or remove the segment and make its pixels 0 in the PNG file"
            findings.refuse(where, f"'category_id' {show(category_id)} is none of the categories", remedy)
        taken.add(key)
        clean = clean_object(segment, image, where, findings)
        if clean is None:
            continue
        cleaned.append({**clean, "id": key, "category_id": category_id})
        if not known[category_id]["isthing"]:
            stuff[known[category_id]["name"]] += 1
    for name, count in stuff.items():
        if count > 1:
            findings.mend(
                "class of stuff with several segments in an image, of which a model finds one: give them one id",
                f"{name}, {count} segments, in {image.name}",
            )
    return cleaned


def clean_segment_records(
    segments: Any, image: ImageInfo, names: Collection[str], num_things: int, findings: Findings
) -> list[dict[str, Any]]:
    """Segments of a dictionary that a function has made, as annotations; classes are numbered from 0."""
    if not isinstance(segments, (list, tuple)) or not all(isinstance(segment, Mapping) for segment in segments):
        findings.refuse(image.name, f"'segments_info' is {show(segments)}", "Give a list of dictionaries")
    categories = [{"id": i, "name": str(name), "isthing": i < num_things} for i, name in enumerate(names)]
    clean = clean_segments(segments, image, categories, findings)
    return [{**s, "bbox_mode": BoxMode.XYWH_ABS, "isthing": s["category_id"] < num_things} for s in clean]
