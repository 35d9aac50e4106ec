"""Evaluators, chosen by the data set."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator

from querymask.common import compat


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator that ``evaluator_type`` of the data set's metadata names (COCO's if it has none)."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    if kind == "coco":
        return COCOEvaluator(
            dataset_name,
            output_dir=output_dir,
            use_fast_impl=compat.detectron2_is_compiled(),
        )
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"data set {dataset_name} has evaluator_type {kind!r}; known are coco and lvis"
    )
