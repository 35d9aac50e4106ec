"""Evaluation: evaluators chosen by the data set, boundary AP, result files, pictures of predictions, tables."""

from querymask.common.evaluation.boundary import BoundaryEval, mask_boundary
from querymask.common.evaluation.build import build_evaluator
from querymask.common.evaluation.coco import InstanceEvaluator
from querymask.common.evaluation.pictures import PictureWriter
from querymask.common.evaluation.report import results_table

__all__ = ["BoundaryEval", "InstanceEvaluator", "PictureWriter", "build_evaluator", "mask_boundary", "results_table"]
