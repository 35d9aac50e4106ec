"""Hooks that Detectron2 lacks."""

import logging
import os

from detectron2.engine import HookBase, hooks

logger = logging.getLogger(__name__)


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook, but the learning rate in the log is that of the first group (the base one).

    Detectron2 shows the group with the most tensors, which may be the backbone's.
    """

    def before_train(self) -> None:
        super().before_train()
        self._best_param_group_id = 0


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
