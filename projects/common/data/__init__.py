"""Data sets, augmentation and the mapper from data set entries to model inputs.

Importing it registers ``shapes_train``, ``shapes_val``, ``balloon_train`` and ``balloon_val`` with Detectron2.
"""

from detectron2.data import datasets as detectron2_datasets
from detectron2.data.datasets import coco as detectron2_coco

from querymask.common.data.annotations import load_coco_json, read_coco, read_dataset
from querymask.common.data.datasets import (
    datasets_root,
    register_all,
    register_balloon,
    register_shapes,
)
from querymask.common.data.mapper import InstanceMapper

# What register_coco_instances registers, Detectron2's own COCO sets included, is read by the reader that checks
detectron2_coco.load_coco_json = detectron2_datasets.load_coco_json = load_coco_json

register_all(datasets_root())

__all__ = ["InstanceMapper", "load_coco_json", "read_coco", "read_dataset", "register_balloon", "register_shapes"]
