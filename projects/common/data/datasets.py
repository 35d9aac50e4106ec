"""Registration of the data sets that come with QueryMask. Detectron2 registers COCO's by itself."""

import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import datasets as detectron2_datasets
from detectron2.data.datasets import coco as detectron2_coco
from detectron2.data.datasets import coco_panoptic as detectron2_coco_panoptic

from querymask.common.data.annotations import (
    EVALUATOR_TYPE,
    class_metadata,
    load_coco_json,
    load_coco_panoptic_json,
)
from querymask.common.data.shapes import (
    CATEGORIES,
    PANOPTIC_CATEGORIES,
    SPLIT_SIZES,
    make_shapes,
    panoptic_folder,
    shapes_folder,
)


def datasets_root() -> str:
    """The folder of all data sets, as for Detectron2: environment variable DETECTRON2_DATASETS, default ./datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_shapes(name: str, root: str | os.PathLike, split: str, num_images: int | None = None) -> None:
    """Register a split of the built-in data set, which is made when it is first used.

    Args:
        name: name in the catalog.
        root: the folder of all data sets.
        split: "train" or "val".
        num_images: another number of images than the usual one; it must not change for one ``root``.
    """
    json_file = shapes_folder(root) / f"{split}.json"
    image_root = json_file.with_suffix("")

    def load() -> list[dict[str, Any]]:
        make_shapes(root, split, num_images)
        return load_coco_json(str(json_file), str(image_root), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in CATEGORIES],
        thing_dataset_id_to_contiguous_id={category["id"]: i for i, category in enumerate(CATEGORIES)},
    )


def register_shapes_panoptic(name: str, root: str | os.PathLike, split: str, num_images: int | None = None) -> None:
    """Register a split of the panoptic form of the built-in data set. See :func:`register_shapes`."""
    json_file = shapes_folder(root, panoptic=True) / f"{split}.json"
    image_root, panoptic_root = json_file.with_suffix(""), panoptic_folder(json_file)
    metadata = class_metadata(PANOPTIC_CATEGORIES)

    def load() -> list[dict[str, Any]]:
        make_shapes(root, split, num_images, panoptic=True)
        return load_coco_panoptic_json(str(json_file), str(image_root), str(panoptic_root), metadata)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        panoptic_json=str(json_file),
        panoptic_root=str(panoptic_root),
        image_root=str(image_root),
        evaluator_type=EVALUATOR_TYPE,
        **metadata,
    )


def register_balloon(name: str, root: str | os.PathLike, split: str) -> None:
    """Register a split ("train" or "val") of the balloon data set, expected in COCO format in ``root``/balloon."""
    json_file = Path(root) / "balloon" / f"{split}.json"
    image_root = json_file.with_suffix("")

    def load() -> list[dict[str, Any]]:
        if not json_file.is_file():
            raise FileNotFoundError(
                f"Data set {name} needs the file {json_file.absolute()}. Put the balloon data set there, or set the "
                "environment variable DETECTRON2_DATASETS to the folder that holds it: see docs/data.md."
            )
        return load_coco_json(str(json_file), str(image_root), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=["balloon"],
    )


def register_all(root: str | os.PathLike) -> None:
    """Register every data set of this module under its usual name; names that the user has taken are left alone."""
    taken = set(DatasetCatalog.list())
    for split in SPLIT_SIZES:
        if f"shapes_{split}" not in taken:
            register_shapes(f"shapes_{split}", root, split)
        if f"shapes_panoptic_{split}" not in taken:
            register_shapes_panoptic(f"shapes_panoptic_{split}", root, split)
        if f"balloon_{split}" not in taken:
            register_balloon(f"balloon_{split}", root, split)


def install() -> None:
    """What ``import querymask`` does to Detectron2's data sets, once.

    What ``register_coco_instances`` and ``register_coco_panoptic`` register, Detectron2's own COCO sets included, is
    read by the reader that checks.
    ``shapes_train``, ``shapes_val``, ``shapes_panoptic_train``, ``shapes_panoptic_val``, ``balloon_train`` and
    ``balloon_val`` are registered in the folder that DETECTRON2_DATASETS names by now.
    """
    detectron2_coco.load_coco_json = detectron2_datasets.load_coco_json = load_coco_json
    detectron2_coco_panoptic.load_coco_panoptic_json = load_coco_panoptic_json
    register_all(datasets_root())
