"""The built-in data set ``shapes``: made on first use as JPEG files and a COCO JSON, then read like any other.

Its panoptic form has other pictures, with stuff behind the shapes, and a PNG file of the segments of each. The folders
have the generator's version in their names, so a changed generator makes a new data set beside the old one::

    shapes/v1/train.json             shapes/v1/train/000000.jpg ...
    shapes/v1/val.json               shapes/v1/val/000000.jpg ...
    shapes_panoptic/v1/train.json    shapes_panoptic/v1/train/000000.jpg ...
                                     shapes_panoptic/v1/panoptic_train/000000.png ...

Image i of a split depends on (version, split, i) alone. Work is done in parts that are recorded when they are complete,
so an interrupted run continues where it stopped; a lock lets only one process work; every file appears under its name
only when it is whole.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock
from tqdm import tqdm

from querymask.common.data.segment_maps import encode_segment_map
from querymask.common.data.shape_drawing import CLASS_NAMES, SceneObject, draw_scene
from querymask.common.data.stuff_drawing import STUFF_NAMES, draw_panoptic_scene

# To be raised with every change that alters pictures or annotations
VERSION = 1
SPLIT_SIZES = {"train": 6000, "val": 400}
# Not contiguous, as COCO's are not
CATEGORY_IDS = (1, 2, 4, 5, 7, 9)
CATEGORIES = [{"id": i, "name": name, "supercategory": "shape"} for i, name in zip(CATEGORY_IDS, CLASS_NAMES)]
STUFF_IDS = (11, 12, 14, 17, 20)
STUFF_CATEGORIES = [
    {"id": i, "name": name, "supercategory": "ground", "isthing": 0} for i, name in zip(STUFF_IDS, STUFF_NAMES)
]
PANOPTIC_CATEGORIES = [{**category, "isthing": 1} for category in CATEGORIES] + STUFF_CATEGORIES

_PART_SIZE = 200
_JPEG_QUALITY = 90

logger = logging.getLogger(__name__)


def shapes_folder(root: str | os.PathLike, panoptic: bool = False) -> Path:
    """The folder of the current version under the folder of all data sets."""
    return Path(root) / ("shapes_panoptic" if panoptic else "shapes") / f"v{VERSION}"


def make_shapes(root: str | os.PathLike, split: str, num_images: int | None = None, panoptic: bool = False) -> Path:
    """Make a split of the data set unless it is there already.

    Args:
        root: the folder of all data sets.
        split: "train" or "val".
        num_images: another number of images than ``SPLIT_SIZES[split]``.
        panoptic: of the panoptic form, which has PNG files in the folder ``panoptic_SPLIT`` beside the JSON, too.

    Returns:
        The path of the COCO JSON.
    """
    num_images = SPLIT_SIZES[split] if num_images is None else num_images
    folder = shapes_folder(root, panoptic)
    json_file = folder / f"{split}.json"
    if _is_complete(json_file, num_images, panoptic):
        return json_file
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(str(json_file)):
        if not _is_complete(json_file, num_images, panoptic):  # another process may have made it meanwhile
            _generate(json_file, split, num_images, panoptic)
    return json_file


def panoptic_folder(json_file: Path) -> Path:
    """The folder of the PNG files of a split."""
    return json_file.with_name(f"panoptic_{json_file.stem}")


def _is_complete(json_file: Path, num_images: int, panoptic: bool) -> bool:
    folders = {json_file.with_suffix(""): ".jpg"} | ({panoptic_folder(json_file): ".png"} if panoptic else {})
    if not json_file.exists() or not all(folder.is_dir() for folder in folders):
        return False
    return all(
        {_file_name(index, ending) for index in range(num_images)} <= set(os.listdir(folder))
        for folder, ending in folders.items()
    )


def _file_name(index: int, ending: str) -> str:
    return f"{index:06d}{ending}"


def _generate(json_file: Path, split: str, num_images: int, panoptic: bool) -> None:
    image_folder = json_file.with_suffix("")
    parts_folder = json_file.parent / f"{split}.parts"
    for folder in (image_folder, parts_folder, *([panoptic_folder(json_file)] if panoptic else [])):
        folder.mkdir(exist_ok=True)
    make_image = _make_panoptic_image if panoptic else _make_image
    starts = range(0, num_images, _PART_SIZE)
    part_files = [parts_folder / f"{start:06d}-{min(start + _PART_SIZE, num_images):06d}.json" for start in starts]
    with tqdm(
        total=num_images,
        desc=f"Making the {split} images of {json_file.parent}",
        unit="image",
        mininterval=1.0,
    ) as progress:
        for start, part_file in zip(starts, part_files):
            stop = min(start + _PART_SIZE, num_images)
            if not part_file.exists():
                part: dict[str, list] = {"images": [], "annotations": []}
                for index in range(start, stop):
                    image, annotations = make_image(split, index, image_folder)
                    part["images"].append(image)
                    part["annotations"].extend(annotations)
                    progress.update()
                _write(part_file, json.dumps(part).encode())
            else:
                progress.update(stop - start)

    info = {
        "description": "Textured geometric shapes, made by QueryMask",
        "version": str(VERSION),
    }
    dataset: dict[str, Any] = {
        "info": info,
        "licenses": [],
        "categories": PANOPTIC_CATEGORIES if panoptic else CATEGORIES,
        "images": [],
        "annotations": [],
    }
    for part_file in part_files:
        part = json.loads(part_file.read_bytes())
        dataset["images"].extend(part["images"])
        dataset["annotations"].extend(part["annotations"])
    for number, annotation in enumerate(dataset["annotations"], start=1):
        annotation["id"] = number
    _write(json_file, json.dumps(dataset).encode())
    shutil.rmtree(parts_folder)


def _make_image(split: str, index: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and write one image; returns its entry in the JSON and those of its annotations (without ids)."""
    image, objects = draw_scene(_generator(split, index))
    entry = _write_image(image, index, folder)
    return entry, [{"image_id": entry["id"], **_annotation(o, entry["height"], entry["width"])} for o in objects]


