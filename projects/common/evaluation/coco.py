"""COCO evaluation that also copes with missing ground truth, missing predictions and sparse annotation files.

It gives boundary AP as well, and evaluates result files without their model.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from querymask.common import compat
from querymask.common.evaluation.boundary import BoundaryEval
from querymask.common.evaluation.scores import METRICS, evaluate, load_results


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for what the model gives: boxes, masks or both.

    - Without ground truth in the file, results are written, AP is skipped and a line says so.
    - Without any prediction, AP is 0 (NaN where nothing could have been found) and a line says so.
    - Annotations may lack ``iscrowd`` and ``area``, which pycocotools needs and users' own files often lack. Where
      they lack ``segmentation``, only boxes are evaluated.

    Args:
        output_dir: where predictions and results are written; None: nowhere.
        boundary: whether masks get boundary AP, too, as task "boundary".
    """

    def __init__(self, dataset_name: str, output_dir: str | None, boundary: bool = False) -> None:
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=compat.detectron2_is_compiled())
        self._dataset_name = dataset_name
        self._boundary = boundary
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

    def add_results(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Take detections in COCO's result format as the predictions on all images.

        Raises:
            ValueError: an image or a category that the data set does not have.
        """
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in self._coco_api.getCatIds()}
        for key, known in (("image_id", set(self._coco_api.getImgIds())), ("category_id", set(ids))):
            if unknown := {result[key] for result in results} - known:
                shown = ", ".join(map(str, sorted(unknown, key=str)[:6])) + (", ..." if len(unknown) > 6 else "")
                raise ValueError(
                    f"{len(unknown)} values of {key} in the results are none of {self._dataset_name}: {shown}. "
                    "Evaluate on the data set that the results were made on"
                )
        by_image = defaultdict(list)
        for result in results:
            by_image[result["image_id"]].append({**result, "category_id": ids[result["category_id"]]})
        self._has_boxes |= any("bbox" in result for result in results)
        self._has_masks |= any("segmentation" in result for result in results)
        self._predictions += [{"image_id": i, "instances": by_image[i]} for i in self._coco_api.getImgIds()]

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        tasks = [] if self._has_masks and not self._has_boxes else ["bbox"]
        if self._has_masks and self._has_true_masks:
            tasks.append("segm")
        boundary = self._boundary and "segm" in tasks
        if any(prediction["instances"] for prediction in predictions):
            self._tasks = tasks
            has_truth, self._do_evaluation = self._do_evaluation, self._do_evaluation and bool(tasks)
            super()._eval_predictions(predictions, img_ids)
            self._do_evaluation = has_truth
            if boundary and has_truth:
                self._eval_boundaries(predictions, img_ids)
        else:
            self._no_predictions([*tasks, "boundary"] if boundary else tasks, len(predictions))
        if self._has_masks and not self._has_true_masks:
            self._logger.warning(f"{self._dataset_name} has annotations without segmentation: no mask AP")
        if not self._do_evaluation:
            where = f", the results are in {self._results_file()}" if self._output_dir else ""
            self._logger.info(f"{self._dataset_name} has no ground truth: AP is skipped{where}")
        elif not self._has_ground_truth:
            self._logger.info(f"{self._dataset_name} has no ground truth other than crowds: AP is NaN")

    def _eval_boundaries(self, predictions: list[dict[str, Any]], img_ids: Any) -> None:
        """To be called after the other tasks, when categories have the ids of the data set."""
        results = [result for prediction in predictions for result in prediction["instances"]]
        evaluation = BoundaryEval(self._coco_api, load_results(self._coco_api, results, masks=True))
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        self._results["boundary"] = evaluate(evaluation, self._metadata.get("thing_classes") or ())

    def _no_predictions(self, tasks: Sequence[str], num_images: int) -> None:
        if self._output_dir:
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
