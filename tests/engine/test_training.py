"""Set-up, training step, log and command line."""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from querymask.common.engine import Trainer, choose_device, default_setup, launch
from querymask.common.engine.step import TrainingStep, initial_loss_scale

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def train_net() -> ModuleType:
    """train_net.py as a module."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(cfg: CfgNode) -> list[dict]:
    """Lines of metrics.json."""
    return [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]


def test_run_of_the_command_line(train_net: ModuleType, cfg: CfgNode, tmp_path: Path) -> None:
    """Trains, evaluates, then evaluates the checkpoint again with the same result."""
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    overrides = ["SOLVER.MAX_ITER", "3", "DATASETS.TEST", "('engine_val',)", "TEST.EVAL_PERIOD", "2"]
    args = train_net.parse_arguments(["--config-file", str(config), *overrides])
    trained = train_net.main(args, train_net.setup(args))
    assert set(trained) == {"bbox", "segm"}
    assert math.isfinite(trained["segm"]["AP"])
    assert "Distribution of instances among all 2 categories" in (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    lines = metrics(cfg)
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 3]
    assert {"total_loss", "loss_ce", "loss_bbox", "loss_giou", "loss_vector", "lr", "data_time"} <= set().union(*lines)

    weights = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    overrides += ["MODEL.WEIGHTS", weights]
    args = train_net.parse_arguments(["--config-file", str(config), "--eval-only", *overrides])
    evaluated = train_net.main(args, train_net.setup(args))
    assert evaluated["bbox"]["AP"] == pytest.approx(trained["bbox"]["AP"], nan_ok=True)
    args = train_net.parse_arguments(["--config-file", str(config), "--eval-only", "--resume", *overrides])
    resumed = train_net.main(args, train_net.setup(args))
    assert resumed["segm"]["AP"] == pytest.approx(trained["segm"]["AP"], nan_ok=True)

    results = str(Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json")
    args = train_net.parse_arguments(["--config-file", str(config), "--eval-only", "--results", results, *overrides])
    from_file = train_net.main(args, train_net.setup(args))
    assert from_file["segm"]["AP"] == pytest.approx(trained["segm"]["AP"], nan_ok=True)


def test_unknown_key_is_refused(train_net: ModuleType) -> None:
    with pytest.raises((AssertionError, KeyError), match="NUM_CLASES"):
        train_net.setup(train_net.parse_arguments(["MODEL.SOLQ.NUM_CLASES", "3"]))


def test_device_is_cpu_where_there_is_no_gpu(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg.MODEL.DEVICE = "cuda"
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out == "No GPU found: MODEL.DEVICE cuda becomes cpu\n"
    choose_device(cfg)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.MODEL.DEVICE = "cuda"
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cuda"


def test_setup_draws_a_seed_and_keeps_the_config(cfg: CfgNode) -> None:
    cfg.SEED = -1
    cfg.freeze()
    default_setup(cfg, argparse.Namespace())
    assert cfg.SEED >= 0 and cfg.is_frozen()
    first = torch.rand(3)
    default_setup(cfg, argparse.Namespace())
    assert torch.equal(torch.rand(3), first)
    saved = CfgNode.load_cfg((Path(cfg.OUTPUT_DIR) / "config.yaml").read_text())
    assert saved.SEED == cfg.SEED
    assert f"this run has SEED {cfg.SEED}" in (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()


def test_one_process_is_called_directly() -> None:
    assert launch(lambda a, b: a + b, num_processes=0, args=(1, 2)) == 3


def test_machines_need_an_address() -> None:
    with pytest.raises(ValueError, match="give tcp://ADDRESS:PORT"):
        launch(print, 2, num_machines=2, dist_url="auto", device="cpu")


class Square(nn.Module):
    """Losses (w - x)^2 and 1; x is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: float) -> dict[str, torch.Tensor]:
        return {"loss_square": (self.w - x).square(), "loss_one": torch.ones(())}


