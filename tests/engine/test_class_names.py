"""The names of the classes go from the training data into config, checkpoints and results, and into every picture."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from querymask import get_cfg
from querymask.common.engine import Trainer, default_setup
from querymask.common.predictor import Predictor, class_names

NAMES = ["wide", "tall"]


def train(cfg: CfgNode) -> Path:
    """A checkpoint after one iteration."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
    default_setup(cfg, argparse.Namespace())
    Trainer(cfg).train()
    return Path(cfg.OUTPUT_DIR) / "model_final.pth"


def test_names_are_in_the_run(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("engine_val",)
    path = train(cfg)
    assert torch.load(path, weights_only=True)["class_names"] == NAMES
    saved = get_cfg()
    saved.merge_from_file(str(path.parent / "config.yaml"))
    assert saved.MODEL.CLASS_NAMES == NAMES
    assert json.loads((path.parent / "inference" / "classes.json").read_text()) == {"3": "wide", "70": "tall"}


def test_trainer_alone_keeps_them(cfg: CfgNode) -> None:
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
    cfg.MODEL.CLASS_NAMES = ["of", "another", "run"]  # those of the data replace them
    cfg.freeze()
    Trainer(cfg).train()
    assert torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["class_names"] == NAMES
    assert cfg.is_frozen()


def test_choice_of_names(cfg: CfgNode, register: Callable[..., str]) -> None:
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    assert class_names(cfg) == (), "the model has 2 classes, COCO 80"
    MetadataCatalog.get(register("engine_named", Path("unused.json"))).thing_classes = ["a", "b"]
    cfg.DATASETS.TRAIN = ("engine_named",)
    assert class_names(cfg) == ["a", "b"]
    assert class_names(cfg, ["c", "d"]) == ["c", "d"]
    assert class_names(cfg, ["c", "d", "e"]) == ["a", "b"]
    cfg.MODEL.CLASS_NAMES = ["e", "f"]
    assert class_names(cfg, ["c", "d"]) == ["e", "f"]
    cfg.MODEL.CLASS_NAMES = ["g"]
    with pytest.raises(ValueError, match="CLASS_NAMES has 1 names, MODEL.SOLQ.NUM_CLASSES is 2"):
        class_names(cfg)
    coco = get_cfg()
    coco.MODEL.META_ARCHITECTURE, coco.DATASETS.TEST = "SOLQ", ("coco_2017_val",)
    assert class_names(coco)[:3] == ["person", "bicycle", "car"]


def test_predictor_has_the_names_of_the_checkpoint(cfg: CfgNode) -> None:
    path = train(cfg)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.MODEL.CLASS_NAMES = str(path), []
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    assert Predictor(cfg).class_names == NAMES


@pytest.mark.parametrize("source", ["checkpoint", "config"])
def test_evaluation_with_other_names(
    cfg: CfgNode,
    coco_folder: Path,
    tmp_path: Path,
    register: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
) -> None:
    path = train(cfg)
    content = torch.load(path, weights_only=True)
    cfg.MODEL.WEIGHTS = str(path)
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    cfg.DATASETS.TEST = ("engine_val",)

    def evaluate(names: list[str]) -> None:
        """With these names where the model's come from."""
        content["class_names"] = names if source == "checkpoint" else []
        torch.save(content, path)
        cfg.MODEL.CLASS_NAMES = names if source == "config" else []
        Trainer.evaluate(cfg)

    evaluate(NAMES)
    assert "classes of the model" not in caplog.text
    evaluate(["wide", "high"])
    assert "the classes of the model are not those of the data set" in caplog.text
    assert "has wide, high, engine_val has wide, tall" in caplog.text
    with pytest.raises(
        ValueError, match=r"in another order.* has tall, wide, engine_val has wide, tall\. Put the data"
    ):
        evaluate(["tall", "wide"])


def test_training_and_evaluation_in_another_order(cfg: CfgNode, register: Callable[..., str]) -> None:
    swapped = register("engine_swapped_names", Path("unused.json"))
    MetadataCatalog.get(swapped).thing_classes = ["tall", "wide"]
    cfg.DATASETS.TEST = (swapped,)
    with pytest.raises(ValueError, match=r"another order.*training data has wide, tall, engine_swapped_names has tall"):
        Trainer(cfg)


@pytest.mark.parametrize(
    "classes",
    [["tall", "wide"], ["Tall", " wide"], ["tall", "high"], ["high", "wide"]],
    ids="swapped spelt first second".split(),
)
def test_two_training_sets_with_classes_at_other_places(
    cfg: CfgNode, register: Callable[..., str], classes: list[str]
) -> None:
    """Each of NAMES that the other set has, whatever else it has, must have the same number there."""
    other = register("engine_other_places", Path("unused.json"))
    MetadataCatalog.get(other).thing_classes = classes
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, other)
    with pytest.raises(ValueError, match="in another order.*would count as"):
        Trainer(cfg)


def test_resuming_on_data_in_another_order(cfg: CfgNode) -> None:
    path = train(cfg)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "class_names": NAMES[::-1]}, path)
    with pytest.raises(ValueError, match=r"another order.*model_final.pth has tall, wide, engine_train has wide, tall"):
        Trainer(cfg).resume_or_load(resume=True)


def test_results_of_other_classes_are_told(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    cfg.DATASETS.TEST = ("engine_val",)
    folder = train(cfg).parent / "inference"
    results = str(folder / "coco_instances_results.json")
    Trainer.evaluate_results(cfg, results)
    assert "other classes" not in caplog.text
    (folder / "classes.json").write_text('{"3": "wide", "70": "high"}')
    Trainer.evaluate_results(cfg, results)
    assert "of 1 categories: 70 is 'high' there, 'tall' here" in caplog.text
