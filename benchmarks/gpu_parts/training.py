"""The training loop: images a second of the real loader, and a short training that must learn."""

import tempfile
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode

from gpu_parts.results import Part
from gpu_parts.sizes import Sizes
from querymask.command_line import load_config
from querymask.common.data import register_shapes
from querymask.common.data.datasets import datasets_root
from querymask.common.engine import Trainer, default_setup

ROOT = Path(__file__).resolve().parents[2]
QUICK = "solq_shapes_quick"


def config(name: str, sizes: Sizes, output: str) -> CfgNode:
    """A config of SOLQ that trains on the built-in data set, which is drawn when it is first used."""
    train, val = (
        dataset(split, number) for split, number in (("train", sizes.train_images), ("val", sizes.val_images))
    )
    settings: dict[str, Any] = {
        "DATASETS.TRAIN": (train,),
        "DATASETS.TEST": (val,),
        "MODEL.WEIGHTS": "",
        "MODEL.SOLQ.NUM_CLASSES": 6,
        "OUTPUT_DIR": output,
        "VIS_NUM_IMAGES": 0,
        "SEED": 1,
    }
    overrides = [*sizes.model_settings("solq", backbone=False), *chain.from_iterable(settings.items())]
    cfg = load_config(ROOT / "projects" / "solq" / "configs" / f"{name}.yaml", overrides, "cuda")
    if sizes.pretended:
        cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (sizes.height,), "INPUT.DETR_CROP.ENABLED", False])
    if sizes.iterations is not None:
        cfg.merge_from_list(["SOLVER.MAX_ITER", sizes.iterations, "SOLVER.STEPS", ()])
    return cfg


def dataset(split: str, images: int | None) -> str:
    """The name of a split of ``shapes``, with another number of images than the usual one if it is given."""
    if images is None:
        return f"shapes_{split}"
    name = f"shapes_{split}_{images}"
    from detectron2.data import DatasetCatalog

    if name not in DatasetCatalog.list():
        register_shapes(name, Path(datasets_root(), f"trial_{split}_{images}"), split, images)
    return name


def run_loader(part: Part, sizes: Sizes) -> None:
    """The loader alone and the training with it, by the number of its processes."""
    part.note(
        f"Images a second over {sizes.loader_batches} batches after one, of the loader alone and of training with it, "
        "with images of the built-in data set. The R50 model's config enlarges and crops them as it does COCO's."
    )
    row = part.table("Loader", "config", "images in a batch", "processes", "loader images/s", "training images/s")
    for name, images in ((QUICK, 8), ("solq_r50", 2)):
        for workers in sizes.workers:
            labels = (name, images, workers)
            if part.is_over(row, *labels):
                continue
            with part.attempt(f"{name}, {workers}", row, *labels), tempfile.TemporaryDirectory() as folder:
                cfg = config(name, sizes, folder)
                cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", images])
                trainer = Trainer(cfg)
                rates = [loader_rate(trainer, images, sizes), training_rate(trainer, images, sizes)]
                row(*labels, *rates)


def loader_rate(trainer: Trainer, images: int, sizes: Sizes) -> float:
    """Images a second of batches that nobody uses."""
    batches = iter(trainer._trainer.data_loader)
    next(batches)
    start = time.perf_counter()
    for _ in islice(batches, sizes.loader_batches):
        pass
    return images * sizes.loader_batches / (time.perf_counter() - start)


def training_rate(trainer: Trainer, images: int, sizes: Sizes) -> float:
    """Images a second of training steps."""
    from detectron2.utils.events import EventStorage

    step = trainer._trainer
    with EventStorage() as storage:
        for iteration in range(sizes.loader_batches + 1):
            if iteration == 1:
                torch.cuda.synchronize()
                start = time.perf_counter()
            step.iter = storage.iter = iteration
            step.run_step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        step.write_metrics()  # raises where a loss is not finite
    step.close()
    return images * sizes.loader_batches / seconds


def run_quick(part: Part, sizes: Sizes) -> None:
    """The README's first training, which must reach a box AP50."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(QUICK, sizes, folder)
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", max(sizes.workers)])
        default_setup(cfg, None)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        start = time.perf_counter()
        results = trainer.train()
        seconds = time.perf_counter() - start
    assert results is not None
    row = part.table(f"`{QUICK}`", "", "")
    row("iterations", cfg.SOLVER.MAX_ITER)
    row("seconds, with evaluation", seconds)
    row("box AP", results["bbox"]["AP"])
    row("box AP50", results["bbox"]["AP50"])
    row("mask AP50", results["segm"]["AP50"])
    if sizes.box_ap50 is None:
        row("box AP50 that it must reach", "skipped: a trial run is too short to learn")
        return
    reached = results["bbox"]["AP50"] >= sizes.box_ap50
    row("box AP50 that it must reach", sizes.box_ap50)
    row("reached", "yes" if reached else "no")
    if not reached:
        part.fail("it has not learned", f"box AP50 is {results['bbox']['AP50']:.1f}, not {sizes.box_ap50} or more")
