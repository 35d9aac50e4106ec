"""The names of the classes go with a run, into its config and checkpoints, and are compared with those of data sets."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode

from querymask.common.engine.checks import dataset_classes

logger = logging.getLogger(__name__)


def choose_class_names(cfg: CfgNode) -> None:
    """Set ``MODEL.CLASS_NAMES`` to the classes of the training data, with a line if the config had others."""
    names = next(filter(None, map(dataset_classes, cfg.DATASETS.TRAIN)), None)
    if names is None:  # nothing to train on, or data without names
        return
    names = [str(name) for name in names]
    if cfg.MODEL.CLASS_NAMES and list(cfg.MODEL.CLASS_NAMES) != names:
        logger.info(f"MODEL.CLASS_NAMES becomes that of the training data, {shown(names)}")
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.MODEL.CLASS_NAMES = names
    if frozen:
        cfg.freeze()


def check_class_names(names: Sequence[str], source: str, dataset_name: str, warn: bool = True) -> None:
    """Compare the classes that a model is trained on with those of a data set.

    Args:
        names: empty where they are not known.
        source: where they come from, for messages.
        warn: say where they differ otherwise than in their places.

    Raises:
        ValueError: a class has another place, so that it would be taken for another one.
    """
    present = [str(name) for name in dataset_classes(dataset_name)]
    if not names or not present or list(names) == present:
        return
    both = f"{source} has {shown(names)}, {dataset_name} has {shown(present)}"
    there = [_spelling(name) for name in present]
    moved = [
        i for i, (name, other) in enumerate(zip(names, there)) if _spelling(name) != other and _spelling(name) in there
    ]
    if moved:
        name, other = names[moved[0]], present[moved[0]]
        raise ValueError(
            f"the classes of the model and of {dataset_name} are in another order, so that {name!r} would count as "
            f"{other!r}: {both}. Put the data set's categories into the model's order: their ids for COCO's format, "
            "thing_classes otherwise"
        )
    if warn:
        logger.warning(f"the classes of the model are not those of the data set: {both}")


def same_names(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether classes are the same at the same places, but for capitals."""
    return [_spelling(name) for name in names] == [_spelling(name) for name in others]


def _spelling(name: str) -> str:
    return str(name).strip().casefold()


def shown(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(map(str, names[:12])) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
