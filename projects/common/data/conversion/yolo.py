"""YOLO's segmentation format: a text file a photograph, a polygon a line, names in data.yaml."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from querymask.common.data.annotations.images import Size
from querymask.common.data.conversion.source import Source, image_files, new_photo

_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def is_yolo(folder: Path) -> bool:
    """A YAML file with ``names``, or text files in labels/."""
    return _description(folder)[0] is not None or next(folder.glob("**/labels/**/*.txt"), None) is not None


def read_yolo(folder: Path, class_name: str) -> Source:
    """Photographs in a folder images/ and, at the same place below labels/, lines ``CLASS X1 Y1 X2 Y2 ...``, 0 to 1.

    A photograph without a text file has no objects. Classes that have no name become ``CLASS_NAME NUMBER``. Parts are
    those of data.yaml, or folders called train, val (valid) and test.
    """
    source, (description, content) = Source(), _description(folder)
    names, places = _names(description, content), _places(content)
    source.classes = list(names.values())
    if any(place.endswith(".txt") for place in places):
        source.remarks.append(f"{description} names lists of files, which are not read: parts are those of the folders")
    if not names:
        source.remarks.append(f"{folder} has no data.yaml with names: classes are called {class_name} 0, 1, ...")
    files = [file for file in image_files(folder, deep=True) if "images" in file.relative_to(folder).parts[:-1]]
    labels = {path for path in folder.rglob("*.txt") if "labels" in path.relative_to(folder).parts}
    empty = 0
    for file in files:
        below = list(file.relative_to(folder).parts)
        below[len(below) - 1 - below[::-1].index("images")] = "labels"
        text = folder.joinpath(*below).with_suffix(".txt")
        inside = f"{file.relative_to(folder).parent.as_posix()}/"
        part = next((part for place, part in places.items() if inside.startswith(f"{place}/")), "")
        photo = new_photo(source, file, part or next((_PARTS[name] for name in below if name in _PARTS), ""))
        if photo is None:
            continue
        if text in labels:
            labels.remove(text)
            try:
                photo.objects = [
                    (names.get(kind, f"{class_name} {kind}"), [polygon], False)
                    for kind, polygon in _polygons(text, photo.size, names)
                ]
            except ValueError as error:
                source.leave_out(file, f"{text}, {error}")
                continue
        else:
            empty += 1
        source.photos.append(photo)
    if empty:
        source.remarks.append(f"{empty} photographs have no text file: they count as without objects")
    source.remarks += [f"{text} has no photograph" for text in sorted(labels)]
    return source


def _polygons(file: Path, size: Size, names: dict[int, str]) -> Iterator[tuple[int, list[float]]]:
    """(number of the class, x0, y0, x1, y1, ... in pixels)."""
    height, width = size
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not (words := line.split()):
            continue
        try:
            kind, *values = int(words[0]), *map(float, words[1:])
        except ValueError:
            raise ValueError(f"line {number}: {line[:40]!r} is not CLASS X1 Y1 X2 Y2 ...") from None
        if len(values) == 4:
            raise ValueError(f"line {number}: a box, not a polygon: these are labels of detection, without masks")
        if len(values) < 6 or len(values) % 2:
            raise ValueError(f"line {number}: {len(values)} coordinates are no polygon")
        if not all(math.isfinite(value) and -0.01 <= value <= 1.01 for value in values):
            raise ValueError(f"line {number}: coordinates must be parts of width and height, from 0 to 1")
        if names and kind not in names:
            raise ValueError(f"line {number}: class {kind} is none of the {len(names)} in data.yaml")
        yield kind, [value * side for value, side in zip(values, (width, height) * (len(values) // 2))]


def _description(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """data.yaml, however it is called, and its content; nothing where there is none."""
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML ({error})") from None
        if isinstance(content, dict) and "names" in content:
            return file, content
    return None, {}


def _places(content: dict[str, Any]) -> dict[str, str]:
    """The part of folders that data.yaml names, below its own: of ``../train/images``, ``train/images``."""
    root = str(content.get("path") or "").replace("\\", "/").rstrip("/")
    places = {}
    for name, part in _PARTS.items():
        values = content.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            words = str(value).replace("\\", "/").removeprefix(f"{root}/").split("/")
            places["/".join(word for word in words if word not in ("", ".", ".."))] = part
    return places


def _names(file: Path | None, content: dict[str, Any]) -> dict[int, str]:
    """Class names by number, in their order."""
    names = content.get("names", {})
    pairs = names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else None
    try:
        return {int(key): str(name) for key, name in sorted(pairs)}
    except (TypeError, ValueError):
        raise ValueError(f"{file}: 'names' must be a list, or numbers with names") from None
