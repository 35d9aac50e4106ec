"""The images that a run trains on, and what the log says of them."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from detectron2.data import MetadataCatalog
from tabulate import tabulate

from querymask.common.data.annotations import AnnotationError, read_dataset

logger = logging.getLogger(__name__)

Entries = list[dict[str, Any]]


def read_training_set(
    names: Sequence[str],
    *,
    masks: bool = True,
    filter_empty: bool = False,
    min_side: int = 0,
    num_queries: Mapping[str, int] = MappingProxyType({}),
) -> Entries:
    """Checked dictionaries of data sets to train on, one after the other, with instances by class in the log.

    Args:
        names: registered data sets.
        masks: whether every instance needs a mask.
        filter_empty: leave out images without instances to train on.
        min_side: leave out images with a shorter side, in pixels.
        num_queries: the most objects that the model can find in an image, by the key that says it, for a line where
            there are more.

    Raises:
        KeyError: a data set is not registered.
        AnnotationError: there is nothing to train on, or masks are missing.
    """
    if not names:
        raise ValueError("DATASETS.TRAIN is empty: name the data sets to train on")
    entries: Entries = []
    for name in names:
        found = read_dataset(name)
        _require_annotations(name, found, alone=len(names) == 1)
        if masks:
            _require_masks(name, found)
        entries += found
    if not any(_instances(entry) for entry in entries):
        raise AnnotationError(f"{', '.join(names)}: there is no object to train on. Look into the lines above.")
    _show_classes(names, entries)
    counts = {i: len(_instances(entry)) for i, entry in enumerate(entries)}
    for key, limit in num_queries.items():
        if (highest := max(counts.values())) > limit:
            number = sum(count > limit for count in counts.values())
            logger.warning(
                f"{number} training images have more objects (up to {highest}) than the model has queries, {limit}: "
                f"the others are not learned there. Raise {key} (and TEST.DETECTIONS_PER_IMAGE, for them to count), or "
                "set INPUT.MAX_INSTANCES"
            )
    kept = [
        entry
        for i, entry in enumerate(entries)
        if (counts[i] or not filter_empty) and min(entry["width"], entry["height"]) >= min_side
    ]
    if len(kept) < len(entries):
        logger.info(f"{len(kept)} of {len(entries)} images are trained on: others are too small or without instances")
    if not any(_instances(entry) for entry in kept):
        raise AnnotationError(
            f"{', '.join(names)}: no image with instances has a shorter side of {min_side} pixels: lower "
            "DATALOADER.MIN_IMAGE_SIDE."
        )
    return kept


def _instances(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [annotation for annotation in entry["annotations"] if not annotation["iscrowd"]]


def _require_annotations(name: str, entries: Entries, alone: bool) -> None:
    """Raise the error, or write a line where others than this data set may have objects: it may be background."""
    if not entries:
        raise AnnotationError(f"data set {name}: it has no images. Look into what it is registered with.")
    lacking = [entry for entry in entries if "annotations" not in entry]
    if lacking:
        raise AnnotationError(
            f"data set {name}: {len(lacking)} of {len(entries)} images, first {lacking[0]['file_name']}, have no "
            "'annotations'. Training needs them; give an empty list where an image has no instances."
        )
    total = sum(len(entry["annotations"]) for entry in entries)
    crowds = total - sum(len(_instances(entry)) for entry in entries)
    if total == 0 and not alone:
        logger.warning(f"data set {name}: its {len(entries)} images have no annotations, and count as background")
        return
    if total == 0:
        raise AnnotationError(
            f"data set {name}: its {len(entries)} images have no annotations: there is nothing to train on. Is it the "
            "annotation file of a test set?"
        )
    if crowds == total:
        raise AnnotationError(
            f"data set {name}: {crowds} of {total} annotations are crowd regions, which are not trained on. Set "
            "iscrowd to 0 in the annotation file where an annotation is a single object; if lines above say that masks "
            "are unusable, correct these."
        )
    if crowds:
        logger.info(f"{name}: {crowds} of {total} annotations are crowd regions, which are not trained on")


def _require_masks(name: str, entries: Entries) -> None:
    instances = [(entry, a) for entry in entries for a in _instances(entry)]
    lacking = [entry for entry, a in instances if "segmentation" not in a and "pan_seg_file_name" not in entry]
    if lacking:
        raise AnnotationError(
            f"data set {name}: {len(lacking)} of {len(instances)} annotations, first in {lacking[0]['file_name']} "
            f"(image id {lacking[0]['image_id']}), have no segmentation, but masks are wanted. Add segmentations to "
            "the data set, or train without masks (MODEL.MASK_BRANCH.NAME none)."
        )


def _show_classes(names: Sequence[str], entries: Entries) -> None:
    """A table like Detectron2's, but in every run of a process, and the classes that have no instances."""
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    if not classes:
        return
    counts = Counter(annotation["category_id"] for entry in entries for annotation in _instances(entry))
    if max(counts, default=0) >= len(classes):  # of another set; the check of the number of classes says so
        return
    rows = [[str(name), counts[index]] for index, name in enumerate(classes)]
    columns = min(3, len(rows))
    lines = [sum(rows[i : i + columns], []) for i in range(0, len(rows), columns)]
    table = tabulate(lines, ["category", "#instances"] * columns, tablefmt="pipe")
    logger.info(
        f"Distribution of instances among all {len(rows)} categories, {sum(counts.values())} in total:\n{table}"
    )
    missing = [str(name) for index, name in enumerate(classes) if not counts[index]]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        logger.warning(f"{len(missing)} of {len(classes)} classes have no instances in {', '.join(names)}: {shown}")
