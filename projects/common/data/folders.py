"""A folder of photographs with annotations as data sets: its layout, its parts, its classes.

``train_net.py --data FOLDER`` reads folders that look so (``test`` may be missing, and the part to evaluate on, too)::

    COCO        annotations/instances_{train,val,test}*.json   {train,val,test}*/ as the files are called, or images/
    plain       {train,val,test}.json                          {train,val,test}/
    Roboflow    {train,valid,test}/_annotations.coco.json      images beside it
    one file    one JSON file, here or in annotations/         images beside it or in images/

and for panoptic models, with the PNG files in a folder of the JSON file's name beside it or here::

    panoptic    panoptic_{train,val,test}*.json, here or in annotations/    as COCO's or the plain layout
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from querymask.common.data.annotations import (
    EVALUATOR_TYPE,
    AnnotationError,
    class_metadata,
    clean_coco,
    clean_panoptic,
    coco_entries,
    number_classes,
    panoptic_entries,
    read_json,
)
from querymask.common.data.annotations.dictionaries import CheckedEntries
from querymask.common.data.annotations.reader import Content
from querymask.common.data.image_files import find_file

PARTS = ("train", "val", "test")
KEPT_OUT = 5
"""Of a folder without parts, one photograph of so many is kept out of training."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """An annotation file, the folders in which its images may be, and that of its PNG files if it is panoptic."""

    json_file: Path
    image_folders: tuple[Path, ...]
    panoptic_folder: Path | None = None


class DataFolder:
    """The data sets of a folder. Nothing is read before it is needed, then all parts at once.

    Args:
        panoptic: read its panoptic annotations, and no others.

    Attributes:
        path: absolute.
        names: of the registered data sets by part: ``{"train": "fruit_train", "val": "fruit_val"}``.

    Raises:
        AnnotationError: it has none of the layouts, or several.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, path: str | Path, panoptic: bool = False) -> None:
        self.panoptic = panoptic
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path}: there is no such folder. Give the folder of a data set")
        self._layout, self._parts = find_layout(self.path, panoptic)
        kept = tuple(self._parts) if len(self._parts) > 1 else PARTS[:2]
        self.names = {part: f"{self.path.name}_{part}" for part in kept}

    @property
    def evaluated(self) -> str:
        """The data set to evaluate on: the part ``val``, of a folder without it ``test``."""
        return self.names.get("val") or self.names["test"]

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._read[0]["thing_classes"]

    @property
    def num_things(self) -> int:
        """How many of the classes are things: all, or the first ones of a panoptic folder."""
        return len(self._read[0]["thing_dataset_id_to_contiguous_id"])

    def entries(self, part: str) -> list[dict[str, Any]]:
        """Detectron2's dictionaries of a part, checked."""
        return self._read[1][part]

    def register(self) -> None:
        """Make the data sets known by their names, which stand for those of this folder from now on."""
        for part, name in self.names.items():
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
            if name in MetadataCatalog.list():
                MetadataCatalog.remove(name)
            DatasetCatalog.register(name, self._loader(part, name))
            kind = EVALUATOR_TYPE if self.panoptic else "coco"
            MetadataCatalog.get(name).set(folder=str(self.path), evaluator_type=kind)

    def _loader(self, part: str, name: str) -> Callable[[], list[dict[str, Any]]]:
        def load() -> list[dict[str, Any]]:
            entries = self.entries(part)
            metadata = self._read[0].items()
            MetadataCatalog.get(name).set(**{k: v for k, v in metadata if self.panoptic or k.startswith("thing")})
            return entries

        return load

    @cached_property
    def _read(self) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """``class_metadata``, and the dictionaries of each part."""
        contents, roots = {}, {}
        for part, files in self._parts.items():
            raw = read_json(files.json_file, "an annotation file in COCO's format")
            roots[part] = _image_folder(files, raw)
            clean = clean_panoptic if self.panoptic else clean_coco
            contents[part] = clean(raw, str(files.json_file), roots[part])
            if not contents[part]["images"]:
                raise AnnotationError(f"{files.json_file}: it has no images. Take it away, or give them to it.")
        names = self._categories(contents)
        things = self._things(contents) if self.panoptic else set(names)
        categories = [{"id": key, "name": name, "isthing": key in things} for key, name in names.items()]
        metadata, numbers = class_metadata(categories), number_classes(categories)
        entries = {}
        for part, content in contents.items():
            file = str(self._parts[part].json_file)
            folder = self._parts[part].panoptic_folder
            if folder is not None:
                entries[part] = panoptic_entries(content, file, str(roots[part]), str(folder), numbers)
                continue
            entries[part] = coco_entries(content, file, str(roots[part]), numbers, ("area",))
            if not content.get("annotations"):
                logger.warning(f"{file}: its {len(entries[part])} images have no annotations")
            if "annotations" not in content:  # unknown, not none: there is no AP
                for entry in entries[part]:
                    del entry["annotations"]
        if len(entries) == 1:
            entries = self._split(*entries.values(), *roots.values())
        counts = ", ".join(f"{len(found)} images in {self.names[part]}" for part, found in entries.items())
        shown = ", ".join(metadata["thing_classes"][:12])
        logger.info(f"{self.path} ({self._layout}): {counts}; {len(names)} classes: {shown}")
        return metadata, entries

    def _things(self, contents: dict[str, Content]) -> set[int | str]:
        """Ids of categories that are things, in all parts."""
        found: dict[int | str, bool] = {}
        for part, content in contents.items():
            for category in content["categories"]:
                key, isthing = category["id"], bool(category["isthing"])
                if found.setdefault(key, isthing) != isthing:
                    raise AnnotationError(
                        f"{self._parts[part].json_file}: category {key!r}, {category['name']}, is a thing in one file "
                        f"of {self.path} and stuff in another. Write the same 'isthing' in all of them."
                    )
        return {key for key, isthing in found.items() if isthing}

    def _categories(self, contents: dict[str, Content]) -> dict[int | str, str]:
        """Names by id, in the order of the ids, of all parts together."""
        found: dict[int | str, str] = {}
        supercategories, used = {}, set()
        for part, content in contents.items():
            for category in content["categories"]:
                key, name = category["id"], category["name"]
                if found.setdefault(key, name) != name:
                    raise AnnotationError(
                        f"{self._parts[part].json_file}: category {key!r} is {name!r}, in other files of "
                        f"{self.path} it is {found[key]!r}. Give a class one id in all of them."
                    )
                supercategories[key] = category.get("supercategory")
            used |= {annotation["category_id"] for annotation in content.get("annotations", ())}
        if len({type(key) for key in found}) > 1:
            raise AnnotationError(f"{self.path}: ids of categories are numbers in one file, texts in another.")
        # Roboflow writes the name of its project as a category, whose members the others are
        others = [supercategories[key] for key in found if key != 0]
        if others and 0 in found and 0 not in used and set(others) == {found[0]}:
            logger.info(f"{self.path}: category 0, {found.pop(0)!r}, stands for all others, and is no class")
        return {key: found[key] for key in sorted(found)}

    def _split(self, entries: list[dict[str, Any]], root: Path) -> dict[str, list[dict[str, Any]]]:
        """Two parts of one: a part of the photographs, chosen by the hashes of their names, is kept out of training."""
        names = [Path(os.path.relpath(entry["file_name"], root)).as_posix() for entry in entries]
        kept_out = choose_kept_out(names)
        parts: dict[str, list[dict[str, Any]]] = {"train": CheckedEntries(), "val": CheckedEntries()}
        for entry, name in zip(entries, names):
            parts["val" if name in kept_out else "train"].append(entry)
        if not parts["val"]:
            raise AnnotationError(f"{self.path}: one photograph cannot be split in two to train and to evaluate on.")
        logger.warning(
            f"{self.path} has no part to evaluate on: {len(parts['val'])} of {len(entries)} images, one of {KEPT_OUT}, "
            f"chosen by the SHA-256 hashes of the file names, the same in every run, are kept out of training as "
            f"{self.names['val']}"
        )
        return parts


