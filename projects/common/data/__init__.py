"""Data sets, augmentation and the mapper from data set entries to model inputs.

Importing it registers ``shapes_train``, ``shapes_val``, ``balloon_train`` and ``balloon_val`` with Detectron2.
"""

from querymask.common.data.datasets import (
    datasets_root,
    register_all,
    register_balloon,
    register_shapes,
)
from querymask.common.data.mapper import InstanceMapper

register_all(datasets_root())

__all__ = ["InstanceMapper", "register_balloon", "register_shapes"]
