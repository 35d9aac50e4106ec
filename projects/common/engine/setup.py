"""What a run does before it builds anything: device, log, seed."""

import argparse
import logging
import os
import platform

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

import querymask
from querymask.common.engine.class_names import choose_class_names
from querymask.common.engine.own_data import register_configured
from querymask.common.engine.sampling import START, mix_seed, seed_everything
from querymask.common.fonts import set_font
from querymask.common.precision import autocast_dtype

logger = logging.getLogger(__name__)


def choose_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to "cpu", with a line that says so, where it asks for CUDA and there is no GPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"No GPU found: MODEL.DEVICE {cfg.MODEL.DEVICE} becomes cpu", flush=True)
        cfg.MODEL.DEVICE = "cpu"


def start_log(cfg: CfgNode, rank: int) -> None:
    """Write to the terminal and to ``log.txt`` in ``OUTPUT_DIR``, from the process of rank 0; others to own files."""
    for name in ("fvcore", "querymask", "detectron2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)


def choose_seed(cfg: CfgNode) -> None:
    """Set ``SEED``, the same in all processes, where it is negative (not given), and note it in the log."""
    if cfg.SEED >= 0:
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    if frozen:
        cfg.freeze()
    logger.info(f"SEED was not given: this run has SEED {cfg.SEED}")


def training_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The type of mixed precision that a config asks for, None for none."""
    return autocast_dtype(cfg.SOLVER.AMP.PRECISION, cfg.MODEL.DEVICE) if cfg.SOLVER.AMP.ENABLED else None


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log in ``OUTPUT_DIR``, note versions and config there, choose a seed if none is given, and use it.

    Stands in for ``detectron2.engine.default_setup``.
    """
    rank = comm.get_rank()
    if comm.is_main_process():
        PathManager.mkdirs(cfg.OUTPUT_DIR)
    start_log(cfg, rank)
    register_configured(cfg)
    set_font(cfg.VIS_FONT)  # stops the run here, not at its first picture
    choose_seed(cfg)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    logger.info(
        f"querymask {querymask.__version__}, Detectron2 {detectron2.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {gpu}, {comm.get_world_size()} process(es) on {cfg.MODEL.DEVICE}"
    )
    if not getattr(args, "eval_only", False):
        dtype = training_dtype(cfg)
        name = str(dtype).removeprefix("torch.")
        where = "float32 (SOLVER.AMP.ENABLED is False)" if dtype is None else f"{name} where that is safe (SOLVER.AMP)"
        logger.info(f"training computes in {where}, evaluation in float32")
        choose_class_names(cfg)
    logger.info(f"arguments: {args}")
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        with PathManager.open(path, "w") as file:
            file.write(cfg.dump())
        logger.info(f"the full config is in {path}")
    seed_everything(mix_seed(cfg.SEED, START, rank))
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    torch.set_float32_matmul_precision(cfg.FLOAT32_MATMUL_PRECISION)
