"""Evaluation by COCO's and LVIS's rules of what a model gives: boxes, masks or both; of result files as well.

Ground truth comes from the checked reader of annotations, so that what training leaves out does not count here.
"""

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from querymask.common import compat
from querymask.common.data.annotations import AnnotationError
from querymask.common.data.segmentation import encode_masks
from querymask.common.evaluation.boundary import BoundaryEval
from querymask.common.evaluation.lvis import FederatedEval, best_of_images, check_lvis, frequency_groups
from querymask.common.evaluation.scores import MAX_DETECTIONS, METRICS, evaluate, load_results
from querymask.common.evaluation.truth import category_ids, dataset_truth, index
from querymask.common.run_length_masks import RunLengthMasks
from querymask.common.transfer import instances_to_host

Results = list[dict[str, Any]]
Scores = dict[str, dict[str, float]]

logger = logging.getLogger(__name__)


class InstanceEvaluator(DatasetEvaluator):
    """Detectron2's evaluator, in its place, for models that give boxes, masks or both.

    - Without ground truth in the file, results are written, AP is skipped and a line says so.
    - Without any prediction, AP is 0 (NaN where nothing could have been found) and a line says so.
    - Where annotations lack masks, only boxes are evaluated.
    - Images with more objects than can count are told.

    Args:
        output_dir: where predictions and results are written; None: nowhere.
        boundary: whether masks get boundary AP, too, as task "boundary".
        max_detections: so many detections of highest score count: of each class in an image by COCO's rules, of an
            image by LVIS's.
        num_queries: the most objects that the model can find in an image, by the key that says it, for a line where
            there are more.
        distributed: whether every process has a part of the predictions.

    Raises:
        AnnotationError: the ground truth gives no right number; naming file, thing, key and remedy.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None,
        boundary: bool = False,
        max_detections: int = MAX_DETECTIONS,
        num_queries: Mapping[str, int] = MappingProxyType({}),
        distributed: bool = True,
    ) -> None:
        if max_detections < 1:
            raise ValueError(f"the limit of detections (TEST.DETECTIONS_PER_IMAGE) is {max_detections}: set at least 1")
        metadata = MetadataCatalog.get(dataset_name)
        self._name = dataset_name
        self._output_dir = output_dir
        self._boundary = boundary
        self._max_detections = max_detections
        self._num_queries = num_queries
        self._federated = metadata.get("evaluator_type") == "lvis"
        self._distributed = distributed
        content = dataset_truth(dataset_name)
        if self._federated:
            check_lvis(content, dataset_name)
        self._ids = category_ids(dataset_name, content)
        self._class_names = [] if self._federated else [category["name"] for category in content["categories"]]
        self._truth = index(content)
        annotations = self._truth.dataset["annotations"]
        self._has_annotations = len(annotations) > 0
        self._has_ground_truth = any(not annotation["iscrowd"] for annotation in annotations)
        self._without_mask = sum("segmentation" not in annotation for annotation in annotations)
        self.reset()

    @property
    def content(self) -> Mapping[str, Any]:
        """The checked ground truth, as a COCO file has it."""
        return self._truth.dataset

    def reset(self) -> None:
        self._predictions: Results = []
        self._seen: list[Any] = []
        self._given: set[str] = set()  # of "boxes" and "masks"

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            instances = instances_to_host(output["instances"])
            self._given |= {what for what in ("boxes", "masks") if instances.has(f"pred_{what}")}
            self._seen.append(record["image_id"])
            self._predictions += _to_results(instances, record["image_id"])

    def add_results(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Take detections of all images in COCO's result format, with category ids and masks of this data set."""
        self._predictions += [{**result, "category_id": self._ids[result["category_id"]]} for result in results]
        self._seen += self._truth.getImgIds()
        for key, what in (("bbox", "boxes"), ("segmentation", "masks")):
            self._given |= {what} if any(key in result for result in results) else set()

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> Scores:
        """Scores by task ("bbox", "segm", "boundary"); empty in other processes than the main one.

        Args:
            img_ids: evaluate on these images alone.
        """
        predictions, seen, given = self._predictions, self._seen, self._given
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            parts = comm.gather((predictions, seen, given), dst=0)
            if not comm.is_main_process():
                return {}
            predictions, seen = (list(itertools.chain(*(part[i] for part in parts))) for i in (0, 1))
            given = set().union(*(part[2] for part in parts))
        results = self._with_category_ids(predictions)
        self._write(results)
        if not self._has_annotations:
            where = f", the results are in {self._results_file()}" if self._output_dir else ""
            logger.info(f"{self._name} has no ground truth: AP is skipped{where}")
            return {}
        self._compare_images(seen, img_ids)
        self._tell_limits(img_ids)
        tasks = self._tasks(given)
        if not results:
            logger.warning(f"the model predicted nothing on the {len(set(seen))} images of {self._name}")
            value = 0.0 if self._has_ground_truth else float("nan")
            return {task: dict.fromkeys(METRICS, value) for task in tasks}
        if not self._has_ground_truth:
            logger.info(f"{self._name} has no ground truth other than crowds: AP is NaN")
        return {task: self._evaluate_task(task, results, img_ids) for task in tasks}

    def _tasks(self, given: set[str]) -> list[str]:
        tasks = [] if given == {"masks"} else ["bbox"]
        if "masks" in given and self._without_mask:
            total = len(self._truth.dataset["annotations"])
            logger.warning(
                f"{self._name} has annotations without segmentation: no mask AP ({self._without_mask} of {total})"
            )
        elif "masks" in given:
            tasks += ["segm", "boundary"] if self._boundary else ["segm"]
        return tasks

    def _evaluate_task(self, task: str, results: Results, img_ids: Sequence[Any] | None) -> dict[str, float]:
        groups = None
        if self._federated:
            results = best_of_images(results, self._max_detections)
            groups = frequency_groups(self._truth)
        found = load_results(self._truth, results, masks=task != "bbox")
        evaluation: COCOeval
        if self._federated:
            evaluation = FederatedEval(self._truth, found, task)
        elif task == "boundary":
            evaluation = BoundaryEval(self._truth, found)
        else:
            evaluation = compat.coco_evaluation()(self._truth, found, task)
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        return evaluate(evaluation, self._class_names, self._max_detections, groups)

    def _with_category_ids(self, predictions: Results) -> Results:
        """Predictions of class indices as results with the data set's category ids."""
        ids = {index: key for key, index in self._ids.items()}
        unknown = sorted({p["category_id"] for p in predictions} - set(ids))
        if unknown:
            raise ValueError(
                f"the model predicts class {unknown[0]}, {self._name} has classes 0 to {len(ids) - 1}: set the "
                "method's NUM_CLASSES to the data set's number of classes"
            )
        return [{**prediction, "category_id": ids[prediction["category_id"]]} for prediction in predictions]

    def _compare_images(self, seen: Sequence[Any], img_ids: Sequence[Any] | None) -> None:
        known = set(self._truth.getImgIds())
        if strangers := [i for i in seen if i not in known]:
            raise AnnotationError(
                f"{self._name}: {len(strangers)} of {len(seen)} images that the model has seen, first image_id "
                f"{strangers[0]!r}, are not in its annotation file {MetadataCatalog.get(self._name).get('json_file')}. "
                "Register the file with the images of the data set."
            )
        if img_ids is None and (missed := len(known - set(seen))):
            logger.warning(
                f"{self._name}: the model has not seen {missed} of the {len(known)} images of the annotation file: "
                "their objects count as missed"
            )

    def _tell_limits(self, img_ids: Sequence[Any] | None) -> None:
        chosen = None if img_ids is None else set(img_ids)
        counts = Counter(
            annotation["image_id"]
            for annotation in self._truth.dataset["annotations"]
            if not annotation["iscrowd"] and (chosen is None or annotation["image_id"] in chosen)
        )
        tell_limits(self._name, counts, self._max_detections, self._num_queries)

    def _write(self, results: Results) -> None:
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(self._results_file(), "w") as file:
                json.dump(results, file)

    def _results_file(self) -> str:
        return os.path.join(self._output_dir, f"{'lvis' if self._federated else 'coco'}_instances_results.json")


