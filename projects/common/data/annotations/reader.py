"""Annotation files, checked as a whole before anything is computed from them."""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from querymask.common.data.annotations.boxes import corners
from querymask.common.data.annotations.dictionaries import CheckedEntries
from querymask.common.data.annotations.findings import AnnotationError, Findings, show
from querymask.common.data.annotations.images import (
    ImageInfo,
    Size,
    clean_categories,
    clean_images,
    file_size,
    kind_of,
    read_id,
)
from querymask.common.data.annotations.objects import clean_object, refuse_relative

Content = dict[str, Any]
"""Of a checked file: ``images``, ``categories`` and, where the file has them, ``annotations``; and its other keys."""


@contextmanager
def _without_collection() -> Iterator[None]:
    """Millions of objects are made that stay: looking for garbage among them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: str | os.PathLike, what: str) -> Any:
    """Content of a JSON file.

    Args:
        what: should be in it, for the message.

    Raises:
        AnnotationError: it is no JSON.
        FileNotFoundError: there is no such file.
    """
    local = PathManager.get_local_path(str(path))
    if not os.path.isfile(local):
        raise FileNotFoundError(f"{path}: there is no such file. Give {what}.")
    try:
        with open(local, encoding="utf-8-sig") as file:  # some Windows programs write a mark at the beginning
            text = file.read()
        if any(text.count(f'"{key}"') > 1 for key in ("images", "annotations", "categories")):
            return json.loads(text, object_pairs_hook=_unique)  # takes longer
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON, of its encoding, of an integer of 5000 digits
        raise AnnotationError(f"{path}: not JSON ({error}). Give {what}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which would lose a part of its content where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is twice in one object")
    return found


def read_coco(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> Content:
    """An annotation file in COCO's format (LVIS's, too): what can be mended is, with a line for each kind.

    The result is safe for pycocotools: ids of annotations are 1, 2, ... where the file's are not positive and different
    integers; ``iscrowd`` is 0 or 1; every annotation has an image, a category and a box [x, y, width, height]; masks
    fit the images. Images and categories are in the order of their ids.

    Args:
        image_root: the folder of the images, whose sizes are looked up where the file lacks them.

    Raises:
        AnnotationError: naming file, thing, key and remedy.
    """
    with _without_collection():
        return clean_coco(read_json(path, "an annotation file in COCO's format"), str(path), image_root)


def clean_coco(content: Any, source: str, image_root: str | os.PathLike | None = None) -> Content:
    """``read_coco`` of what is read already; ``content`` stays as it is."""
    findings = Findings(source)
    if not isinstance(content, Mapping):
        findings.refuse(
            "the whole file",
            f"it is a {type(content).__name__}, not an object with 'images', 'annotations' and 'categories'",
            "Give the annotation file, not a result file",
        )
    annotations = content.get("annotations")
    if annotations is not None and not isinstance(annotations, list):
        findings.refuse("key 'annotations'", f"it must be a list, not {show(annotations)}", "Give an annotation file")
    categories = clean_categories(content.get("categories"), findings)
    images = clean_images(content.get("images"), findings, _size_finder(annotations or (), image_root))
    clean = {**content, "images": images, "categories": categories}
    if annotations is not None:
        infos = {image["id"]: _info(image) for image in images}
        clean["annotations"] = _clean_annotations(annotations, infos, [c["id"] for c in categories], findings)
    findings.log()
    return clean


def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Detectron2's function of this name, by ``read_coco``: dictionaries of images with their annotations.

    Where ``dataset_name`` is given, classes are numbered from 0 in the order of their ids, and the metadata gets
    ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``.
    """
    content = read_coco(json_file, image_root)
    classes = None
    if dataset_name is not None:
        classes = {category["id"]: index for index, category in enumerate(content["categories"])}
        _set_classes(dataset_name, str(json_file), content["categories"], classes)
    return coco_entries(content, str(json_file), str(image_root), classes, extra_annotation_keys or ())