def _make_panoptic_image(split: str, index: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same with stuff: the one annotation has the segments, whose pixels are in a PNG file."""
    image, objects, stuff = draw_panoptic_scene(_generator(split, index))
    entry = _write_image(image, index, folder)
    things = [(CATEGORIES[o.class_index], o.mask, o.is_crowd) for o in objects]
    regions = [(category, stuff == i, False) for i, category in enumerate(STUFF_CATEGORIES) if (stuff == i).any()]
    ids = np.zeros(stuff.shape, dtype=np.int32)
    segments = []
    for number, (category, mask, is_crowd) in enumerate(things + regions, start=1):
        segment_id = number * 1234567 % 2**24  # all three bytes count
        ids[mask] = segment_id
        box = mask_util.toBbox(mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))).astype(int).tolist()
        area = int(np.count_nonzero(mask))
        segment = {"id": segment_id, "category_id": category["id"], "iscrowd": int(is_crowd)}
        segments.append({**segment, "bbox": box, "area": area})
    file_name = _file_name(index, ".png")
    _write(panoptic_folder(folder) / file_name, encode_segment_map(ids))
    return entry, [{"image_id": entry["id"], "file_name": file_name, "segments_info": segments}]


def _generator(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, list(SPLIT_SIZES).index(split), index])


def _write_image(image: np.ndarray, index: int, folder: Path) -> dict[str, Any]:
    """Write a picture, uint8 [H, W, 3] RGB; returns its entry in the JSON."""
    file_name = _file_name(index, ".jpg")
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    _write(folder / file_name, data.tobytes())
    height, width = image.shape[:2]
    return {"id": index + 1, "file_name": file_name, "height": height, "width": width}


def _annotation(scene_object: SceneObject, height: int, width: int) -> dict[str, Any]:
    """COCO's forms of segmentation: polygon where it suffices, else compressed RLE; uncompressed RLE for crowds."""
    if scene_object.outline is not None:
        corners = scene_object.outline.round(2)
        segmentation: Any = [corners.reshape(-1).tolist()]
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
        x0, y0, x1, y1 = *corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()
        box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
    else:
        rle = mask_util.encode(np.asfortranarray(scene_object.mask, dtype=np.uint8))
        box = mask_util.toBbox(rle).tolist()
        if scene_object.is_crowd:
            segmentation = {
                "size": [height, width],
                "counts": _run_lengths(scene_object.mask),
            }
        else:
            segmentation = {
                "size": [height, width],
                "counts": rle["counts"].decode("ascii"),
            }
    return {
        "category_id": CATEGORY_IDS[scene_object.class_index],
        "bbox": box,
        "area": float(mask_util.area(rle)),
        "iscrowd": int(scene_object.is_crowd),
        "segmentation": segmentation,
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE of bool [H, W]: lengths of runs down the columns, the first of them of zeros."""
    pixels = np.concatenate([[False], mask.reshape(-1, order="F"), [not mask[-1, -1]]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(changes, prepend=0).tolist()


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
