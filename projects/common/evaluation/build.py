"""Which evaluators a data set gets."""

import importlib.util
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, DatasetEvaluator, DatasetEvaluators

from querymask.common.data.annotations import EVALUATOR_TYPE, is_panoptic
from querymask.common.data.image_files import ImageReader
from querymask.common.evaluation.coco import InstanceEvaluator
from querymask.common.evaluation.panoptic import ApiPanopticEvaluator, PanopticEvaluator
from querymask.common.evaluation.pictures import PictureWriter
from querymask.common.fonts import set_font
from querymask.common.transfer import HostCopy, instances_to_host


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator for the ``evaluator_type`` in the data set's metadata (COCO's if it has none), and the pictures.

    Results go to ``OUTPUT_DIR/inference``, pictures to ``OUTPUT_DIR/predictions``, each in a folder of the data set's
    name if ``DATASETS.TEST`` has more than one. ``TEST.DETECTIONS_PER_IMAGE`` is the limit of detections.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    subfolder = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
    output_dir = results_folder(cfg, dataset_name)
    if kind in ("coco", "lvis"):
        evaluator: DatasetEvaluator = InstanceEvaluator(
            dataset_name,
            output_dir,
            cfg.TEST.BOUNDARY_AP,
            cfg.TEST.DETECTIONS_PER_IMAGE,
            {} if cfg.TEST.SLICE.SIZE else num_queries(cfg),  # every slice has its own
        )
    elif is_panoptic(dataset_name):
        evaluator = _panoptic_evaluator(cfg, dataset_name, output_dir)
    elif kind == "cityscapes_instance":
        for key, value, off in (("BOUNDARY_AP", cfg.TEST.BOUNDARY_AP, False), ("SLICE.SIZE", cfg.TEST.SLICE.SIZE, 0)):
            if value:
                raise ValueError(
                    f"TEST.{key} is for data sets with COCO's or LVIS's evaluation, and {dataset_name} has "
                    f"evaluator_type {kind!r}: set it to {off}"
                )
        _require("cityscapesscripts", "cityscapesScripts", dataset_name)
        evaluator = CityscapesInstanceEvaluator(dataset_name)
    else:
        raise ValueError(
            f"data set {dataset_name} has evaluator_type {kind!r}; known are coco, lvis, {EVALUATOR_TYPE} and "
            "cityscapes_instance. Set it with MetadataCatalog.get(name).set(evaluator_type=...), or override "
            "Trainer.build_evaluator"
        )
    if cfg.VIS_NUM_IMAGES < 1:
        return evaluator
    folder = os.path.join(cfg.OUTPUT_DIR, "predictions", subfolder)
    set_font(cfg.VIS_FONT)
    reader = ImageReader.from_config(cfg)
    pictures = PictureWriter(dataset_name, folder, cfg.VIS_NUM_IMAGES, cfg.VIS_SCORE_THRESHOLD, reader)
    return HostEvaluators([evaluator, pictures])


def _panoptic_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Detectron2's where the package panopticapi is installed, unless there is no file for it or it lacks a metric."""
    has_files = MetadataCatalog.get(dataset_name).get("panoptic_json") is not None
    if has_files and not cfg.TEST.BOUNDARY_AP and importlib.util.find_spec("panopticapi") is not None:
        return ApiPanopticEvaluator(dataset_name, output_dir)
    return PanopticEvaluator(dataset_name, output_dir, cfg.TEST.BOUNDARY_AP)


class HostEvaluators(DatasetEvaluators):
    """Evaluators of the same predictions, which are copied to the host once."""

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        super().process(inputs, list(map(_on_host, outputs)))


def _on_host(output: dict) -> dict:
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        return {**output, "panoptic_seg": (HostCopy(ids).read(), segments)}
    return {**output, "instances": instances_to_host(output["instances"])}


def results_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where the results of a data set go."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name if len(cfg.DATASETS.TEST) > 1 else "")


def num_queries(cfg: CfgNode) -> dict[str, int]:
    """How many objects the model can find in an image, by the key that says it; empty if its method has no such key."""
    section = cfg.MODEL.META_ARCHITECTURE.upper()
    number = cfg.MODEL.get(section, CfgNode()).get("NUM_QUERIES")
    return {} if number is None else {f"MODEL.{section}.NUM_QUERIES": number}


def _require(module: str, package: str, dataset_name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"evaluation on {dataset_name} needs the package {package}: pip install {package}")
