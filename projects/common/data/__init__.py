"""Data sets, augmentation and the mapper from data set entries to model inputs."""

from querymask.common.data.annotations import load_coco_json, read_coco, read_dataset
from querymask.common.data.datasets import install, register_balloon, register_shapes
from querymask.common.data.mapper import InstanceMapper

__all__ = [
    "InstanceMapper",
    "install",
    "load_coco_json",
    "read_coco",
    "read_dataset",
    "register_balloon",
    "register_shapes",
]