def coco_entries(
    content: Content,
    json_file: str,
    image_root: str,
    classes: Mapping[int | str, int] | None,
    extra_annotation_keys: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Detectron2's dictionaries of a checked file.

    Args:
        classes: the number of each category id; None keeps the ids.
    """
    keys = {"iscrowd", "bbox", "keypoints", "category_id", "segmentation", *extra_annotation_keys}
    entries = {}
    for image in content["images"]:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise AnnotationError(
                f"{json_file}: image with id {image['id']!r}: its 'file_name' is {show(name)}. Give the file's name."
            )
        entries[image["id"]] = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        entries[image["id"]].update({k: image[k] for k in _LVIS_KEYS if k in image})
    for annotation in content.get("annotations", ()):
        record = {key: annotation[key] for key in annotation if key in keys}
        record["bbox_mode"] = BoxMode.XYWH_ABS
        if classes is not None:
            record["category_id"] = classes[annotation["category_id"]]
        if keypoints := record.get("keypoints"):  # Detectron2's coordinates are half a pixel larger
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        entries[annotation["image_id"]]["annotations"].append(record)
    return CheckedEntries(entries.values())


_LVIS_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


def _clean_annotations(
    annotations: list[Any], images: Mapping[int | str, ImageInfo], categories: list[int | str], findings: Findings
) -> list[dict[str, Any]]:
    """Annotations of a file, each of a known image and category, in their order."""
    known = set(categories)
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping):
            findings.refuse(f"annotations[{number}]", f"it is {show(annotation)}", "Write an object")
    image_ids = _references(annotations, "image_id", images.keys(), "images", findings)
    strays = [i for i, key in enumerate(image_ids) if key not in images]
    if strays:
        findings.refuse(
            f"{len(strays)} of {len(annotations)} annotations",
            f"they belong to no image of the file, the first, annotations[{strays[0]}], to 'image_id' "
            f"{show(image_ids[strays[0]])}",
            "If images were taken out, take out their annotations, too; else the ids do not fit together, which puts "
            "annotations on wrong images",
        )
    category_ids = _references(annotations, "category_id", known, "categories", findings)
    cleaned, taken = [], set()
    seen: dict[tuple, Mapping[str, Any]] = {}
    namesakes: dict[tuple, list[Mapping[str, Any]]] = {}
    for number, annotation in enumerate(annotations):
        image_id, category_id = image_ids[number], category_ids[number]
        where = f"annotations[{number}], id {show(annotation.get('id'))}, of {images[image_id].name}"
        if category_id not in known:
            findings.refuse(
                where,
                f"'category_id' {show(category_id)} is none of the file's categories",
                "Add the category, or remove the annotation",
            )
        own = read_id(annotation.get("id"))
        if (own, image_id) in seen:
            first = seen[own, image_id]
            namesakes.setdefault(_place(first, own, image_id), [first])
            same = namesakes.setdefault(_place(annotation, own, image_id), [])
            if annotation in same:
                findings.mend("annotation that is there twice, taken once", where)
                continue
            same.append(annotation)
        seen.setdefault((own, image_id), annotation)
        clean = clean_object(annotation, images[image_id], where, findings)
        if clean is None:
            continue
        clean.update(id=own, image_id=image_id, category_id=category_id)
        cleaned.append(clean)
        taken.add(own)
    refuse_relative([corners(annotation["bbox"]) for annotation in cleaned], findings)
    findings.refuse_misfits()
    if len(taken) < len(cleaned) or not all(isinstance(key, int) and key > 0 for key in taken):
        findings.mend(
            "ids of annotations that are missing, 0, negative, doubled or no integers, all numbered anew from 1",
            "in 'annotations'",
        )
        for number, annotation in enumerate(cleaned, start=1):
            annotation["id"] = number
    return cleaned


def _place(annotation: Mapping[str, Any], own: int | str | None, image_id: int | str) -> tuple:
    """A key that few annotations share: in files without ids, those of an image would all be compared."""
    return own, image_id, repr(annotation.get("bbox") or annotation.get("segmentation"))


def _references(
    annotations: list[Mapping[str, Any]], key: str, known: Iterable[int | str], what: str, findings: Findings
) -> list[int | str]:
    """The values of ``key``; refused where one is missing or of another type than the ids that it refers to."""
    kinds = {type(i) for i in known}
    values = []
    for number, annotation in enumerate(annotations):
        value = read_id(annotation.get(key))
        if value is None:
            findings.refuse(
                f"annotations[{number}]", f"{key!r} is {show(annotation.get(key))}", f"Give the id of one of the {what}"
            )
        values.append(value)
    wrong = [i for i, value in enumerate(values) if kinds and type(value) not in kinds]
    if wrong:
        findings.refuse(
            f"{len(wrong)} of {len(annotations)} annotations, the first annotations[{wrong[0]}]",
            f"they belong to none of the {what}: {key!r} is {show(values[wrong[0]])}, the ids are "
            f"{kind_of(list(known))}",
            "Give both one type",
        )
    return values


def _info(image: Mapping[str, Any]) -> ImageInfo:
    name = image.get("file_name") or "image"
    return ImageInfo(f"{name} (image id {image['id']!r})", image["height"], image["width"])


def _size_finder(
    annotations: Iterable[Any], image_root: str | os.PathLike | None
) -> Callable[[Mapping[str, Any]], Size | None]:
    """Looks for the size of an image in its file, then in the run-length encodings of its annotations."""
    sizes: dict[Any, Size] = {}

    def find(image: Mapping[str, Any]) -> Size | None:
        name = image.get("file_name")
        if image_root is not None and isinstance(name, str):
            if size := file_size(Path(image_root, name)):
                return size
        if not sizes:
            for annotation in annotations:
                mask = annotation.get("segmentation") if isinstance(annotation, Mapping) else None
                size = mask.get("size") if isinstance(mask, Mapping) else None
                if isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size):
                    sizes[read_id(annotation.get("image_id"))] = (size[0], size[1])
        return sizes.get(read_id(image.get("id")))

    return find


def _set_classes(name: str, source: str, categories: list[Mapping[str, Any]], classes: Mapping[int | str, int]) -> None:
    """Put names and ids into the metadata; an error where the user has given other ones."""
    metadata = MetadataCatalog.get(name)
    for key, value in (
        ("thing_classes", [category["name"] for category in categories]),
        ("thing_dataset_id_to_contiguous_id", dict(classes)),
    ):
        given = metadata.get(key)
        if given is not None and (list(given) != value if isinstance(value, list) else dict(given) != value):
            if isinstance(value, list) and len(given) == len(value) and sorted(map(str, given)) != sorted(value):
                continue  # own names for the classes
            raise AnnotationError(
                f"{source}: the data set {name} is registered with {key} {show(given)}, the file has {show(value)}. "
                f"Leave {key} out of the metadata, or make the two equal."
            )
        if given is None:
            setattr(metadata, key, value)
