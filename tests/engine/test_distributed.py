"""Several processes on CPU: the launcher, torchrun, and gradients that do not depend on the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def call_all(commands: list[list[str]], **environment: str) -> list[str]:
    """Run commands at the same time, each to its end; their outputs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-9000:]
    return outputs


def record(num_instances: int, generator: torch.Generator) -> dict:
    """A model input of 48 x 64 pixels."""
    instances = Instances((48, 64))
    corners = torch.rand(num_instances, 2, generator=generator) * 30
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 15], 1))
    instances.gt_classes = torch.arange(num_instances) % 2
    instances.gt_masks = BitMasks(torch.rand(num_instances, 48, 64, generator=generator) > 0.4)
    image = torch.randint(0, 256, (3, 48, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 48, "width": 64}


def test_two_processes_give_the_gradients_of_one(cfg: CfgNode, tmp_path: Path) -> None:
    """Also where only one of them has instances, and where none has."""
    generator = torch.Generator().manual_seed(0)
    counts = {"both": [2, 1, 3, 2], "first only": [2, 0, 1, 0], "second only": [0, 1], "none": [0, 0]}
    batches = {case: [record(n, generator) for n in numbers] for case, numbers in counts.items()}
    cfg.MODEL.SOLQ.DROPOUT = 0.0
    one_stage = cfg.dump()
    cfg.MODEL.SOLQ.TWO_STAGE = True
    cfg.MODEL.SOLQ.DEC_LAYERS = 2
    cfg.MODEL.SOLQ.VECTOR_LOSS_REDUCTION = "sum"
    models = {"one-stage": (one_stage, batches), "two-stage": (cfg.dump(), batches)}
    torch.save(models, tmp_path / "cases.pth")

    script = [str(HERE / "two_processes.py"), str(tmp_path / "cases.pth")]
    call_all([[sys.executable, *script, str(tmp_path / "one.pth")], [*TORCHRUN, *script, str(tmp_path / "two.pth")]])
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pth", "two.pth"))
    assert one.keys() == two.keys() == models.keys()
    for model in models:
        for case in batches:
            for name, expected in one[model][case].items():
                message = f"{model}, {case}: {name}"
                torch.testing.assert_close(two[model][case][name], expected, rtol=1e-6, atol=1e-9, msg=message)
                assert case == "none" or expected.abs().sum() > 0, message
