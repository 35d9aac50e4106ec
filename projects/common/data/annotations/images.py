"""Images and categories of an annotation file, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from querymask.common.data.annotations.findings import Findings, show

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageInfo:
    """What annotations need to know of their image; ``name`` is for messages."""

    name: str
    height: int
    width: int


def read_id(value: Any) -> int | str | None:
    """An id as a plain number or text, None if it is none; 7.0 is 7."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (int, float)) and getattr(value, "shape", None) == ():  # of a NumPy or Torch array
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    return int(value) if value == value and abs(value) < 2**63 and int(value) == value else None


def kind_of(ids: Sequence[int | str]) -> str:
    """How messages call the type of ids."""
    kinds = {type(i) for i in ids}
    return "of two types" if len(kinds) > 1 else "text" if str in kinds else "numbers"


def clean_categories(categories: Any, findings: Findings) -> list[dict[str, Any]]:
    """Categories with ids of one type, each once, and names of type str, in the order of their ids."""
    if not isinstance(categories, list) or not categories:
        findings.refuse(
            "key 'categories'",
            f"it must be a list of {{'id': ..., 'name': ...}}, not {show(categories)}",
            "Add the categories that the annotations use",
        )
    found: dict[int | str, dict[str, Any]] = {}
    for number, category in enumerate(categories):
        where = f"categories[{number}]"
        if not isinstance(category, Mapping):
            findings.refuse(where, f"it is no object but {show(category)}", "Write {'id': ..., 'name': ...}")
        key = read_id(category.get("id"))
        if key is None:
            findings.refuse(where, f"its 'id' is {show(category.get('id'))}", "Give every category an id of its own")
        name = category.get("name")
        if name is None:
            findings.mend("category without name, called by its id", f"{where}, id {show(key)}")
            name = f"class {key}"
        elif not isinstance(name, str):
            findings.mend("name of a category that is no text, taken as text", f"{where}, name {show(name)}")
            name = str(name)
        if key in found:
            if found[key]["name"] != name:
                findings.refuse(
                    where,
                    f"'id' {show(key)} is that of {found[key]['name']!r} and of {name!r}",
                    "Give every category an id of its own",
                )
            findings.mend("category that is listed twice, taken once", f"{where}, id {show(key)}")
            continue
        found[key] = {**category, "id": key, "name": name}
    if kind_of(list(found)) == "of two types":
        findings.refuse("key 'categories'", "ids are numbers and texts", "Give all of them one type")
    names = [category["name"] for category in found.values()]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            findings.mend("name of several categories, which stay different classes", show(name))
    return [found[key] for key in sorted(found)]


def clean_images(
    images: Any, findings: Findings, find_size: Callable[[Mapping[str, Any]], Size | None]
) -> list[dict[str, Any]]:
    """Images with ids of one type, each once, with sizes, in the order of their ids.

    Args:
        find_size: height and width of an image that has none in the file, None if they are not to be found.
    """
    if not isinstance(images, list):
        findings.refuse("key 'images'", f"it must be a list of images, not {show(images)}", "Give an annotation file")
    found: dict[int | str, dict[str, Any]] = {}
    names: set[str] = set()
    for number, image in enumerate(images):
        if not isinstance(image, Mapping):
            findings.refuse(
                f"images[{number}]", f"it is no object but {show(image)}", "Write {'id': ..., 'file_name': ...}"
            )
        name = _file_name(image)
        where = f"images[{number}]" if name is None else f"images[{number}], {name}"
        key = read_id(image.get("id"))
        if key is None:
            findings.refuse(where, f"its 'id' is {show(image.get('id'))}", "Give every image an id of its own")
        if key in found:
            if _file_name(found[key]) != name:
                findings.refuse(
                    where,
                    f"'id' {show(key)} is that of {_file_name(found[key])}, too",
                    "Give every image an id of its own",
                )
            if _size(image, where, findings, find_size) != (found[key]["height"], found[key]["width"]):
                findings.refuse(where, f"'id' {show(key)} is there before with another height and width", "Keep one")
            findings.mend("image that is listed twice with one id, taken once", where)
            continue
        if name is not None and name in names:
            findings.mend(
                "image that is listed again with another id; objects of one entry are missing in the other", where
            )
        height, width = _size(image, where, findings, find_size)
        found[key] = {**image, "id": key, "height": height, "width": width}
        if name is not None:
            names.add(name)
            found[key]["file_name"] = name
    if kind_of(list(found)) == "of two types":
        findings.refuse("key 'images'", "ids are numbers and texts", "Give all of them one type")
    return [found[key] for key in sorted(found)]


def _file_name(image: Mapping[str, Any]) -> str | None:
    name = image.get("file_name")
    if isinstance(name, str) and name:
        return name
    url = image.get("coco_url")  # LVIS has addresses: the last two parts are folder and file
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) and url else None


def _size(
    image: Mapping[str, Any],
    where: str,
    findings: Findings,
    find_size: Callable[[Mapping[str, Any]], Size | None],
) -> Size:
    sides = [_side(image.get(key)) for key in ("height", "width")]
    if None not in sides:
        if sides[0] * sides[1] >= 2**31 or max(sides) >= 2**24:
            findings.refuse(
                where,
                f"height and width are {sides[0]} and {sides[1]}, and COCO's run lengths hold 2 billion pixels",
                "Correct them, or cut the image into tiles",
            )
        if any(not isinstance(image[key], int) for key in ("height", "width")):
            findings.mend("height or width that is no integer, taken as one", where)
        return sides[0], sides[1]
    size = find_size(image)
    if size is None:
        given = {key: image.get(key) for key in ("height", "width")}
        findings.refuse(
            where,
            f"height and width are {show(given['height'])} and {show(given['width'])}",
            "Give them, in pixels, as positive integers",
        )
    findings.mend("height or width missing, taken from the file or its masks", where)
    return size


def _side(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    key = read_id(value)
    return key if isinstance(key, int) and key > 0 else None


def file_size(path: Path) -> Size | None:
    """Height and width as the mapper reads the image (after its EXIF rotation), None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(274, 1) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (width, height) if rotated else (height, width)
