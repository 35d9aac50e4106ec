"""COCO evaluation that also copes with missing ground truth, missing predictions and sparse annotation files."""

import json
import os
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from querymask.common import compat

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for what the model gives: boxes, masks or both.

    - Without ground truth in the file, results are written, AP is skipped and a line says so.
    - Without any prediction, AP is 0 (NaN where nothing could have been found) and a line says so.
    - Annotations may lack ``iscrowd`` and ``area``, which pycocotools needs and users' own files often lack. Where
      they lack ``segmentation``, only boxes are evaluated.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=compat.detectron2_is_compiled())
        self._dataset_name = dataset_name
        annotations = list(self._coco_api.anns.values())
        self._do_evaluation = len(annotations) > 0
        for annotation in annotations:
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation:
                annotation["area"] = self._area(annotation)
        self._has_ground_truth = any(not annotation["iscrowd"] for annotation in annotations)
        self._has_true_masks = all("segmentation" in annotation for annotation in annotations)

    def reset(self) -> None:
        super().reset()
        self._has_masks = self._has_boxes = False

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            self._has_masks |= instances.has("pred_masks")
            self._has_boxes |= instances.has("pred_boxes")
            if instances.has("pred_boxes"):
                super().process([record], [output])
            else:
                self._process_without_boxes(record, instances)

    def _process_without_boxes(self, record: dict, instances: Instances) -> None:
        """Detectron2's evaluator needs boxes: it is given some, and they are taken out of its results."""
        boxes = Boxes(instances.scores.new_zeros(len(instances), 4))
        boxed = Instances(instances.image_size, **instances.get_fields(), pred_boxes=boxes)
        super().process([record], [{"instances": boxed}])
        for result in self._predictions[-1]["instances"]:
            del result["bbox"]

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        tasks = [] if self._has_masks and not self._has_boxes else ["bbox"]
        if self._has_masks and self._has_true_masks:
            tasks.append("segm")
        if any(prediction["instances"] for prediction in predictions):
            self._tasks = tasks
            has_truth, self._do_evaluation = self._do_evaluation, self._do_evaluation and bool(tasks)
            super()._eval_predictions(predictions, img_ids)
            self._do_evaluation = has_truth
        else:
            self._no_predictions(tasks, len(predictions))
        if self._has_masks and not self._has_true_masks:
            self._logger.warning(f"{self._dataset_name} has annotations without segmentation: no mask AP")
        if not self._do_evaluation:
            self._logger.info(
                f"{self._dataset_name} has no ground truth: AP is skipped, the results are in {self._results_file()}"
            )
        elif not self._has_ground_truth:
            self._logger.info(f"{self._dataset_name} has no ground truth other than crowds: AP is NaN")

    def _no_predictions(self, tasks: Sequence[str], num_images: int) -> None:
        with PathManager.open(self._results_file(), "w") as file:
            json.dump([], file)
        self._logger.warning(f"the model predicted nothing on the {num_images} images of {self._dataset_name}")
        if self._do_evaluation:
            value = 0.0 if self._has_ground_truth else float("nan")
            self._results.update({task: dict.fromkeys(METRICS, value) for task in tasks})

    def _results_file(self) -> str:
        return os.path.join(self._output_dir, "coco_instances_results.json")

    def _area(self, annotation: dict[str, Any]) -> float:
        """Pixels of an annotation's mask, of its box if it has no mask."""
        if "segmentation" in annotation:
            return float(mask_util.area(self._coco_api.annToRLE(annotation)))
        return float(annotation["bbox"][2] * annotation["bbox"][3])
