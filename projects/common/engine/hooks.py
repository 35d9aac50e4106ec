"""Hooks that Detectron2 lacks."""

import logging
import os

import torch
from detectron2.engine import HookBase, hooks

logger = logging.getLogger(__name__)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook, but the learning rate in the log is that of the first group (the base one).

    Detectron2 shows the group with the most tensors, which may be the backbone's.
    """

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        return 0


class CurvePlotter(HookBase):
    """Draws metrics.json as curves.png after training. To be registered after the writer of metrics.json."""

    def __init__(self, output_dir: str) -> None:
        self._output_dir = output_dir

    def after_train(self) -> None:
        from querymask.common.visualization import plot_curves  # matplotlib: only needed here

        metrics, picture = (os.path.join(self._output_dir, name) for name in ("metrics.json", "curves.png"))
        if os.path.getsize(metrics):
            plot_curves(metrics, picture)
            logger.info(f"curves of losses and AP are in {picture}")
