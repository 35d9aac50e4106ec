"""Overfit a few images of a data set: python tools/overfit.py --config-file FILE [--data FOLDER] [--num-images 4].

A check of a whole set-up, from photographs to AP: a model that cannot learn a handful of images by heart has a broken
path somewhere. The images are the first of ``DATASETS.TRAIN`` with annotations, without augmentation, and the model is
evaluated on the same images by the ordinary evaluator.
"""

import argparse
import json
from pathlib import Path

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from querymask.command_line import add_config, add_data, load_config, make_parser
from querymask.common.data.annotations import is_panoptic, read_dataset
from querymask.common.engine import Trainer, default_setup
from querymask.common.engine.checks import dataset_classes
from querymask.common.evaluation.truth import dataset_truth

PANOPTIC_METADATA = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "stuff_dataset_id_to_contiguous_id",
    "evaluator_type",
)
"""Of a panoptic data set, without its files of all images."""


def register_first_images(name: str, count: int, folder: Path) -> str:
    """Register the first annotated images of a data set as one of its own.

    Args:
        name: a registered data set.
        count: number of images.
        folder: where the smaller JSON is written; of panoptic data, whose PNG files are where they are, there is none.

    Returns:
        the name of the new data set.
    """
    dataset_classes(name)  # an error for a name that is not registered
    if is_panoptic(name):
        entries = [entry for entry in read_dataset(name) if entry["annotations"]][:count]
        check_number(name, len(entries), count)
        first = f"{name}_first_{count}"
        DatasetCatalog.register(first, lambda: entries)
        known = MetadataCatalog.get(name).as_dict()
        MetadataCatalog.get(first).set(**{key: known[key] for key in PANOPTIC_METADATA})
        return first
    content = dataset_truth(name)
    annotated = {a["image_id"] for a in content.get("annotations", ()) if not a["iscrowd"]}
    images = [image for image in content["images"] if image["id"] in annotated][:count]
    check_number(name, len(images), count)
    chosen = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_first_{count}.json"
    path.write_text(json.dumps(content))
    register_coco_instances(path.stem, {}, str(path), MetadataCatalog.get(name).get("image_root") or "")
    return path.stem


def check_number(name: str, found: int, count: int) -> None:
    """Refuse a data set with too few annotated images."""
    if found < count:
        raise ValueError(f"{name} has {found} annotated images, not {count}: lower --num-images")


def setup(args: argparse.Namespace) -> CfgNode:
    """The config with the small data set, its image size and no augmentation."""
    cfg = load_config(args.config_file, args.opts, data=args.data, log_rank=0)
    name = register_first_images(cfg.DATASETS.TRAIN[0], args.num_images, Path(cfg.OUTPUT_DIR))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.DETR_CROP.ENABLED = cfg.INPUT.LSJ.ENABLED = False
    cfg.SOLVER.IMS_PER_BATCH = args.num_images
    cfg.freeze()
    return cfg


def main() -> None:
    parser = make_parser(__doc__)
    add_config(parser, "the config to check")
    add_data(parser)
    parser.add_argument("--num-images", type=int, default=4, help="images to learn, all in one batch (default: 4)")
    args = parser.parse_intermixed_args()
    cfg = setup(args)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    main()
