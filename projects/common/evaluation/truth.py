"""The ground truth of a data set as pycocotools wants it, from checked annotations."""

import contextlib
import io
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from querymask.common.data.annotations import is_panoptic, read_coco, read_dataset
from querymask.common.data.annotations.reader import Content
from querymask.common.data.segmentation import encode_segmentation


def dataset_truth(name: str) -> Content:
    """Images, annotations and categories of a registered data set, checked, as a COCO file has them.

    They are those of the annotation file that the metadata name as ``json_file``; of a data set without one, those
    of its function, as it is now.

    Raises:
        ValueError: the data set is panoptic.
    """
    metadata = MetadataCatalog.get(name)
    if is_panoptic(name):
        raise ValueError(f"{name} is a panoptic data set, and this is about instances: choose one of instances")
    if name in DatasetCatalog and metadata.get("json_file"):
        known = metadata.get("thing_dataset_id_to_contiguous_id") is not None and metadata.get("thing_classes")
        if not known or not PathManager.exists(metadata.json_file):
            DatasetCatalog.get(name)  # some are made, and many learn their categories' ids, when they are read
        return read_coco(metadata.json_file, metadata.get("image_root"))
    if metadata.get("json_file"):
        return read_coco(metadata.json_file, metadata.get("image_root"))
    return _convert(read_dataset(name), metadata)


def category_ids(name: str, content: Content) -> dict[int | str, int]:
    """The class index of each category id of a data set: the metadata's, else by the order of the ids."""
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    return dict(ids) if ids else {category["id"]: index for index, category in enumerate(content["categories"])}


def index(content: Content) -> COCO:
    """An index of checked annotations, which get the area of their mask (of their box) where they have none."""
    coco = COCO()
    coco.dataset = {**content, "annotations": content.get("annotations", [])}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in coco.dataset["annotations"]:
        if "area" not in annotation:
            mask = annotation.get("segmentation")
            if mask is None:
                annotation["area"] = float(annotation["bbox"][2] * annotation["bbox"][3])
            else:
                rle = encode_segmentation(mask, *sizes[annotation["image_id"]])
                annotation["area"] = float(mask_util.area(rle))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _convert(entries: list[dict[str, Any]], metadata: Any) -> Content:
    """Checked dictionaries of a function as the content of a COCO file."""
    annotations = [(entry, a) for entry in entries for a in entry.get("annotations", ())]
    highest = max((a["category_id"] for _, a in annotations), default=-1)
    names = metadata.get("thing_classes") or [f"class {i}" for i in range(highest + 1)]
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    back = {index: key for key, index in ids.items()}
    content: Content = {
        "images": [
            {"id": e["image_id"], **{k: e[k] for k in e if k not in ("annotations", "image_id")}} for e in entries
        ],
        "categories": [{"id": back[i], "name": str(name)} for i, name in enumerate(names)],
    }
    if any("annotations" in entry for entry in entries):
        content["annotations"] = [
            {
                **{key: value for key, value in a.items() if key != "bbox_mode"},
                "id": number,
                "image_id": entry["image_id"],
                "category_id": back[a["category_id"]],
                "bbox": BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS),
            }
            for number, (entry, a) in enumerate(annotations, start=1)
        ]
    return content
