"""Run by test_distributed.py under torchrun: gradients of batches that are split over the processes.

Arguments: a file with {model: (config as YAML, {case: batch of all processes together}, parts)}, and the file for the
results {model: {case: {parameter: gradient}}}.
"""

import sys

import querymask  # noqa: F401  # isort: skip  (first: it makes Detectron2 importable)
import conftest
import torch
from detectron2.utils import comm

from querymask.common.engine import launch


def main(cases_file: str, result_file: str) -> None:
    results = {}
    for name, (config, batches, parts) in torch.load(cases_file, weights_only=False).items():
        results[name] = conftest.case_gradients(config, batches, parts)
    if comm.is_main_process():
        torch.save(results, result_file)


if __name__ == "__main__":
    launch(main, device="cpu", args=tuple(sys.argv[1:]))
