"""From Python: a trained model in one line."""

import os
from typing import TYPE_CHECKING

import torch

from querymask.command_line import load_config, load_run

if TYPE_CHECKING:
    from querymask.common.predictor import Predictor


def load(
    config_or_run: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    longest_side: int = 0,
) -> "Predictor":
    """A predictor: call it with images.

    Args:
        config_or_run: OUTPUT_DIR of a training run, whose best checkpoint is used where one was kept, else its last; or
            a config file.
        weights: a checkpoint; None: that of the run, or MODEL.WEIGHTS of the config.
        device: such as "cuda:1"; None: the config's, or "cpu" without a GPU.
        longest_side: of the image that boxes and masks are of, in pixels, where it is larger; 0: no limit.

    Raises:
        FileNotFoundError: there is no such config, run or checkpoint.
        ValueError: weights that do not fit the config, or none; a device that is not there.
    """
    if not os.path.exists(config_or_run):
        raise FileNotFoundError(
            f"{config_or_run}: there is no such file or folder. Give a config file, or the OUTPUT_DIR of a run"
        )
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch finds no GPU: give 'cpu', or none to have it chosen")
    from querymask.common.predictor import Predictor  # and Detectron2

    read = load_run if os.path.isdir(config_or_run) else load_config
    overrides = [] if weights is None else ["MODEL.WEIGHTS", os.fspath(weights)]
    cfg = read(config_or_run, overrides, device=device)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(f"{config_or_run} names no MODEL.WEIGHTS: give a checkpoint as weights")
    return Predictor(cfg, longest_side)
