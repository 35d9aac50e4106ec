"""labelme's JSON files: one beside each photograph."""

import base64
import binascii
import io
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from querymask.common.data.annotations import AnnotationError, read_json
from querymask.common.data.conversion.source import Photo, Source, image_files, new_photo, read_mask

_CIRCLE_POINTS = 64


def is_labelme(folder: Path) -> bool:
    """JSON files with shapes."""
    return next((file for file in sorted(folder.rglob("*.json")) if _is_shapes(_content(file))), None) is not None


def read_labelme(folder: Path, class_name: str) -> Source:
    """Polygons, rectangles, circles and masks; shapes of one label and ``group_id`` are one object.

    Photographs are the files that ``imagePath`` names, from the place of the JSON file, or ``imageData`` in it. Those
    without a JSON file are not taken over: nobody has looked at them.
    """
    source = Source()
    seen: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*.json")):
        content = _content(file)
        if not _is_shapes(content):
            source.remarks.append(f"{file} has no shapes: it is none of labelme's files")
            continue
        photo = _photo(source, file, content)
        if photo is None:
            continue
        if photo.content is None and seen.setdefault(photo.file.resolve(), file) is not file:
            source.leave_out(file, f"its photograph is that of {seen[photo.file.resolve()]}, too")
            continue
        try:
            _add_objects(content["shapes"], photo)
        except ValueError as error:
            source.leave_out(file, str(error))
            continue
        source.photos.append(photo)
    without = [file for file in image_files(folder, deep=True) if file.resolve() not in seen]
    if without:
        source.remarks.append(f"{len(without)} photographs have no JSON file, the first {without[0]}: not taken over")
    source.classes = sorted({name for photo in source.photos for name, *_ in photo.objects})
    return source


def _content(file: Path) -> Any:
    try:
        return read_json(file, "a file of labelme")
    except AnnotationError:
        return None


def _is_shapes(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def _photo(source: Source, file: Path, content: dict[str, Any]) -> Photo | None:
    name = content.get("imagePath")
    path = file.parent / str(name).replace("\\", "/") if name else file.with_suffix("")
    if path.is_file():
        photo = new_photo(source, path)
    elif content.get("imageData"):
        try:
            data = base64.b64decode(content["imageData"], validate=True)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                ending = f".{str(image.format).lower()}"
        except (binascii.Error, TypeError, ValueError, OSError) as error:
            source.leave_out(file, f"'imageData' is no image ({error})")
            return None
        photo = Photo(file.with_name(PurePosixPath(path).stem + ending), (height, width), content=data)
    else:
        source.leave_out(file, f"there is no photograph {path}")
        return None
    stated = (content.get("imageHeight"), content.get("imageWidth"))
    if photo is not None and None not in stated and stated != photo.size:
        height, width = photo.size
        source.leave_out(file, f"it is for an image of {stated[1]}x{stated[0]}, {path.name} is {width}x{height}")
        return None
    return photo


def _add_objects(shapes: list[Any], photo: Photo) -> None:
    """One object a group of shapes: polygons where all are, or the union of masks."""
    groups: dict[Any, list[Any]] = {}
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise ValueError(f"shapes[{number}] has no label")
        try:
            outline = _outline(shape, photo)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"shapes[{number}], {shape['label']!r}: {error}") from None
        group = shape.get("group_id")
        key = number if group is None else (shape["label"], str(group))
        groups.setdefault(key, []).append((shape["label"], outline))
    for members in groups.values():
        outlines = [outline for _, outline in members]
        masks = [outline for outline in outlines if isinstance(outline, np.ndarray)]
        if not masks:
            photo.objects.append((members[0][0], outlines, False))
        elif len(masks) == len(outlines):
            photo.add_mask(members[0][0], np.any(masks, axis=0))
        else:
            raise ValueError(f"the shapes of one group, {members[0][0]!r}, are polygons and masks: draw all alike")


def _outline(shape: dict[str, Any], photo: Photo) -> list[float] | np.ndarray:
    """The polygon of a shape as x0, y0, x1, y1, ..., or its mask, bool [H, W]."""
    kind = shape.get("shape_type") or "polygon"
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if not all(map(math.isfinite, sum(points, ()))):
        raise ValueError("points must be numbers")
    if kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"{len(points)} points are no polygon")
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points if len(points) == 2 else (points[0], points[2])
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * i / _CIRCLE_POINTS for i in range(_CIRCLE_POINTS)]
        points = [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]
    elif kind == "mask":
        return _mask(shape, points, photo)
    else:
        raise ValueError(f"a {kind} has no area: draw a polygon, or take it out")
    return [value for point in points for value in point]


def _mask(shape: dict[str, Any], points: list[tuple[float, float]], photo: Photo) -> np.ndarray:
    """A mask of labelme: an image, of which ``points`` are the upper left and the lower right pixel."""
    part = read_mask(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) > 0
    if not part.any():
        raise ValueError("its mask is empty")
    x, y = (round(value) for value in points[0])
    mask = np.zeros(photo.size, dtype=bool)
    height, width = part.shape
    if x < 0 or y < 0 or x + width > mask.shape[1] or y + height > mask.shape[0]:
        raise ValueError("its mask reaches out of the image")
    mask[y : y + height, x : x + width] = part
    return mask