def register_folder(path: str | Path, panoptic: bool = False) -> DataFolder:
    """The data sets of a folder, registered; those of the last folder of this name are replaced."""
    folder = DataFolder(path, panoptic)
    folder.register()
    return folder


def choose_kept_out(names: Iterable[str]) -> set[str]:
    """Names of image files to evaluate on, the same ones in every run; none of a single photograph.

    Roboflow's augmented versions of a photograph, ``NAME.rf.HASH.jpg``, stay together.
    """
    versions: dict[str, list[str]] = {}
    for name in names:
        versions.setdefault(name.split(".rf.")[0], []).append(name)
    order = sorted(versions, key=lambda name: hashlib.sha256(name.encode()).digest())
    number = max(round(len(order) / KEPT_OUT), 1) if len(order) > 1 else 0
    return {name for photograph in order[:number] for name in versions[photograph]}


def find_layout(folder: Path, panoptic: bool = False) -> tuple[str, dict[str, Part]]:
    """What layout a folder has, in words, and its parts; a single part is called ``train``.

    Args:
        panoptic: of its panoptic annotations.

    Raises:
        AnnotationError: none, several, or nothing to train on.
    """
    if panoptic:
        found = {"panoptic": parts} if (parts := _panoptic(folder)) else {}
        if not found:
            raise AnnotationError(
                f"{folder}: there are no panoptic annotations in it. Expected are panoptic_train*.json, there or in "
                "annotations/, with the PNG files in a folder of the same name beside it."
            )
    else:
        found = {name: parts for name, find in _LAYOUTS.items() if (parts := find(folder))}
    if not found and (parts := _single(folder)):
        return "one annotation file", {"train": parts}
    if not found:
        raise AnnotationError(
            f"{folder}: there are no annotations in it. Expected are annotations/instances_train*.json (COCO), "
            "train.json, train/_annotations.coco.json (Roboflow), or one JSON file; tools/make_coco.py makes such a "
            "folder from masks, YOLO's text files and labelme's JSON."
        )
    if len(found) > 1:
        files = ", ".join(_shown(folder, [part.json_file for part in parts.values()]) for parts in found.values())
        raise AnnotationError(f"{folder}: it has annotations in {len(found)} layouts: {files}. Keep those of one.")
    ((name, parts),) = found.items()
    if "train" not in parts:
        files = _shown(folder, [part.json_file for part in parts.values()])
        raise AnnotationError(f"{folder}: there is {files}, but nothing to train on: the file of the part train lacks.")
    return name, parts


