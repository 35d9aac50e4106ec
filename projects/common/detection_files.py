"""Detections of any number of images as COCO JSON, written image by image: memory does not grow with their number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from querymask.common.detections import Detections
from querymask.common.engine.checks import get_key, num_classes_key

DETECTIONS = "detections.json"
IMAGES = "images.json"


class DetectionWriter:
    """Writes two files that belong together; what is written is whole also where the work ends early.

    ``detections.json`` has COCO's results, which tools/evaluate_results.py reads; ``images.json`` their images and
    categories as a COCO data set without annotations: ``COCO("images.json").loadRes("detections.json")``.

    Args:
        prefix: of the paths of both; "pictures/" or "video.".
        categories: by class, as ``model_categories`` gives them.
    """

    def __init__(self, prefix: str, categories: Sequence[Mapping[str, Any]]) -> None:
        self._category_ids = [category["id"] for category in categories]
        head = f'{{"categories": {json.dumps(list(categories), ensure_ascii=False)},\n"images": ['
        self._images = _JsonArray(prefix + IMAGES, head, "]}\n")
        self._detections = _JsonArray(prefix + DETECTIONS, "[", "]\n")

    def __enter__(self) -> "DetectionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._images.close()
        self._detections.close()

    def add(self, detections: Detections, size: tuple[int, int], image_id: Any, file_name: str) -> None:
        """Write the detections of an image, scaled to its size (height, width)."""
        height, width = size
        self._images.add({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for result in detections.to_coco(image_id, self._category_ids, size):
            self._detections.add(result)


def model_categories(cfg: CfgNode, names: Sequence[str]) -> list[dict[str, Any]]:
    """COCO's categories of a model's classes, in their order.

    The ids are those of DATASETS.TEST where it has as many classes, else numbers from 1.

    Args:
        names: of the classes; where there are none, they are called by their number.
    """
    key = num_classes_key(cfg)
    number = len(names) if names or key is None else get_key(cfg, key)
    ids = dict(enumerate(range(1, number + 1)))
    for dataset in cfg.DATASETS.TEST[:1]:
        metadata = MetadataCatalog.get(dataset)
        things = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        for known in (things, things | (metadata.get("stuff_dataset_id_to_contiguous_id") or {})):  # of panoptic sets
            if sorted(known.values()) == list(range(number)):
                ids = {index: category for category, index in known.items()}
    return [{"id": ids[i], "name": names[i] if names else f"class {i}"} for i in range(number)]


class _JsonArray:
    """A file with a JSON array, of which one item is in memory."""

    def __init__(self, path: str, head: str, tail: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("w", encoding="utf-8")
        self._file.write(head)
        self._tail, self._separator = tail, "\n"

    def add(self, item: Mapping[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(item, ensure_ascii=False))
        self._separator = ",\n"

    def close(self) -> None:
        self._file.write(self._tail)
        self._file.close()
