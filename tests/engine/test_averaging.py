"""The average of the weights: evaluated, saved, and resumed exactly."""

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from querymask.common.engine import Trainer, default_setup
from querymask.common.engine.averaging import WeightAverage

pytestmark = pytest.mark.usefixtures("deterministic")


def run(cfg: CfgNode, folder: Path, resume: bool = False) -> tuple[Trainer, dict]:
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, torch.load(folder / "model_final.pth", weights_only=True)


def test_average_by_the_formula() -> None:
    """Of weights and of the statistics of batch norm; frozen weights and counters stay out."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1).requires_grad_(False))
    average = WeightAverage(model, 0.9)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for iteration in range(30):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        average.update(iteration)
        decay = min(0.9, (1 + iteration) / (10 + iteration))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied():
        for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
            torch.testing.assert_close(model.state_dict()[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(average.training_weights()["0.weight"], own["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert "2.weight" not in average.tensors and "1.num_batches_tracked" not in average.tensors


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_without_meaning(decay: float) -> None:
    with pytest.raises(ValueError, match="SOLVER.EMA_DECAY"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_checkpoints_have_the_average_and_resume_exactly(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.STEPS = ()
    _, plain = run(cfg, tmp_path / "plain")
    cfg.SOLVER.EMA_DECAY = 0.8
    cfg.DATASETS.TEST = ("engine_val",)
    trainer, whole = run(cfg, tmp_path / "whole")
    weights = whole["trainer"]["training_weights"]
    assert all(torch.equal(plain["model"][name], value) for name, value in weights.items())
    assert any(not torch.equal(whole["model"][name], value) for name, value in weights.items())

    evaluated = cfg.clone()
    evaluated.OUTPUT_DIR = str(tmp_path / "evaluated")
    evaluated.MODEL.WEIGHTS = str(tmp_path / "whole" / "model_final.pth")
    results = Trainer.evaluate(evaluated)
    assert results["bbox"]["AP"] == pytest.approx(trainer._last_eval_results["bbox"]["AP"], nan_ok=True)

    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000004.pth", killed)
    (killed / "last_checkpoint").write_text("model_0000004.pth")
    _, resumed = run(cfg, killed, resume=True)
    for part in (lambda x: x["model"], lambda x: x["trainer"]["training_weights"]):
        assert all(torch.equal(value, part(resumed)[name]) for name, value in part(whole).items())


def test_average_can_be_begun_and_given_up_at_a_resume(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, ()
    _, first = run(cfg, tmp_path / "run")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.EMA_DECAY = 6, 0.9
    _, second = run(cfg, tmp_path / "run", resume=True)
    assert "it begins now" in (tmp_path / "run" / "log.txt").read_text()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.EMA_DECAY = 6, 0.0
    _, third = run(cfg, tmp_path / "run", resume=True)
    assert "is given up: SOLVER.EMA_DECAY is 0" in (tmp_path / "run" / "log.txt").read_text()
    trained = second["trainer"]["training_weights"]
    trainer = Trainer(cfg.clone())
    trainer.checkpointer.save_dir = str(tmp_path / "run")
    assert all(value.shape == third["model"][name].shape for name, value in trained.items())
    assert any(not torch.equal(value, first["model"][name]) for name, value in trained.items())
