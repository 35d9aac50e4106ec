"""Stop at once where config, checkpoint and data sets disagree on the number of classes."""

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from querymask.common.data.annotations import is_panoptic
from querymask.common.evaluation.panoptic import PanopticClasses

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


def check_panoptic(cfg: CfgNode, dataset_names: Iterable[str]) -> None:
    """Compare ``MODEL.PANOPTIC`` with the kind of each data set and with its things.

    Raises:
        ValueError: only one of model and data set is panoptic, the number of things differs, or a key has no meaning
            for panoptic maps.
    """
    panoptic = cfg.MODEL.PANOPTIC
    for name in dataset_names:
        dataset_classes(name)
        if is_panoptic(name) != panoptic.ENABLED:
            raise ValueError(
                f"MODEL.PANOPTIC.ENABLED is {panoptic.ENABLED}, but the data set {name} is "
                f"{'not ' if panoptic.ENABLED else ''}panoptic: set MODEL.PANOPTIC.ENABLED {not panoptic.ENABLED}, or "
                "choose another data set with DATASETS.TRAIN and DATASETS.TEST"
            )
        if panoptic.ENABLED and (number := PanopticClasses(name).num_things) != panoptic.NUM_THINGS:
            raise ValueError(
                f"MODEL.PANOPTIC.NUM_THINGS is {panoptic.NUM_THINGS}, but {number} classes of the data set {name} are "
                f"things. Set MODEL.PANOPTIC.NUM_THINGS {number}, or choose another data set"
            )
    for key, value, off in (("TEST.SLICE.SIZE", cfg.TEST.SLICE.SIZE, 0), ("INPUT.COPY_PASTE", cfg.INPUT.COPY_PASTE, 0)):
        if panoptic.ENABLED and value:
            raise ValueError(f"{key} is for instances, and MODEL.PANOPTIC.ENABLED is True: set {key} {off}")


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
