"""What a config takes over from the folder that a user names with --data."""

import logging
import os
from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from querymask.common.data.folders import register_folder
from querymask.common.engine.checks import num_classes_key

logger = logging.getLogger(__name__)


def use_folder(cfg: CfgNode, path: str | os.PathLike[str], reference: CfgNode, given: Collection[str]) -> None:
    """Set data sets, number and names of the classes, and the schedule, but for the keys that are given.

    Args:
        cfg: changed in place.
        path: the folder, of a layout of ``querymask.common.data.folders``.
        reference: the config without what the command line changes: the batch that its schedule is made for.
        given: keys that stay as they are.

    Raises:
        AnnotationError, FileNotFoundError: the folder cannot be used.
    """
    folder = register_folder(path, cfg.MODEL.PANOPTIC.ENABLED)
    values: dict[str, Any] = {
        "DATASETS.FOLDER": str(folder.path),
        "DATASETS.TRAIN": (folder.names["train"],),
        "DATASETS.TEST": (folder.evaluated,),
        "MODEL.CLASS_NAMES": folder.classes,
    }
    if key := num_classes_key(cfg):
        values[key] = len(folder.classes)
    if cfg.MODEL.PANOPTIC.ENABLED:
        values["MODEL.PANOPTIC.NUM_THINGS"] = folder.num_things
    for key, value in values.items():
        if key not in given:
            cfg.merge_from_list([key, value])
    follow_batch(cfg, reference, given)
    batches, size, count = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, len(folder.entries("train"))
    times = f"each of the {count} images to train on comes {batches * size / count:.4g} times"
    logger.info(f"{batches} batches of {size} images (SOLVER.MAX_ITER, SOLVER.IMS_PER_BATCH): {times}")


def register_configured(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.FOLDER``, as in every process of a run; a line where it is gone."""
    path = cfg.DATASETS.FOLDER
    if not path or MetadataCatalog.get(f"{os.path.basename(path)}_train").get("folder") == path:
        return
    if os.path.isdir(path):
        register_folder(path, cfg.MODEL.PANOPTIC.ENABLED)
    else:
        logger.warning(f"DATASETS.FOLDER {path} is not there: its data sets are not known. Name the folder with --data")


def follow_batch(cfg: CfgNode, reference: CfgNode, given: Collection[str]) -> None:
    """Fit rate and schedule to another batch than that of ``reference`` by the linear rule (Goyal et al. 2017).

    Twice the images of a batch: twice the rate, half the iterations. Steps, warm-up and periods keep their part of all
    iterations, also where these are given.
    """
    factor = cfg.SOLVER.IMS_PER_BATCH / reference.SOLVER.IMS_PER_BATCH
    changed = []

    def change(key: str, value: Any) -> None:
        section, name = key.split(".")
        old = cfg[section][name]
        if key not in given and value != old:
            cfg[section][name] = value
            changed.append(f"{key} {old} becomes {value}")

    change("SOLVER.BASE_LR", float(f"{reference.SOLVER.BASE_LR * factor:.6g}"))
    change("SOLVER.MAX_ITER", max(round(reference.SOLVER.MAX_ITER / factor), 1))
    part = cfg.SOLVER.MAX_ITER / reference.SOLVER.MAX_ITER
    change("SOLVER.STEPS", tuple(round(step * part) for step in reference.SOLVER.STEPS))
    change("SOLVER.WARMUP_ITERS", round(reference.SOLVER.WARMUP_ITERS * part))
    for key, period in (
        ("SOLVER.CHECKPOINT_PERIOD", reference.SOLVER.CHECKPOINT_PERIOD),
        ("TEST.EVAL_PERIOD", reference.TEST.EVAL_PERIOD),
    ):
        change(key, max(round(period * part), 1) if period else 0)
    if changed:
        logger.info(
            f"the config is made for {reference.SOLVER.MAX_ITER} batches of {reference.SOLVER.IMS_PER_BATCH} images, "
            f"this run has {cfg.SOLVER.MAX_ITER} of {cfg.SOLVER.IMS_PER_BATCH}. By the linear rule {', '.join(changed)}"
        )
