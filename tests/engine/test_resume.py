"""An interrupted and resumed run equals an uninterrupted one, bit for bit."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from querymask.common.engine import Trainer, default_setup

pytestmark = pytest.mark.usefixtures("deterministic")


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
    assert "from now on" not in log


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
    name = "detector.transformer.level_embed"
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


def rates(folder: Path) -> dict[int, float]:
    """The logged learning rate by iteration."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["lr"] for line in lines if "lr" in line}


def resume_from(cfg: CfgNode, folder: Path, options: list, forget_settings: bool = False) -> tuple[dict, str]:
    """Train 2 iterations, change settings, resume to 4; the last checkpoint and the log of the second part."""
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0, ()
    run(cfg, folder, max_iter=2)
    if forget_settings:  # as checkpoints of earlier versions
        path = folder / "model_final.pth"
        content = torch.load(path, weights_only=True)
        del content["trainer"]["solver"]
        torch.save(content, path)
    before = (folder / "log.txt").read_text()
    cfg.merge_from_list(options)
    last = run(cfg, folder, resume=True, max_iter=4)
    return last, (folder / "log.txt").read_text().removeprefix(before)


@pytest.mark.parametrize("forget_settings", [False, True])
def test_settings_of_the_optimiser_follow_the_config(cfg: CfgNode, tmp_path: Path, forget_settings: bool) -> None:
    options = ["SOLVER.BASE_LR", 1e-7, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.25]
    last, log = resume_from(cfg, tmp_path / "run", options, forget_settings)
    groups = {group["name"]: group for group in last["trainer"]["_trainer"]["optimizer"]["param_groups"]}
    assert (groups["base"]["lr"], groups["backbone"]["lr"], groups["slow"]["lr"]) == pytest.approx((1e-7, 2.5e-8, 1e-8))
    assert {group["weight_decay"] for group in groups.values()} == {0.5}
    assert rates(tmp_path / "run") == {1: pytest.approx(1e-3), 3: pytest.approx(1e-7)}
    if forget_settings:
        assert "learning rate of the base parameters: 0.001 in the checkpoint, 1e-07 from now on" in log
        assert "weight decay of the slow parameters: 0.0001 in the checkpoint, 0.5 from now on" in log
    else:
        for key, old, new in (("BASE_LR", 0.001, 1e-07), ("WEIGHT_DECAY", 0.0001, 0.5), ("MAX_ITER", 2, 4)):
            assert f"SOLVER.{key}: {old} in the checkpoint, {new} from now on" in log


def test_new_rate_holds_from_the_first_step_on(cfg: CfgNode, tmp_path: Path) -> None:
    """With a rate of 0 nothing moves any more."""
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    before = run(cfg, tmp_path / "run", max_iter=2)
    cfg.SOLVER.BASE_LR = 0.0
    after = run(cfg, tmp_path / "run", resume=True, max_iter=4)
    assert_equal(before["model"], after["model"])


def test_momentum_and_clipping_follow_the_config(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.SOLVER.OPTIMIZER = "SGD"
    last, log = resume_from(cfg, tmp_path, ["SOLVER.MOMENTUM", 0.5, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.2])
    assert {group["momentum"] for group in last["trainer"]["_trainer"]["optimizer"]["param_groups"]} == {0.5}
    assert "SOLVER.MOMENTUM: 0.9 in the checkpoint, 0.5 from now on" in log
    assert "SOLVER.CLIP_GRADIENTS.CLIP_VALUE: 0.1 in the checkpoint, 0.2 from now on" in log


@pytest.mark.parametrize(
    "options", [["SOLVER.SLOW_PARAMETERS", ["transformer"]], ["SOLVER.WEIGHT_DECAY_NORM", 0.0]], ids=["slow", "norms"]
)
def test_moments_stay_with_their_parameters_in_other_groups(cfg: CfgNode, tmp_path: Path, options: list) -> None:
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(tmp_path), 2
    first = Trainer(cfg)
    first.train()
    cfg.merge_from_list(options)
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    groups = [[len(group["params"]) for group in trainer.optimizer.param_groups] for trainer in (first, second)]
    assert groups[0] != groups[1]
    for (name, old), new in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert_equal(first.optimizer.state[old], second.optimizer.state[new], name)


def test_another_optimiser_or_other_parameters_cannot_resume(cfg: CfgNode, tmp_path: Path) -> None:
    run(cfg, tmp_path, max_iter=1)
    cfg.SOLVER.OPTIMIZER = "SGD"
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is SGD, but the checkpoint to resume is of ADAMW.*anew"):
        run(cfg, tmp_path, resume=True)
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = Trainer(cfg)
    trainer.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"is of \d+ trained parameters in 3 groups, the config makes .*FREEZE_AT"):
        trainer.resume_or_load(resume=True)
