"""Several processes on CPU: the launcher, torchrun, and gradients that do not depend on the number of processes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from spread_batches import effseg_configs, isda_configs, istr_configs, record, solq_configs

from querymask import get_cfg
from querymask.common.engine import Trainer, default_setup

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def call(command: list[str], **environment: str) -> str:
    """Run a command to its end; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


COUNTS = {"both": [2, 1, 3, 2], "first only": [2, 0, 1, 0], "second only": [0, 1], "none": [0, 0]}
"""Instances of the images by case: also where only one process has some, and where none has."""


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict]]:
    """Batches of all processes together by case."""
    generator = torch.Generator().manual_seed(0)
    return {case: [record(n, generator) for n in numbers] for case, numbers in COUNTS.items()}


@pytest.fixture
def two_process_gradients(tmp_path: Path, batches: dict[str, list[dict]]) -> Callable:
    """Function ({model: config as YAML}) that gives {model: {case: {parameter: gradient}}}; "parts" is in two parts."""

    def compute(configs: dict[str, str]) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        cases = {name: (config, batches, 1) for name, config in configs.items() if name != "parts"}
        in_parts = {case: batch for case, batch in batches.items() if len(batch) == 4}
        torch.save({**cases, "parts": (configs["parts"], in_parts, 2)}, tmp_path / "cases.pth")
        call([*TORCHRUN, str(HERE / "two_processes.py"), str(tmp_path / "cases.pth"), str(tmp_path / "result.pth")])
        return torch.load(tmp_path / "result.pth", weights_only=True)

    return compute


def test_two_processes_give_the_gradients_of_one(
    cfg: CfgNode, batches: dict[str, list[dict]], two_process_gradients: Callable, single_process_gradients: Callable
) -> None:
    """Also where only one of them has instances, and where none has; with all limits of a batch.

    With LOSS_REDUCTION local, the mean of what the processes find alone, with limits of their own. All models are in
    one run: to start the processes takes longer than all of them.
    """
    cfg.MODEL.DEVICE = "cpu"  # as gloo's processes are
    makers = (solq_configs, isda_configs, istr_configs, effseg_configs)
    configs = {f"{make.__name__}, {name}": config for make in makers for name, config in make(cfg.clone()).items()}
    everywhere = configs["effseg_configs, limits"]
    local = everywhere.replace("LOSS_REDUCTION: global", "LOSS_REDUCTION: local")
    assert local != everywhere
    several = configs["solq_configs, two-stage"]
    results = two_process_gradients({**configs, "local": local, "parts": several})
    results_of_parts = results.pop("parts")
    assert list(results_of_parts) == ["both", "first only"]
    for model, config in configs.items():
        for case, gradients in single_process_gradients(config, batches).items():
            for name, expected in gradients.items():
                message = f"{model}, {case}: {name}"
                torch.testing.assert_close(results[model][case][name], expected, rtol=1e-6, atol=1e-9, msg=message)
                unused = case == "none" or name.startswith("detector.transitions")  # of anchors' shapes not selected
                assert unused or expected.abs().sum() > 0, message
                if config is several and case in results_of_parts:
                    in_parts = results_of_parts[case][name]
                    torch.testing.assert_close(in_parts, expected, rtol=1e-6, atol=1e-9, msg=f"parts, {message}")
    halves = [single_process_gradients(local, {case: x[rank::2] for case, x in batches.items()}) for rank in (0, 1)]
    for case, gradients in results["local"].items():
        for name, gradient in gradients.items():
            expected = (halves[0][case][name] + halves[1][case][name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9, msg=f"local, {case}: {name}")


def test_num_gpus_starts_processes_on_cpu(coco_folder: Path, tmp_path: Path, register: Callable[..., str]) -> None:
    """The command line trains the same in two processes as in one, and leaves everything in OUTPUT_DIR."""
    data = tmp_path / "data"
    content = json.loads((coco_folder / "train.json").read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    content["categories"] = [{"id": 1, "name": "balloon"}]
    (data / "balloon").mkdir(parents=True)
    for split in ("train", "val"):  # a data set that other processes can find by its name
        (data / "balloon" / split).symlink_to(coco_folder / "train")
        (data / "balloon" / f"{split}.json").write_text(json.dumps(content))
    config = ROOT / "projects/solq/configs/solq_shapes_quick.yaml"
    overrides = (
        "MODEL.SOLQ.NUM_CLASSES 1 MODEL.RESNETS.NORM FrozenBN SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 3 SOLVER.STEPS () "
        "SOLVER.OPTIMIZER SGD SOLVER.BASE_LR 0.01 SOLVER.WARMUP_ITERS 0 FLOAT32_MATMUL_PRECISION highest "
        "INPUT.MIN_SIZE_TRAIN (48,) INPUT.MIN_SIZE_TEST 48 DATALOADER.NUM_WORKERS 0 SEED 5 VIS_NUM_IMAGES 2 "
        "DATALOADER.ASPECT_RATIO_GROUPING True "  # equal sizes: padding depends on the number of processes
        "DATASETS.TRAIN ('balloon_train',) DATASETS.TEST ('balloon_val',)"
    ).split()
    two = tmp_path / "two"
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config), "--num-gpus", "2"]
    output = call(
        [*command, "--dist-url", "auto", *overrides, "OUTPUT_DIR", str(two)],
        DETECTRON2_DATASETS=str(data),
        CUDA_VISIBLE_DEVICES="",
    )
    assert "MODEL.DEVICE cuda becomes cpu" in output
    assert "2 process(es)" in output
    assert "Warning" not in output
    assert len(list((two / "predictions").glob("*.png"))) == 2
    for name in ("metrics.json", "curves.png", "config.yaml", "inference/coco_instances_results.json"):
        assert (two / name).is_file(), name

    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(overrides)
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(tmp_path / "one")
    cfg.DATASETS.TRAIN = (register("engine_balloon", data / "balloon" / "train.json"),)
    cfg.DATASETS.TEST = ()
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    one = trainer.model.state_dict()
    two = torch.load(two / "model_final.pth", weights_only=True)["model"]
    for name in one:
        step = (one[name] - start[name]).norm().item()
        assert (two[name] - one[name]).norm().item() <= 1e-2 * step + 1e-6, name
    assert (one["detector.query_embed.weight"] - start["detector.query_embed.weight"]).norm().item() > 1e-4


def test_run_survives_the_death_of_a_process(cfg: CfgNode, coco_folder: Path, tmp_path: Path) -> None:
    """torchrun starts both processes again, and the weights are those of a run that was not disturbed."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 8, (), 3
    cfg.MODEL.DEVICE = "cpu"
    weights = []
    for last in (-1, 4):
        cfg.OUTPUT_DIR = str(tmp_path / f"output{last}")
        config = tmp_path / f"config{last}.yaml"
        config.write_text(cfg.dump())
        torchrun = [*TORCHRUN, "--max-restarts", "1", str(HERE / "dying_worker.py")]
        output = call([*torchrun, str(config), str(coco_folder / "train.json"), str(last)])
        assert ("exitcode: -9" in output) == (last >= 0)
        weights.append(torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"])
    assert sorted(path.name for path in (tmp_path / "output4").glob("model_0*")) == [
        "model_0000002.pth",
        "model_0000005.pth",
    ]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
