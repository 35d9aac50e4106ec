"""Several processes on CPU: the launcher, torchrun, and gradients that do not depend on the number of processes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_models import set_keys

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


def record(num_instances: int, generator: torch.Generator) -> dict:
    """A model input of 48 x 64 pixels."""
    instances = Instances((48, 64))
    corners = torch.rand(num_instances, 2, generator=generator) * 30
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 15], 1))
    instances.gt_classes = torch.arange(num_instances) % 2
    instances.gt_masks = BitMasks(torch.rand(num_instances, 48, 64, generator=generator) > 0.4)
    image = torch.randint(0, 256, (3, 48, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 48, "width": 64}


COUNTS = {"both": [2, 1, 3, 2], "first only": [2, 0, 1, 0], "second only": [0, 1], "none": [0, 0]}
"""Instances of the images by case: also where only one process has some, and where none has."""


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict]]:
    """Batches of all processes together by case."""
    generator = torch.Generator().manual_seed(0)
    return {case: [record(n, generator) for n in numbers] for case, numbers in COUNTS.items()}


@pytest.fixture
def two_process_gradients(tmp_path: Path, batches: dict[str, list[dict]]) -> Callable:
    """Function ({model: config as YAML}) that gives {model: {case: {parameter: gradient}}}."""

    def compute(configs: dict[str, str]) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        torch.save({name: (config, batches) for name, config in configs.items()}, tmp_path / "cases.pth")
        call([*TORCHRUN, str(HERE / "two_processes.py"), str(tmp_path / "cases.pth"), str(tmp_path / "result.pth")])
        return torch.load(tmp_path / "result.pth", weights_only=True)

    return compute


def solq_configs(cfg: CfgNode) -> dict[str, str]:
    cfg.MODEL.SOLQ.DROPOUT = 0.0
    one_stage = cfg.dump()
    cfg.MODEL.SOLQ.TWO_STAGE = True
    cfg.MODEL.SOLQ.DEC_LAYERS = 2
    cfg.MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION = "sum"
    return {"one-stage": one_stage, "two-stage": cfg.dump()}


def isda_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 8, "HIDDEN_DIM": 64, "NUM_HEADS": 4, "ENC_LAYERS": 1, "DEC_LAYERS": 2}
    section |= {"DIM_FEEDFORWARD": 32, "DROPOUT": 0.0, "KERNEL_MASK_FEATURE_DIM": 32}
    set_method(cfg, "ISDA", section)
    return {"dice": cfg.dump()}


def istr_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 8, "NUM_STAGES": 2, "HIDDEN_DIM": 8, "NUM_HEADS": 2, "DROPOUT": 0.0}
    section |= {"DIM_FEEDFORWARD": 16, "DIM_DYNAMIC": 4, "POOL_SIZE": 3, "HEAD_LAYERS": 1, "CODE_HEAD_LAYERS": 1}
    section |= {"CODING_SIZE": 16, "CODING_LENGTH": 16, "IN_FEATURES": ["res2", "res3", "res4", "res5"]}
    set_method(cfg, "ISTR", section)
    sigmoid = cfg.dump()
    cfg.MODEL.ISTR.CLASSIFIER = "softmax"
    return {"sigmoid": sigmoid, "softmax": cfg.dump()}


EFFSEG_HEADS = {
    "no masks": {"BRANCH": "none", "VERSION": 2},
    "limits": {
        "BRANCH": "EffSegBranch",
        "EFFSEG_REFINEMENTS": 100,
        "REGION_MAX_TRAIN_REGIONS": 7,
    },  # of 196 cells in a region
    "one region": {"BRANCH": "EffSegBranch", "EFFSEG_REFINEMENTS": 10, "REGION_MAX_TRAIN_REGIONS": 1},
    "boundary": {"BRANCH": "EffSegBranch", "EFFSEG_REFINEMENTS": 100, "EFFSEG_CHOOSE_BY": "boundary"},
    "no limits": {"BRANCH": "EffSegBranch", "EFFSEG_PROCESSING": "dense_sfm"},
    "Mask R-CNN": {"BRANCH": "MaskRCNNBranch", "REGION_MAX_TRAIN_REGIONS": 7},
    "PointRend": {"BRANCH": "PointRendBranch", "POINTREND_SUBDIVISIONS": 1},
    "RefineMask": {"BRANCH": "RefineMaskBranch"},
}


def effseg_configs(cfg: CfgNode) -> dict[str, str]:
    section = {"NUM_CLASSES": 2, "NUM_QUERIES": 500, "LEVELS": [2, 3, 4, 5], "HIDDEN_DIM": 32, "DEC_LAYERS": 1}
    section |= {"NUM_HEADS": 2, "DIM_FEEDFORWARD": 16}
    set_method(cfg, "EffSeg", section)
    configs = {}
    for form, settings in EFFSEG_HEADS.items():
        changed = cfg.clone()
        set_keys(changed, settings)
        configs[form] = changed.dump()
    return configs


def set_method(cfg: CfgNode, name: str, settings: dict[str, Any]) -> None:
    """Change the tiny SOLQ to another method, on four maps."""
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.BACKBONE.NAME = "build_engine_test_fine_backbone"
    set_keys(cfg, settings)


def test_two_processes_give_the_gradients_of_one(
    cfg: CfgNode, batches: dict[str, list[dict]], two_process_gradients: Callable, single_process_gradients: Callable
) -> None:
    """Also where only one of them has instances, and where none has; with all limits of a batch.

    With LOSS_REDUCTION local, the mean of what the processes find alone, with limits of their own. All models are in
    one run: to start the processes takes longer than all of them.
    """
    makers = (solq_configs, isda_configs, istr_configs, effseg_configs)
    configs = {f"{make.__name__}, {name}": config for make in makers for name, config in make(cfg.clone()).items()}
    everywhere = configs["effseg_configs, limits"]
    local = everywhere.replace("LOSS_REDUCTION: global", "LOSS_REDUCTION: local")
    assert local != everywhere
    results = two_process_gradients({**configs, "local": local})
    for model, config in configs.items():
        for case, gradients in single_process_gradients(config, batches).items():
            for name, expected in gradients.items():
                message = f"{model}, {case}: {name}"
                torch.testing.assert_close(results[model][case][name], expected, rtol=1e-6, atol=1e-9, msg=message)
                unused = case == "none" or name.startswith("detector.transitions")  # of anchors' shapes not selected
                assert unused or expected.abs().sum() > 0, message
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
