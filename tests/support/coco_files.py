"""A small data set in COCO's format with perfect detections, for tests that spoil its annotations."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

HEIGHT, WIDTH = 64, 96
Change = Callable[[dict[str, Any]], Any]


def squares(count: int = 4) -> dict[str, Any]:
    """Content of an annotation file: one image with ``count`` squares of class "cell", of 10 pixels, or 4 if many."""
    columns, pitch, side = (4, 20, 10) if count <= 8 else (16, 6, 4)
    annotations = []
    for i in range(count):
        x, y = 1 + pitch * (i % columns), 1 + pitch * (i // columns)
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        common = {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": side**2}
        annotations.append({**common, "bbox": [x, y, side, side], "segmentation": [polygon]})
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": annotations,
    }


def runs(polygon: list[float]) -> list[int]:
    """Lengths of runs of a polygon's mask, down the columns, the first of background."""
    mask = mask_util.decode(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))[..., 0]
    pixels = np.concatenate([[0], mask.reshape(-1, order="F")])
    edges = np.flatnonzero(np.diff(pixels)).tolist()
    return np.diff([0, *edges, HEIGHT * WIDTH]).tolist()


def detections(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Results that equal annotations whose masks are polygons."""
    found = []
    for number, annotation in enumerate(content["annotations"]):
        rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH))
        mask = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
        kept = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        found.append({**kept, "score": 0.9 - 0.001 * number, "segmentation": mask})
    return found


def each(**values: Any) -> Change:
    """A change that sets these keys in every annotation."""
    return lambda content: [a.update(copy.deepcopy(values)) for a in content["annotations"]]


def write(
    folder: Path, change: Change = lambda content: None, change_results: Change = lambda results: None, count: int = 4
) -> tuple[Path, Path]:
    """Write image, annotations and results; the annotations are changed after the detections were taken from them."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    content = squares(count)
    results = detections(content)
    change(content)
    change_results(results)
    truth, found = folder / "truth.json", folder / "results.json"
    truth.write_text(json.dumps(content))
    found.write_text(json.dumps(results))
    return truth, found
