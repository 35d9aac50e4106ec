"""Run by test_distributed.py under torchrun: a run of which one process dies once.

Arguments: the config as YAML, the data set's JSON, the iteration after which the second process dies (-1: never).
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import querymask  # noqa: F401  # isort: skip  (first: it makes Detectron2 importable)
import conftest  # noqa: F401  (registers the backbone)
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm

from querymask.common.engine import Trainer, default_setup, launch


def main(config: str, annotations: str, last: int) -> None:
    register_coco_instances("engine_train", {}, annotations, str(Path(annotations).with_suffix("")))
    cfg = CfgNode.load_cfg(config)
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)

    def die(trainer: Trainer) -> None:
        if trainer.iter == last and comm.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.register_hooks([CallbackHook(after_step=die)])
    trainer.train()


if __name__ == "__main__":
    launch(main, device="cpu", args=(Path(sys.argv[1]).read_text(), sys.argv[2], int(sys.argv[3])))
