"""Evaluation during training: best checkpoint, early stop, validation loss; checkpoints that stay."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from querymask.common.engine import Trainer, default_setup
from querymask.common.engine.evaluating import check_evaluation_keys
from querymask.common.engine.validation import losses_without_training, validation_losses


class ScoredTrainer(Trainer):
    """Evaluations have the given APs, one after the other."""

    scores: Iterator[float]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, dict[str, float]]:
        return {"segm": {"AP": next(cls.scores)}}


def train(cfg: CfgNode, scores: list[float], resume: bool = False) -> Trainer:
    ScoredTrainer.scores = iter(scores)
    default_setup(cfg, argparse.Namespace())
    trainer = ScoredTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.fixture
def scored(cfg: CfgNode) -> CfgNode:
    """Ten iterations, evaluated every second one."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 10, (), 100
    cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC = 2, "segm/AP"
    return cfg


def best(cfg: CfgNode) -> tuple[dict, dict]:
    folder = Path(cfg.OUTPUT_DIR)
    return json.loads((folder / "best.json").read_text()), torch.load(folder / "model_best.pth", weights_only=True)


def test_best_checkpoint_is_kept(scored: CfgNode) -> None:
    train(scored, [10.0, 30.0, math.nan, 30.0, 20.0])
    note, checkpoint = best(scored)
    assert note == {"metric": "segm/AP", "value": 30.0, "iteration": 4}
    assert checkpoint["iteration"] == 3
    final = torch.load(Path(scored.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert final["iteration"] == 9
    lines = [json.loads(line) for line in (Path(scored.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert [line["segm/AP"] for line in lines if "segm/AP" in line][-1] == 20.0


def test_last_evaluation_may_be_the_best(scored: CfgNode) -> None:
    train(scored, [10.0, 11.0, 12.0, 13.0, 14.0])
    assert best(scored)[0]["iteration"] == 10


def test_training_ends_early(scored: CfgNode) -> None:
    scored.TEST.PATIENCE = 2
    trainer = train(scored, [10.0, 9.0, 10.0])  # a further evaluation would be an error
    folder = Path(scored.OUTPUT_DIR)
    assert trainer.iter == trainer.max_iter == 6
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 5
    assert "training ends after 6 of 10 iterations" in (folder / "log.txt").read_text()
    assert (folder / "curves.png").exists()
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["segm/AP"] for line in lines if "segm/AP" in line][-1] == 10.0
    assert max(line["iteration"] for line in lines if "total_loss" in line) >= 5
    assert best(scored)[0]["iteration"] == 2


def test_resumed_run_knows_its_best(scored: CfgNode) -> None:
    scored.SOLVER.MAX_ITER = 4
    train(scored, [10.0, 40.0])
    scored.SOLVER.MAX_ITER, scored.TEST.PATIENCE = 10, 2
    trainer = train(scored, [20.0, 30.0], resume=True)
    assert trainer.iter == 8 and best(scored)[0] == {"metric": "segm/AP", "value": 40.0, "iteration": 4}
    scored.TEST.PATIENCE = 0
    train(scored, [5.0, 4.0, 3.0, 2.0, 1.0])  # a new run does not compare itself with the old one
    assert best(scored)[0]["value"] == 5.0
    scored.TEST.BEST_METRIC = ""
    train(scored, [1.0] * 5)  # nor does it leave the old one's for those who look for the best
    names = sorted(path.name for path in Path(scored.OUTPUT_DIR).glob("*best*"))
    assert names == ["best.json.before", "model_best.pth.before"]


def test_metric_that_an_evaluation_lacks_is_told(scored: CfgNode) -> None:
    scored.TEST.BEST_METRIC, scored.TEST.PATIENCE = "boundary/AP", 1
    trainer = train(scored, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert trainer.iter == 10
    assert "boundary/AP is not among the metrics" in (Path(scored.OUTPUT_DIR) / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"BEST_METRIC": "AP"}, "'AP': give a metric"),
        ({"BEST_METRIC": "segm/mAP"}, "give a metric"),
        ({"BEST_METRIC": "validation/total_loss"}, "set TEST.LOSS True"),
        ({"PATIENCE": 3}, "TEST.PATIENCE is 3"),
        ({"PATIENCE": 3, "BEST_METRIC": "segm/AP", "EVAL_PERIOD": 0}, "TEST.EVAL_PERIOD"),
    ],
)
def test_keys_without_meaning(cfg: CfgNode, options: dict, message: str) -> None:
    cfg.TEST.merge_from_other_cfg(CfgNode(options))
    with pytest.raises(ValueError, match=message):
        check_evaluation_keys(cfg)


def test_last_checkpoints_stay(cfg: CfgNode) -> None:
    """Also those of before a run was resumed are taken away in their turn."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 6, (), 2
    names = []
    for kept, last in ((0, 6), (2, 10)):
        cfg.SOLVER.CHECKPOINTS_KEPT, cfg.SOLVER.MAX_ITER = kept, last
        default_setup(cfg, argparse.Namespace())
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        names.append(sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth")))
    assert names[0] == ["model_0000001.pth", "model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    assert names[1] == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]
    cfg.SOLVER.CHECKPOINTS_KEPT = -1
    with pytest.raises(ValueError, match="SOLVER.CHECKPOINTS_KEPT is -1"):
        Trainer(cfg)


def test_validation_loss_is_that_of_training_without_its_noise(cfg: CfgNode) -> None:
    """The mean of the losses of every image by itself; the model, its modes and the random numbers stay."""
    cfg.DATASETS.TEST = ("engine_val",)
    torch.manual_seed(3)
    model = build_model(cfg).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    values = validation_losses(cfg, model)
    assert torch.equal(numbers, torch.get_rng_state())
    assert values == validation_losses(cfg, model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())

    # By hand: dropout off, one image at a time, with the mapper of training at the size of the evaluation
    cfg.MODEL.SOLQ.DROPOUT = 0.0
    exact = build_model(cfg).train()
    exact.load_state_dict(state)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (48,), 96, "none"
    from querymask.common.data.annotations import read_dataset
    from querymask.common.data.mapper import InstanceMapper

    mapper = InstanceMapper(cfg, is_train=True)
    entries = read_dataset("engine_val")
    with torch.no_grad():
        totals = [sum(exact([mapper(entry)]).values()).item() for entry in entries]
    assert values["total_loss"] == pytest.approx(sum(totals) / len(totals), rel=1e-4)
    assert values["total_loss"] == pytest.approx(sum(x for name, x in values.items() if name != "total_loss"), rel=1e-5)


def test_norms_do_not_learn_from_validation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))
    model[2].eval()
    before = model[0].running_mean.clone()
    with losses_without_training(model):
        assert model.training and not model[0].training and not model[1].training and model[2].training
        model(torch.rand(4, 2))
    assert torch.equal(model[0].running_mean, before)
    assert model[0].training and model[1].training and not model[2].training


def test_validation_loss_is_in_the_log_and_may_be_the_best_metric(cfg: CfgNode) -> None:
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, ()
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = ("engine_val",), 2
    cfg.TEST.LOSS, cfg.TEST.BEST_METRIC = True, "validation/total_loss"
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    lines = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    losses = {line["iteration"]: line["validation/total_loss"] for line in lines if "validation/total_loss" in line}
    assert len(losses) == 2
    assert best(cfg)[0]["value"] == pytest.approx(min(losses.values()))