def endless() -> Iterator[float]:
    while True:
        yield 3.0


def test_losses_of_every_iteration_arrive_in_the_log() -> None:
    model = Square()
    step = TrainingStep(model, endless(), torch.optim.SGD(model.parameters(), lr=0.25), seed=0)
    with EventStorage() as storage:
        for step.iter in range(4):
            storage.iter = step.iter
            step.run_step()
        assert "loss_square" not in storage.histories()
        step.write_metrics()
        assert storage.iter == 3
        assert storage.history("loss_square").values() == [(9.0, 0), (2.25, 1), (0.5625, 2), (0.140625, 3)]
        assert storage.history("total_loss").values()[0] == (10.0, 0)
        step.write_metrics()
        assert len(storage.history("total_loss").values()) == 4


def test_random_numbers_depend_on_seed_and_iteration_only() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: float) -> torch.Tensor:
            drawn.append(torch.rand(()).item())
            return self.w * 0

    drawn: list[float] = []
    for iterations, seed in (([0, 1, 2], 1), ([2, 0], 1), ([0], 2)):
        model = Noise()
        step = TrainingStep(model, endless(), torch.optim.SGD(model.parameters(), lr=1.0), seed)
        with EventStorage():
            for step.iter in iterations:
                step.run_step()
    assert drawn[2] == drawn[3] and drawn[0] == drawn[4]
    assert len(set(drawn)) == 4


def test_model_left_in_evaluation_mode_is_refused() -> None:
    model = Square()
    step = TrainingStep(model, endless(), torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
    model.eval()
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        step.run_step()


def test_mixed_precision_on_cpu(cfg: CfgNode) -> None:
    """bf16 where it is safe; weights, losses and checkpoints stay float32, and the losses are near those of float32."""
    cfg.MODEL.SOLQ.NUM_FEATURE_LEVELS = 3  # PyTorch's bf16 convolution has NaN gradients where a map is one cell wide
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    losses = {}
    for enabled in (False, True):
        cfg.SOLVER.AMP.ENABLED = enabled
        cfg.SOLVER.MAX_ITER = 2
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, str(enabled))
        default_setup(cfg, argparse.Namespace())
        trainer = Trainer(cfg)
        trainer.train()
        losses[enabled] = next(line["total_loss"] for line in metrics(cfg) if "total_loss" in line)
        assert {value.dtype for value in trainer.model.state_dict().values()} <= {torch.float32, torch.int64}
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


def test_empty_images_are_kept_or_left_out(cfg: CfgNode) -> None:
    assert len(Trainer.build_train_loader(cfg).dataset) == 10
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert len(Trainer.build_train_loader(cfg).dataset) == 9


def test_unknown_sampler_is_refused(cfg: CfgNode) -> None:
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSampler"
    with pytest.raises(ValueError, match="'RandomSampler'; known are TrainingSampler and Repeat"):
        Trainer.build_train_loader(cfg)


def test_logged_learning_rate_is_the_base_rate(cfg: CfgNode) -> None:
    """Though another group has more tensors."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 1, 0
    cfg.SOLVER.SLOW_PARAMETERS = ["transformer"]
    trainer = Trainer(cfg)
    assert len(trainer.optimizer.param_groups[0]["params"]) < len(trainer.optimizer.param_groups[2]["params"])
    trainer.train()
    assert [line["lr"] for line in metrics(cfg) if "lr" in line] == [pytest.approx(cfg.SOLVER.BASE_LR)]


def test_detectron2_meta_architecture(cfg: CfgNode) -> None:
    """The trainer is not only for this project's models."""
    cfg.merge_from_list(
        "MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.MASK_ON True MODEL.BACKBONE.NAME build_resnet_backbone "
        "MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 16 "
        "MODEL.RPN.POST_NMS_TOPK_TRAIN 8 MODEL.RPN.POST_NMS_TOPK_TEST 8 MODEL.ROI_HEADS.NAME StandardROIHeads "
        "MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead MODEL.ROI_BOX_HEAD.NUM_FC 1 "
        "MODEL.ROI_BOX_HEAD.FC_DIM 8 MODEL.ROI_MASK_HEAD.NAME MaskRCNNConvUpsampleHead MODEL.ROI_MASK_HEAD.CONV_DIM 8 "
        "INPUT.MASK_FORMAT bitmask SOLVER.MAX_ITER 2 SOLVER.STEPS () DATASETS.TEST ('engine_val',)".split()
    )
    default_setup(cfg, argparse.Namespace())
    assert Trainer(cfg).train() is not None
    assert {"loss_rpn_cls", "loss_mask", "total_loss"} <= set().union(*metrics(cfg))


