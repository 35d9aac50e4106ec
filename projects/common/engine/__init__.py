"""Training and evaluation of any meta-architecture: ``Trainer``, start-up and launcher."""

from detectron2.engine import default_argument_parser

from querymask.common.engine.checkpointer import StrictCheckpointer, find_checkpoint
from querymask.common.engine.checks import check_num_classes, num_classes_key
from querymask.common.engine.launch import first_rank, launch
from querymask.common.engine.own_data import register_configured, use_folder
from querymask.common.engine.setup import choose_device, default_setup, start_log
from querymask.common.engine.trainer import Trainer

__all__ = [
    "StrictCheckpointer",
    "Trainer",
    "check_num_classes",
    "choose_device",
    "default_argument_parser",
    "default_setup",
    "find_checkpoint",
    "first_rank",
    "launch",
    "num_classes_key",
    "register_configured",
    "start_log",
    "use_folder",
]