def tell_limits(name: str, counts: Mapping[Any, int], max_detections: int, num_queries: Mapping[str, int]) -> None:
    """One line for each limit that images have more objects than.

    Args:
        counts: objects of each image.
        max_detections, num_queries: as for :class:`InstanceEvaluator`.
    """
    highest = max(counts.values(), default=0)
    for limit, what in (
        (max_detections, "count as detections: raise TEST.DETECTIONS_PER_IMAGE (--max-detections of tools)"),
        *((number, f"queries of the model can find: raise {key}, and train") for key, number in num_queries.items()),
    ):
        if highest > limit:
            number = sum(count > limit for count in counts.values())
            logger.warning(f"{name}: {number} images have more objects (up to {highest}) than the {limit} that {what}")


def _to_results(instances: Instances, image_id: Any) -> Results:
    """Detectron2's conversion needs boxes, and counts run lengths mask by mask: it is given boxes alone."""
    fields = dict(instances.get_fields())
    masks = fields.pop("pred_masks", None)
    boxes = fields.get("pred_boxes", Boxes(torch.zeros(len(instances), 4)))
    results = instances_to_coco_json(Instances(instances.image_size, **{**fields, "pred_boxes": boxes}), image_id)
    if "pred_boxes" not in fields:
        for result in results:
            del result["bbox"]
    if masks is not None and results:
        run_lengths = masks.texts() if isinstance(masks, RunLengthMasks) else encode_masks(masks.to(torch.bool).numpy())
        for result, lengths in zip(results, run_lengths, strict=True):
            result["segmentation"] = lengths
    return results
