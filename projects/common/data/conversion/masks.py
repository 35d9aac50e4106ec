"""Instance masks as images: one file an object, or one image of labels a photograph."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from querymask.common.data.conversion.source import Photo, Source, by_stem, image_files, new_photo, read_mask

_VEHICLES = {26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
CITYSCAPES = {24: "person", 25: "rider", **_VEHICLES}
"""The classes with instances of Cityscapes' benchmark by their number (cityscapesscripts, helpers/labels.py)."""
_PARTS = ("train", "val", "test")


def has_object_masks(folder: Path) -> bool:
    """NAME/images/ and NAME/masks/ as in the Data Science Bowl of 2018, or images/ and masks/NAME/."""
    return any(images for images, _ in _object_masks(folder))


def read_object_masks(folder: Path, class_name: str) -> Source:
    """One file an object, all of one class: pixels above half of the file's highest value are the object's."""
    source = Source(classes=[class_name])
    for images, masks in _object_masks(folder):
        if len(images) != 1:
            source.leave_out(masks, f"{len(images)} photographs belong to these masks")
            continue
        photo = new_photo(source, images[0])
        if photo is None:
            continue
        try:
            for file in image_files(masks):
                pixels = _sized(read_mask(file), photo, file)
                if not pixels.any():
                    source.remarks.append(f"{file} is empty: it is no object")
                    continue
                photo.add_mask(class_name, pixels > pixels.max() / 2)
        except ValueError as error:
            source.leave_out(photo.file, str(error))
            continue
        source.photos.append(photo)
    return source


def _object_masks(folder: Path) -> Iterator[tuple[list[Path], Path]]:
    """(photographs that may belong to it, folder of masks)."""
    for masks in sorted(folder.glob("*/masks")):
        if (masks.parent / "images").is_dir():
            yield image_files(masks.parent / "images"), masks
    if (folder / "images").is_dir():
        photos = by_stem(image_files(folder / "images"), folder / "images")
        for masks in sorted(path for path in folder.glob("masks/*") if path.is_dir()):
            yield photos.get(masks.name, []), masks


def has_label_images(folder: Path) -> bool:
    """images/ and, for photographs in it, images of the same names in masks/ or labels/."""
    labels, photos = _label_folder(folder), folder / "images"
    return labels is not None and bool(
        by_stem(image_files(labels, deep=True), labels).keys() & by_stem(image_files(photos, deep=True), photos).keys()
    )


def read_label_images(folder: Path, class_name: str) -> Source:
    """One image of labels a photograph, all of one class: 0 is background, each other value an object."""
    source, labels = Source(classes=[class_name]), _label_folder(folder)
    files = by_stem(image_files(labels, deep=True), labels)
    for file in image_files(folder / "images", deep=True):
        name = file.relative_to(folder / "images").with_suffix("").as_posix()
        part = name.partition("/")[0]
        photo = new_photo(source, file, part if part in _PARTS else "")
        if photo is None:
            continue
        found = files.pop(name, [])
        if len(found) != 1:
            source.leave_out(file, f"{len(found)} label images of its name are in {labels}")
            continue
        try:
            pixels = _sized(_labels(found[0]), photo, found[0])
        except ValueError as error:
            source.leave_out(file, str(error))
            continue
        for value in np.unique(pixels):
            if value:
                photo.add_mask(class_name, pixels == value)
        source.photos.append(photo)
    source.remarks += [f"{found[0]} has no photograph" for found in files.values()]
    return source


def _label_folder(folder: Path) -> Path | None:
    return next((folder / name for name in ("masks", "labels") if (folder / name).is_dir()), None)


def has_instance_ids(folder: Path) -> bool:
    """Files NAME_instanceIds.png."""
    return next(folder.rglob("*_instanceIds.png"), None) is not None


def read_instance_ids(folder: Path, class_name: str) -> Source:
    """Cityscapes' label images: class * 1000 + number for an object, the class alone for a group, which is a crowd.

    Photographs are ``*_leftImg8bit.png``, or files called as the label image is without ``_gt..._instanceIds``.
    Objects of classes that Cityscapes' benchmark does not have become ``CLASS_NAME NUMBER``.
    """
    source = Source(classes=list(CITYSCAPES.values()))
    photos: dict[str, list[Path]] = {}
    for file in image_files(folder, deep=True):
        if not file.stem.endswith(("_instanceIds", "_labelIds", "_instanceTrainIds", "_labelTrainIds", "_color")):
            photos.setdefault(file.stem.removesuffix("_leftImg8bit"), []).append(file)
    for labels in sorted(folder.rglob("*_instanceIds.png")):
        name = labels.stem.removesuffix("_instanceIds")
        name = name.rpartition("_gt")[0] or name
        found = photos.get(name, [])
        if len(found) != 1:
            source.leave_out(labels, f"{len(found)} photographs are called {name} or {name}_leftImg8bit")
            continue
        part = next((p for p in labels.relative_to(folder).parts if p in _PARTS), "")
        photo = new_photo(source, found[0], part)
        if photo is None:
            continue
        try:
            pixels = _sized(_labels(labels), photo, labels)
        except ValueError as error:
            source.leave_out(photo.file, str(error))
            continue
        for value in np.unique(pixels).tolist():
            number = value // 1000 if value >= 1000 else value
            if value >= 1000 or number in CITYSCAPES:
                photo.add_mask(CITYSCAPES.get(number, f"{class_name} {number}"), pixels == value, value < 1000)
        source.photos.append(photo)
    used = {name for photo in source.photos for name, *_ in photo.objects}
    source.classes = [name for name in source.classes if name in used]
    return source


def _labels(file: Path) -> np.ndarray:
    """Label numbers, [H, W]."""
    with Image.open(file) as image:
        if image.mode in ("RGB", "RGBA", "CMYK", "F"):
            raise ValueError(f"{file} has colours ({image.mode}), not label numbers: write 8 or 16 bits, one channel")
    return read_mask(file)


def _sized(pixels: np.ndarray, photo: Photo, file: Path) -> np.ndarray:
    if pixels.shape != photo.size:
        height, width = pixels.shape
        raise ValueError(f"{file} is {width}x{height}, the photograph {photo.size[1]}x{photo.size[0]} (width x height)")
    return pixels
