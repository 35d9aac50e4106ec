"""Stop at once where config, checkpoint and data sets disagree on the number of classes."""

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
}
"""Where a meta-architecture has its number of classes, if not in MODEL.<META_ARCHITECTURE>.NUM_CLASSES."""


def num_classes_key(cfg: CfgNode) -> str | None:
    """The config key with the model's number of classes; None if the model has no such key."""
    name = cfg.MODEL.META_ARCHITECTURE
    key = NUM_CLASSES_KEYS.get(name, f"MODEL.{name.upper()}.NUM_CLASSES")
    return key if get_key(cfg, key) is not None else None


def check_num_classes(cfg: CfgNode, dataset_names: Iterable[str]) -> None:
    """Compare the model's number of classes with that of each data set; warn where the classes' names differ.

    Raises:
        ValueError: they differ; with both numbers and the remedy.
    """
    key = num_classes_key(cfg)
    if key is None:
        return
    first, first_classes = "", []
    for name in dataset_names:
        classes = dataset_classes(name)
        if classes and len(classes) != get_key(cfg, key):
            shown = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
            raise ValueError(
                f"{key} is {get_key(cfg, key)}, but the data set {name} has {len(classes)} classes ({shown}). "
                f"Set {key} {len(classes)}, or choose another data set with DATASETS.TRAIN and DATASETS.TEST"
            )
        if first_classes and classes and classes != first_classes:
            logger.warning(f"the classes of {name}, {classes}, are not those of {first}, {first_classes}")
        elif classes:
            first, first_classes = name, classes


def dataset_classes(name: str) -> list[str]:
    """Class names of a data set; one registered without them is read first (as COCO JSON files of users are)."""
    if name not in DatasetCatalog:
        raise KeyError(f"there is no data set {name!r}; registered are {', '.join(sorted(DatasetCatalog.keys()))}")
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    return MetadataCatalog.get(name).get("thing_classes") or []


def get_key(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key, None if there is no such key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return None
        node = node[part]
    return node
