"""Panoptic annotations in COCO's format: a JSON file has the segments of each image, a PNG file their pixels."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from querymask.common.data.annotations.boxes import corners
from querymask.common.data.annotations.findings import AnnotationError, Findings, show
from querymask.common.data.annotations.images import ImageInfo, clean_categories, clean_images, file_size, read_id
from querymask.common.data.annotations.objects import refuse_relative
from querymask.common.data.annotations.reader import Content, coco_entries, read_json
from querymask.common.data.annotations.segments import clean_segments

EVALUATOR_TYPE = "coco_panoptic_seg"
"""Of panoptic data sets, in Detectron2 as well."""
WHAT = "an annotation file in COCO's panoptic format"


def is_panoptic(dataset_name: str) -> bool:
    """Whether a data set has segments of things and stuff in place of instances."""
    return MetadataCatalog.get(dataset_name).get("evaluator_type") == EVALUATOR_TYPE


def clean_panoptic(content: Any, source: str, image_root: str | os.PathLike | None = None) -> Content:
    """A panoptic file in the form that ``clean_coco`` gives: what can be mended is, with a line for each kind.

    Every segment is an annotation, whose mask is that of its ``id`` in the PNG file. Ids are unique in an image only.
    Images have the name of that file as ``pan_seg_file_name``; those without segments in the file are left out.

    Raises:
        AnnotationError: naming file, thing, key and remedy.
    """
    findings = Findings(source)
    if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
        findings.refuse("key 'annotations'", "there is no list of images with their segments", f"Give {WHAT}")
    categories = clean_categories(content.get("categories"), findings)
    for category in categories:
        if category.get("isthing") not in (0, 1):
            where = f"category {category['id']!r}, {category['name']}"
            findings.refuse(where, f"'isthing' is {show(category.get('isthing'))}", "Write 1 for things, 0 for stuff")
    root = image_root or ""
    images = clean_images(content.get("images"), findings, lambda i: file_size(Path(root, i.get("file_name", ""))))
    infos = {
        i["id"]: ImageInfo(f"{i.get('file_name')} (image id {i['id']!r})", i["height"], i["width"]) for i in images
    }
    files: dict[int | str, str] = {}
    annotations: list[dict[str, Any]] = []
    for number, annotation in enumerate(content["annotations"]):
        where = f"annotations[{number}]"
        segments = annotation.get("segments_info") if isinstance(annotation, Mapping) else None
        if not isinstance(segments, list) or not all(isinstance(segment, Mapping) for segment in segments):
            findings.refuse(where, f"'segments_info' is {show(segments)}, no list of segments", f"Give {WHAT}")
        image_id, name = read_id(annotation.get("image_id")), annotation.get("file_name")
        if image_id not in infos or image_id in files:
            problem = "is that of another, too" if image_id in files else "is none of the file's images"
            findings.refuse(where, f"'image_id' {show(image_id)} {problem}", "Give every image one list of segments")
        if not isinstance(name, str) or not name:
            findings.refuse(where, f"'file_name' is {show(name)}", "Give the name of the PNG file of the segments")
        files[image_id] = name
        clean = clean_segments(segments, infos[image_id], categories, findings)
        annotations += [{**segment, "image_id": image_id} for segment in clean]
    refuse_relative([corners(annotation["bbox"]) for annotation in annotations], findings)
    findings.refuse_misfits()
    for image in images:
        if image["id"] not in files:
            findings.mend("image without a list of segments, left out", infos[image["id"]].name)
    images = [{**image, "pan_seg_file_name": files[image["id"]]} for image in images if image["id"] in files]
    findings.log()
    return {**content, "images": images, "categories": categories, "annotations": annotations}


def number_classes(categories: Collection[Mapping[str, Any]]) -> dict[int | str, int]:
    """The class of each category id: things from 0 on, then stuff, each in the order of the ids."""
    order = sorted(categories, key=lambda category: (not category["isthing"], category["id"]))
    return {category["id"]: index for index, category in enumerate(order)}


def class_metadata(categories: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """What Detectron2 knows of the classes of a panoptic data set: the names of all, the numbers of category ids."""
    classes = number_classes(categories)
    names = {category["id"]: category["name"] for category in categories}
    things = {category["id"] for category in categories if category["isthing"]}
    listed = [names[key] for key in classes]
    return {
        "thing_classes": listed,
        "stuff_classes": listed,
        "thing_dataset_id_to_contiguous_id": {key: index for key, index in classes.items() if key in things},
        "stuff_dataset_id_to_contiguous_id": {key: index for key, index in classes.items() if key not in things},
    }


def panoptic_entries(
    content: Content,
    json_file: str,
    image_root: str,
    panoptic_root: str,
    classes: Mapping[int | str, int],
) -> list[dict[str, Any]]:
    """Detectron2's dictionaries of a checked file: ``segments_info`` and ``annotations`` are the same list.

    Args:
        panoptic_root: folder of the PNG files.
        classes: the number of each category id.

    Raises:
        AnnotationError: PNG files are missing, or a category has no number.
    """
    if lacking := [category for category in content["categories"] if category["id"] not in classes]:
        raise AnnotationError(
            f"{json_file}: category {lacking[0]['id']!r}, {lacking[0]['name']}, is none of those that the data set is "
            "registered with. Register it with all categories of the file."
        )
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    content = {**content, "annotations": [{**a, "isthing": a["category_id"] in things} for a in content["annotations"]]}
    entries = coco_entries(content, json_file, image_root, classes, ("area", "id", "isthing"))
    for entry, image in zip(entries, content["images"], strict=True):
        entry["pan_seg_file_name"] = os.path.join(panoptic_root, image["pan_seg_file_name"])
        entry["segments_info"] = entry["annotations"]
    missing = [name for entry in entries if not PathManager.isfile(name := entry["pan_seg_file_name"])]
    if missing:
        raise AnnotationError(
            f"{json_file}: {len(missing)} of {len(entries)} PNG files of segments, the first {missing[0]}, are not "
            "there. Put them there, or take their images out of the file."
        )
    return entries


def load_coco_panoptic_json(
    json_file: str, image_dir: str, gt_dir: str, meta: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Detectron2's function of this name, checked: dictionaries of images with their segments.

    Args:
        image_dir, gt_dir: folders of the images and of the PNG files.
        meta: with ``thing_dataset_id_to_contiguous_id`` and ``stuff_dataset_id_to_contiguous_id``.
    """
    classes = {**meta["stuff_dataset_id_to_contiguous_id"], **meta["thing_dataset_id_to_contiguous_id"]}
    content = clean_panoptic(read_json(json_file, WHAT), str(json_file), image_dir)
    return panoptic_entries(content, str(json_file), str(image_dir), str(gt_dir), classes)