def test_loss_scale_belongs_to_fp16(caplog: pytest.LogCaptureFixture) -> None:
    """A run may be resumed in another precision; a line says what becomes of the loss scale."""

    def make(dtype: torch.dtype | None, scaled: bool) -> TrainingStep:
        step = TrainingStep(nn.Linear(1, 1), [], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 0, dtype)
        assert step.grad_scaler.is_enabled() == scaled
        return step

    fp16 = make(torch.float16, True).state_dict()
    fp16["grad_scaler"]["scale"] = 128.0
    others = [make(dtype, False) for dtype in (torch.bfloat16, None)]
    with caplog.at_level("INFO", logger="querymask"):
        again = make(torch.float16, True)
        again.load_state_dict(fp16)
        assert again.grad_scaler.state_dict()["scale"] == 128.0 and not caplog.messages
        for step in others:
            step.load_state_dict(fp16)
            assert "grad_scaler" not in step.state_dict()
            assert ["its loss scale is left out" in message for message in caplog.messages] == [True]
            caplog.clear()
            step.load_state_dict(step.state_dict())
            again.load_state_dict(step.state_dict())
            assert ["has no loss scale" in message for message in caplog.messages] == [True]
            caplog.clear()


@pytest.mark.parametrize(
    "loss, expected",
    [(0.0, 65536), (1.0, 65536), (1.1, 32768), (4.0, 16384), (6830.3, 8), (3e6, 2**-6), (float("nan"), 1)],
)
def test_initial_loss_scale(loss: float, expected: float) -> None:
    assert initial_loss_scale(torch.tensor(loss)) == expected


def test_processes_set_out_from_the_scale_of_the_largest_loss(tmp_path: Path) -> None:
    """Gradients are averaged scaled, so that the scale must be the same everywhere."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        (tmp_path / f"{rank}.txt").write_text(str(initial_loss_scale(torch.tensor([10.0, 3000.0][rank]))))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["16.0", "16.0"]


class SummedSquare(nn.Module):
    """Loss 1e4 (w - x)^2, w in float16: from a scale of 65536 the first ten steps would be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: float) -> torch.Tensor:
        return 1e4 * (self.w.half() - x).float().square()


def test_no_step_is_lost_to_the_loss_scale() -> None:
    """As in float32; and a resumed run goes on with its own scale."""
    ways = {}
    for dtype in (None, torch.float16):
        model = SummedSquare()
        step = TrainingStep(model, endless(), torch.optim.SGD(model.parameters(), lr=1e-5), 0, dtype)
        ways[dtype] = []
        with EventStorage():
            for step.iter in range(5):
                step.run_step()
                ways[dtype].append(model.w.item())
    assert ways[None][0] == pytest.approx(0.6) and ways[torch.float16] == pytest.approx(ways[None], rel=0.01)
    assert step.grad_scaler.get_scale() == 0.5  # of a loss of 90,000

    state = step.state_dict()
    state["grad_scaler"]["scale"] = 0.25
    resumed = TrainingStep(model, endless(), step.optimizer, 0, torch.float16)
    resumed.load_state_dict(state)
    with EventStorage():
        resumed.run_step()
    assert resumed.grad_scaler.get_scale() == 0.25
