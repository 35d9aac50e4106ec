"""Small folders of data in the layouts that ``--data`` reads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

HEIGHT, WIDTH = 40, 60
CATEGORIES = ({"id": 3, "name": "apple"}, {"id": 10, "name": "pear"})
LAYOUTS = {
    "coco": ("annotations/instances_{}2017.json", "{}2017", {"val": "val"}),
    "coco_images": ("annotations/instances_{}.json", "images", {"val": "val"}),
    "plain": ("{}.json", "{}", {"val": "val"}),
    "roboflow": ("{}/_annotations.coco.json", "{}", {"val": "valid"}),
}
"""Annotation file, folder of the images, and how the layout calls a part."""


def save_photo(path: Path, seed: int = 0) -> Path:
    """A picture of noise with two bright rectangles, those of ``content``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[5:25, 5:25] = 200
    pixels[10:30, 30:45] = 250
    Image.fromarray(pixels).save(path)
    return path


def content(names: Sequence[str], categories: Sequence[dict[str, Any]] = CATEGORIES, first: int = 1) -> dict[str, Any]:
    """An annotation file: each image has an object of the last category and one of the last but one."""
    images, annotations = [], []
    for number, name in enumerate(names, start=first):
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for k, (x, y, w, h) in enumerate(((5, 5, 20, 20), (30, 10, 15, 20))):
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            common = {"id": 2 * number + k, "image_id": number, "category_id": categories[-1 - k]["id"], "iscrowd": 0}
            annotations.append({**common, "bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]})
    return {"images": images, "annotations": annotations, "categories": list(categories)}


def write_part(folder: Path, layout: str, part: str, count: int, **changes: Any) -> Path:
    """Write a part of a layout; ``changes`` are keys of the file. Returns the file."""
    file, place, called = LAYOUTS[layout]
    name = called.get(part, part)
    names = [f"{part}{i}.png" for i in range(count)]
    for i, image in enumerate(names):
        save_photo(folder / place.format(name) / image, i)
    path = folder / file.format(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = changes.pop("categories", CATEGORIES)
    document = {**content(names, categories), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return path


def write_folder(folder: Path, layout: str, train: int = 4, val: int = 2) -> Path:
    """Write both parts."""
    write_part(folder, layout, "train", train)
    write_part(folder, layout, "val", val)
    return folder


@contextmanager
def restored_catalog() -> Iterator[None]:
    """Data sets that are registered inside are forgotten, those that are replaced come back."""
    names = {name: DatasetCatalog[name] for name in DatasetCatalog.list()}
    metadata = {name: MetadataCatalog.get(name) for name in names}
    yield
    for name in list(DatasetCatalog.list()):
        if names.get(name) is not DatasetCatalog[name]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
            if name in names:
                DatasetCatalog.register(name, names[name])
                MetadataCatalog[name] = metadata[name]
