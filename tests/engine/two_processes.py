"""Run by test_distributed.py, alone and under torchrun: gradients of batches that are split over the processes.

Arguments: a file with {model: (config as YAML, {case: batch of all processes together})}, and the file for the results
{model: {case: {parameter: gradient}}}.
"""

import sys

import conftest  # noqa: F401  first: makes Detectron2 importable and registers the tiny backbone
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm

from querymask.common.engine import launch
from querymask.common.engine.trainer import distribute


def build(config: str) -> torch.nn.Module:
    """The model in double precision, with weights that are the same in every process."""
    torch.manual_seed(0)
    model = build_model(CfgNode.load_cfg(config)).double()
    for parameter in model.parameters():  # heads start at zero, which would hide most gradients
        torch.nn.init.normal_(parameter, std=0.1)
    return distribute(model.train())


def gradients(model: torch.nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """Of the sum of the losses, with this process' part of a batch."""
    model.zero_grad()
    sum(model(batch[comm.get_rank() :: comm.get_world_size()]).values()).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def main(cases_file: str, result_file: str) -> None:
    results = {}
    for name, (config, batches) in torch.load(cases_file, weights_only=False).items():
        model = build(config)
        results[name] = {case: gradients(model, batch) for case, batch in batches.items()}
    if comm.is_main_process():
        torch.save(results, result_file)


if __name__ == "__main__":
    launch(main, device="cpu", args=tuple(sys.argv[1:]))