def _coco(folder: Path) -> dict[str, Part]:
    parts = {}
    for part in PARTS:
        files = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
        if len(files) > 1:
            raise AnnotationError(f"{folder}: {_shown(folder, files)} are several files of one part. Keep one.")
        for file in files:
            names = dict.fromkeys((file.stem.removeprefix("instances_"), part))
            folders = [place / name for name in names for place in (folder, folder / "images")]
            parts[part] = Part(file, (*folders, folder / "images", folder))
    return parts


def _plain(folder: Path) -> dict[str, Part]:
    return {
        part: Part(file, (folder / part, folder / "images" / part, folder / "images", folder))
        for part in PARTS
        if (file := folder / f"{part}.json").is_file()
    }


def _panoptic(folder: Path) -> dict[str, Part]:
    parts = {}
    for part in PARTS:
        files = sorted(f for place in (folder, folder / "annotations") for f in place.glob(f"panoptic_{part}*.json"))
        if len(files) > 1:
            raise AnnotationError(f"{folder}: {_shown(folder, files)} are several files of one part. Keep one.")
        for file in files:
            names = dict.fromkeys((file.stem.removeprefix("panoptic_"), part))
            images = [place / name for name in names for place in (folder, folder / "images")]
            places = (file.with_suffix(""), folder / file.stem)
            pngs = next((place for place in places if place.is_dir()), None)
            if pngs is None:
                tried = ", ".join(map(str, dict.fromkeys(places)))
                raise AnnotationError(f"{file}: there is no folder {tried} with its PNG files. Put them there.")
            parts[part] = Part(file, (*images, folder / "images", folder), pngs)
    return parts


def _roboflow(folder: Path) -> dict[str, Part]:
    places = zip(PARTS, ("train", "valid", "test"))
    files = {part: folder / place / "_annotations.coco.json" for part, place in places}
    return {part: Part(file, (file.parent,)) for part, file in files.items() if file.is_file()}


_LAYOUTS: dict[str, Callable[[Path], dict[str, Part]]] = {"COCO": _coco, "plain": _plain, "Roboflow": _roboflow}


def _single(folder: Path) -> Part | None:
    """The one JSON file of a folder."""
    places = (folder, folder / "annotations")
    files = sorted(f for place in places for f in place.glob("*.json") if not f.name.startswith("."))
    if len(files) > 1:
        raise AnnotationError(
            f"{folder}: it has {_shown(folder, files)}, and no names that say which are to train on. Call them "
            "train.json and val.json, or keep one."
        )
    return Part(files[0], (folder, folder / "images", folder / files[0].stem)) if files else None


def _image_folder(part: Part, raw: Any) -> Path:
    """Where the images of an annotation file are, all of them; ``raw`` is the file as it was read, unchecked."""
    images = raw.get("images") if isinstance(raw, dict) else None
    names = [i.get("file_name") for i in images if isinstance(i, dict)] if isinstance(images, list) else []
    names = [name for name in names if isinstance(name, str) and name]
    missing: dict[Path, list[str]] = {}
    for folder in part.image_folders:
        missing[folder] = [name for name in names if not _exists(folder / name)]
        if not missing[folder]:
            return folder
    best = min(missing, key=lambda folder: len(missing[folder]))
    if len(missing[best]) == len(names):
        tried = ", ".join(map(str, part.image_folders))
        raise AnnotationError(
            f"{part.json_file}: its images, the first {names[0]}, are not in {tried}. Put them there."
        )
    raise AnnotationError(
        f"{part.json_file}: {len(missing[best])} of {len(names)} images, the first {missing[best][0]}, are not in "
        f"{best}. Put them there, or take them and their annotations out of the file."
    )


def _exists(path: Path) -> bool:
    try:
        return bool(find_file(str(path)))
    except FileNotFoundError:
        return False


def _shown(folder: Path, files: Sequence[Path]) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in files)
