"""A small data set in COCO's panoptic format, for tests that spoil it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from querymask.common.data.segment_maps import encode_segment_map

HEIGHT, WIDTH = 40, 60
CATEGORIES = [
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 5, "name": "cat", "isthing": 1},
    {"id": 3, "name": "dog", "isthing": 1},
    {"id": 9, "name": "grass", "isthing": 0},
]
"""Stuff of ids between those of things: classes are dog, cat, sky, grass."""
IDS = (70_000, 300, 7, 12)
Change = Callable[[dict[str, Any]], Any]


def segment_map() -> np.ndarray:
    """Sky in two parts around a dog (300), void, a crowd of cats (7) that hides a part of the dog, grass (12)."""
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    ids[:20] = IDS[0]
    ids[20:36] = IDS[3]
    ids[10:30, 20:30] = IDS[1]
    ids[25:30, 25:50] = IDS[2]
    return ids


def content(names: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    """An annotation file of images that all have this map; names of files are without ending."""
    ids = segment_map()
    segments = []
    for key, category in zip(IDS, (2, 3, 5, 9)):
        ys, xs = np.nonzero(ids == key)
        box = [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
        segment = {"id": key, "category_id": category, "iscrowd": int(key == IDS[2])}
        segments.append({**segment, "bbox": box, "area": len(xs)})
    images = [{"id": i, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for i, n in enumerate(names, 1)]
    annotations = [
        {"image_id": i, "file_name": f"{n}.png", "segments_info": [dict(s) for s in segments]}
        for i, n in enumerate(names, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [dict(c) for c in CATEGORIES]}


def write_panoptic(
    folder: Path, part: str = "val", names: tuple[str, ...] = ("a", "b"), change: Change = lambda content: None
) -> Path:
    """Write ``panoptic_PART.json``, the folder of its PNG files and that of its images; returns the JSON file."""
    pngs, images = folder / f"panoptic_{part}", folder / part
    for place in (pngs, images):
        place.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(len(name)).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.jpg")
        (pngs / f"{name}.png").write_bytes(encode_segment_map(segment_map()))
    document = content(names)
    change(document)
    path = folder / f"panoptic_{part}.json"
    path.write_text(json.dumps(document))
    return path
