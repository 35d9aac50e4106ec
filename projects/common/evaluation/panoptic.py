"""Evaluation of panoptic maps: of a model, and of result files in COCO's panoptic format."""

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator
from detectron2.utils import comm

from querymask.common.data.annotations import AnnotationError, read_dataset, read_json
from querymask.common.data.annotations.findings import show
from querymask.common.data.annotations.images import read_id
from querymask.common.data.annotations.segments import MAX_SEGMENT_ID
from querymask.common.data.segment_maps import encode_segment_map, entry_segment_map, read_segment_map
from querymask.common.evaluation.panoptic_quality import compare_segments, missed_segments, quality
from querymask.common.transfer import HostCopy

RESULTS_FILE = "predictions.json"
"""As Detectron2's evaluator calls it; the folder of its PNG files is that without the ending."""

Scores = dict[str, dict[str, float]]

logger = logging.getLogger(__name__)


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of all classes, of things and of stuff, and of each class; what panopticapi gives, without it.

    Segments of the data set's images that the model has not seen count as missed, with a line.

    Args:
        output_dir: where results are written in COCO's format, as ``predictions.json`` and ``predictions/*.png``; None:
            nowhere.
        boundary: whether there is boundary PQ, too, as task "panoptic_boundary".
        distributed: whether every process has a part of the predictions.

    Raises:
        AnnotationError: the ground truth gives no right number; naming file, thing and remedy.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None, boundary: bool = False, distributed: bool = True
    ) -> None:
        self._name = dataset_name
        self._output_dir = output_dir
        self._tasks = {"panoptic_seg": False} | ({"panoptic_boundary": True} if boundary else {})
        self._distributed = distributed
        self._entries = {entry["image_id"]: entry for entry in read_dataset(dataset_name)}
        self._classes = PanopticClasses(dataset_name)
        for entry in self._entries.values():
            if "pan_seg_file_name" not in entry:
                raise AnnotationError(
                    f"data set {dataset_name}: {entry['file_name']} has no 'pan_seg_file_name'. Give the PNG file of "
                    "its segments, and their 'segments_info', or another evaluator_type."
                )
        folders = {os.path.dirname(entry["pan_seg_file_name"]) for entry in self._entries.values()}
        self._root = os.path.commonpath(folders)
        self.reset()

    def reset(self) -> None:
        self._counts: dict[Any, dict[str, np.ndarray]] = {}
        self._results: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            self.add(record["image_id"], HostCopy(ids).read().numpy(), segments)

    def add(self, image_id: Any, ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> None:
        """Compare the map of an image, integers [H, W] with 0 as void, with its ground truth, and write it.

        Args:
            segments: with ``id`` and ``category_id``, a class, each with pixels in the map.
        """
        entry, names = self._entry(image_id), self._classes.names
        for segment in segments:
            if not 0 <= segment["category_id"] < len(names):
                raise ValueError(
                    f"the model predicts class {segment['category_id']}, {self._name} has classes 0 to "
                    f"{len(names) - 1}: set the method's NUM_CLASSES to the data set's number of classes"
                )
        truth = entry_segment_map(entry)
        if truth.shape != ids.shape:
            raise ValueError(
                f"{entry['file_name']}: the panoptic map is {ids.shape[1]}x{ids.shape[0]} (width x height), the image "
                f"{truth.shape[1]}x{truth.shape[0]}"
            )
        self._counts[image_id] = {
            task: compare_segments(truth, entry["annotations"], ids, segments, len(names), boundary)
            for task, boundary in self._tasks.items()
        }
        if self._output_dir is not None:
            self._results.append(self._written(entry, ids, segments))

    def add_result(self, image_id: Any, name: str, segments: Sequence[Mapping[str, Any]], source: str) -> None:
        """:meth:`add` of a result: of its PNG file, and its segments with ids of categories.

        Args:
            source: for messages.
        """
        entry = self._entry(image_id)
        if image_id in self._counts:
            raise AnnotationError(f"{source}: 'image_id' {image_id!r} is that of another, too. Give an image one map.")
        classes = {key: index for index, key in self._classes.category_ids.items()}
        for segment in segments:
            if segment.get("category_id") not in classes:
                raise AnnotationError(
                    f"{source}: 'category_id' {segment.get('category_id')!r} is none of {self._name}. Evaluate on the "
                    "data set that the results were made on."
                )
        ids = read_segment_map(name, (entry["height"], entry["width"]), [segment["id"] for segment in segments])
        self.add(image_id, ids, [{**s, "category_id": classes[s["category_id"]]} for s in segments])

    def _entry(self, image_id: Any) -> dict[str, Any]:
        if image_id not in self._entries:
            raise AnnotationError(
                f"{self._name}: image_id {image_id!r} of the results is none of its images. Evaluate on the data set "
                "that they were made on."
            )
        return self._entries[image_id]

    def _written(self, entry: Mapping[str, Any], ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> dict:
        """Write the PNG file of an image; returns its entry in the JSON file."""
        name = os.path.relpath(entry["pan_seg_file_name"], self._root)
        path = Path(self._output_dir, Path(RESULTS_FILE).stem, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_segment_map(ids))
        numbers = self._classes.category_ids
        listed = [
            {**{k: v for k, v in segment.items() if k != "isthing"}, "category_id": numbers[segment["category_id"]]}
            for segment in segments
        ]
        return {"image_id": entry["image_id"], "file_name": name, "segments_info": listed}

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> Scores:
        """Scores in percent by task; empty in other processes than the main one.

        Args:
            img_ids: evaluate on these images alone.
        """
        entries = self._entries if img_ids is None else {key: self._entries[key] for key in img_ids}
        counts, results = self._counts, self._results
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            parts = comm.gather((counts, results), dst=0)
            if not comm.is_main_process():
                return {}
            counts = {key: value for part in parts for key, value in part[0].items()}
            results = list(itertools.chain(*(part[1] for part in parts)))
        if self._output_dir is not None:
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
            Path(self._output_dir, RESULTS_FILE).write_text(json.dumps({"annotations": results}))
        if missed := len(entries.keys() - counts.keys()):
            logger.warning(
                f"{self._name}: there is no panoptic map of {missed} of the {len(entries)} images: their "
                "segments count as missed"
            )
        scores = {}
        names, num_things = self._classes.names, self._classes.num_things
        for task in self._tasks:
            total = sum(
                counts[key][task] if key in counts else missed_segments(entry["annotations"], len(names))
                for key, entry in entries.items()
            )
            scores[task] = quality(total, names, num_things)
        return scores


class ApiPanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, by the package panopticapi, which leaves PNG files of the results beside its JSON file.

    Args:
        dataset_name: with an annotation file; every image of it needs a prediction.
        output_dir: where results are written.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name, output_dir)
        PanopticClasses(dataset_name)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take maps; Detectron2 writes into the segments that it is given."""
        maps = ((output["panoptic_seg"][0], list(map(dict, output["panoptic_seg"][1]))) for output in outputs)
        super().process(inputs, [{"panoptic_seg": one} for one in maps])

    def evaluate(self) -> Scores | None:
        """Scores in percent of all classes, things and stuff; None in other processes than the main one."""
        folder = Path(self._output_dir, Path(RESULTS_FILE).stem)
        folder.mkdir(parents=True, exist_ok=True)
        for prediction in self._predictions:
            (folder / prediction["file_name"]).write_bytes(prediction["png_string"])
        return super().evaluate()


class PanopticClasses:
    """The classes of a panoptic data set: the first are things, the others stuff.

    Attributes:
        names: of all.
        num_things: how many are things.
        category_ids: of the classes, in the data set's files.

    Raises:
        ValueError: the data set is of another form.
    """

    def __init__(self, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        things = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        stuff = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self.names = [str(name) for name in metadata.get("thing_classes") or ()]
        self.num_things = len(things)
        self.category_ids = {index: key for numbers in (things, stuff) for key, index in numbers.items()}
        if sorted(things.values()) != list(range(len(things))) or sorted(stuff.values()) != list(
            range(len(things), len(self.names))
        ):
            raise ValueError(
                f"{dataset_name}: its {len(self.names)} thing_classes are not {len(things)} classes of "
                f"thing_dataset_id_to_contiguous_id, from 0 on, and then {len(stuff)} of "
                "stuff_dataset_id_to_contiguous_id. Use the data set without _separated, or number the classes so, "
                "and give all names as thing_classes"
            )


def evaluate_panoptic_results(path: str | Path, dataset_name: str, boundary: bool = False) -> Scores:
    """Scores of a result file in COCO's panoptic format on a panoptic data set; nothing is written.

    The PNG files are in the folder beside it of the same name, without the ending.

    Raises:
        AnnotationError: the file has no results of the data set.
    """
    evaluator = PanopticEvaluator(dataset_name, None, boundary, distributed=False)
    content = read_json(path, "the predictions.json of a panoptic evaluation")
    annotations = content.get("annotations") if isinstance(content, Mapping) else None
    if not isinstance(annotations, list):
        raise AnnotationError(f"{path}: it has no 'annotations'. Give the predictions.json of a panoptic evaluation.")
    for number, annotation in enumerate(annotations):
        where = f"{path}: annotations[{number}]"
        image_id, name, segments = _read_result(annotation, where)
        evaluator.add_result(image_id, str(Path(path).with_suffix("") / name), segments, where)
    return evaluator.evaluate()


def is_panoptic_result(path: str | Path) -> bool:
    """Whether a result file is an object, as panoptic ones are; detections are a list."""
    with open(path, encoding="utf-8-sig") as file:
        return file.read(256).lstrip().startswith("{")


def _read_result(annotation: Any, where: str) -> tuple[int | str, str, list[dict[str, Any]]]:
    """The image id, the name of the PNG file and the segments of a result."""
    segments = annotation.get("segments_info") if isinstance(annotation, Mapping) else None
    if not isinstance(segments, list) or not all(isinstance(segment, Mapping) for segment in segments):
        raise AnnotationError(f"{where}: 'segments_info' is {show(segments)}. Give results in COCO's panoptic format.")
    image_id, name = read_id(annotation.get("image_id")), annotation.get("file_name")
    if image_id is None or not isinstance(name, str) or not name:
        raise AnnotationError(f"{where}: 'image_id' or 'file_name' is missing. Give both.")
    ids = [segment.get("id") for segment in segments]
    if not all(type(key) is int and 0 < key <= MAX_SEGMENT_ID for key in ids) or len(set(ids)) < len(ids):
        raise AnnotationError(f"{where}: ids of its segments are {show(ids)}. Give each one of its own, from 1 on.")
    return image_id, name, segments
