"""The one reader of annotations: COCO-style files and registered data sets, checked whole, mended or refused."""

from querymask.common.data.annotations.dictionaries import clean_entries, clean_record, read_dataset
from querymask.common.data.annotations.findings import AnnotationError, Findings
from querymask.common.data.annotations.images import ImageInfo
from querymask.common.data.annotations.panoptic import (
    EVALUATOR_TYPE,
    class_metadata,
    clean_panoptic,
    is_panoptic,
    load_coco_panoptic_json,
    number_classes,
    panoptic_entries,
)
from querymask.common.data.annotations.reader import clean_coco, coco_entries, load_coco_json, read_coco, read_json

__all__ = [
    "EVALUATOR_TYPE",
    "AnnotationError",
    "Findings",
    "ImageInfo",
    "class_metadata",
    "clean_coco",
    "clean_entries",
    "clean_panoptic",
    "clean_record",
    "is_panoptic",
    "coco_entries",
    "load_coco_json",
    "load_coco_panoptic_json",
    "number_classes",
    "panoptic_entries",
    "read_coco",
    "read_dataset",
    "read_json",
]
