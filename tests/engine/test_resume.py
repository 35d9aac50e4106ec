"""An interrupted and resumed run equals an uninterrupted one, bit for bit."""

import argparse
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from querymask.common.engine import Trainer, default_setup


def run(cfg: CfgNode, folder: Path, resume: bool = False, max_iter: int = 20) -> dict:
    """Train in ``folder`` to ``max_iter``; the content of the last checkpoint."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.MAX_ITER = max_iter
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return torch.load(folder / "model_final.pth", weights_only=True)


def assert_equal(a: object, b: object, path: str = "") -> None:
    """Nested dicts and lists are equal, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["DATALOADER.NUM_WORKERS", 2],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.OPTIMIZER", "SGD"],
        ["DATALOADER.ASPECT_RATIO_GROUPING", False, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
    ],
    ids=["plain", "workers", "cosine-sgd", "repeat"],
)
def test_killed_run_resumes_exactly(cfg: CfgNode, tmp_path: Path, options: list) -> None:
    cfg.merge_from_list(options)
    whole = run(cfg, tmp_path / "whole")
    # A run that died after iteration 10 leaves its checkpoint
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000009.pth", killed)
    (killed / "last_checkpoint").write_text("model_0000009.pth")

    resumed = run(cfg, killed, resume=True)
    assert_equal(whole, resumed)
    assert whole["iteration"] == 19
    log = (killed / "log.txt").read_text()
    assert f"resumed at iteration 10 from {killed / 'model_0000009.pth'}" in log


def test_longer_run_resumes_exactly_with_drawn_seed_and_evaluation(cfg: CfgNode, tmp_path: Path) -> None:
    """20 iterations == 10 + resume + 10, though the second part draws another SEED and the first one was evaluated."""
    cfg.SEED = -1
    cfg.SOLVER.WARMUP_ITERS = 0
    first = run(cfg, tmp_path / "parts", max_iter=10)
    cfg.SEED = first["trainer"]["seed"]
    whole = run(cfg, tmp_path / "whole")
    cfg.SEED = -1
    cfg.DATASETS.TEST = ("engine_val",)
    cfg.TEST.EVAL_PERIOD = 4
    resumed = run(cfg, tmp_path / "parts", resume=True)
    assert_equal(whole, resumed)
    assert f"goes on with its own SEED {first['trainer']['seed']}" in (tmp_path / "parts" / "log.txt").read_text()


def test_another_seed_is_another_run(cfg: CfgNode, tmp_path: Path) -> None:
    first = run(cfg, tmp_path / "a", max_iter=2)
    cfg.SEED += 1
    second = run(cfg, tmp_path / "b", max_iter=2)
    name = "transformer.level_embed"
    assert not torch.equal(first["model"][name], second["model"][name])


def test_nothing_to_resume_is_said(cfg: CfgNode, tmp_path: Path) -> None:
    run(cfg, tmp_path / "new", resume=True, max_iter=1)
    assert "nothing to resume" in (tmp_path / "new" / "log.txt").read_text()


def test_finished_run_is_only_evaluated_again(cfg: CfgNode, tmp_path: Path) -> None:
    before = run(cfg, tmp_path / "done", max_iter=2)
    cfg.DATASETS.TEST = ("engine_val",)
    after = run(cfg, tmp_path / "done", resume=True, max_iter=2)
    assert_equal(before["model"], after["model"])
    assert os.path.isfile(tmp_path / "done" / "inference" / "coco_instances_results.json")
