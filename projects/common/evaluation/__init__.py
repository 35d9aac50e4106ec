"""Evaluation: evaluators chosen by the data set, pictures of predictions, tables."""

from querymask.common.evaluation.build import build_evaluator
from querymask.common.evaluation.coco import InstanceEvaluator
from querymask.common.evaluation.pictures import PictureWriter
from querymask.common.evaluation.report import results_table

__all__ = ["InstanceEvaluator", "PictureWriter", "build_evaluator", "results_table"]
