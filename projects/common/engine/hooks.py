"""Hooks that Detectron2 lacks."""

import logging
import os
import re

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks

logger = logging.getLogger(__name__)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook, but the learning rate in the log is that of the first group (the base one).

    Detectron2 shows the group with the most tensors, which may be the backbone's.
    """

    def before_train(self) -> None:
        super().before_train()
        self._best_param_group_id = 0


class RecentCheckpoints(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which leaves the last checkpoints only, those of before a run was resumed included.

    Args:
        kept: how many of the numbered ones; 0: all. ``model_best.pth`` and ``model_final.pth`` always stay.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, kept: int) -> None:
        super().__init__(checkpointer, period)
        if kept < 0:
            raise ValueError(f"SOLVER.CHECKPOINTS_KEPT is {kept}: give a number of checkpoints, or 0 for all")
        self._kept = kept

    def after_step(self) -> None:
        super().after_step()
        if self._kept and (self.trainer.iter + 1) % self.period == 0:
            folder = self.checkpointer.save_dir
            numbered = sorted(name for name in self.path_manager.ls(folder) if re.fullmatch(r"model_\d{7,}\.pth", name))
            for name in numbered[: -self._kept]:
                self.path_manager.rm(os.path.join(folder, name))


class CurvePlotter(HookBase):
    """Draws metrics.json as curves.png at the end of training. To be registered after the writer of metrics.json."""

    def __init__(self, output_dir: str) -> None:
        self._output_dir = output_dir

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:  # training failed; an error here would hide the reason
            return
        metrics, picture = (os.path.join(self._output_dir, name) for name in ("metrics.json", "curves.png"))
        try:
            from querymask.common.visualization import plot_curves  # matplotlib: only needed here

            plot_curves(metrics, picture)
        except Exception as error:  # whatever it is, a finished run keeps its results
            logger.warning(f"there are no curves of {metrics}: {type(error).__name__}: {error}")
        else:
            logger.info(f"curves of losses and AP are in {picture}")
