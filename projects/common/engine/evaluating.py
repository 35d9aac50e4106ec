"""What happens at every evaluation during training: the best checkpoint is kept, and training may end early."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

VALIDATION_LOSS = "validation/total_loss"
TASKS = {"bbox": ("AP",), "segm": ("AP",), "boundary": ("AP",)}
TASKS |= dict.fromkeys(("panoptic_seg", "panoptic_boundary"), ("PQ", "SQ", "RQ"))
"""Of an evaluation, and how their metrics begin."""


class EarlyStop(BaseException):
    """Ends the loop of training without an error; Detectron2's loop reports exceptions as failures."""


def check_evaluation_keys(cfg: CfgNode) -> None:
    """Refuse what could only fail at the first evaluation.

    Raises:
        ValueError: ``TEST.BEST_METRIC`` or ``TEST.PATIENCE`` have no meaning.
    """
    metric = cfg.TEST.BEST_METRIC
    parts = metric.split("/")
    if metric == VALIDATION_LOSS:
        if not cfg.TEST.LOSS:
            raise ValueError(f"TEST.BEST_METRIC is {metric}, which is not computed: set TEST.LOSS True")
    elif metric and (len(parts) < 2 or not parts[-1].startswith(TASKS.get(parts[-2], ()))):
        raise ValueError(
            f"TEST.BEST_METRIC is {metric!r}: give a metric of the evaluation, as segm/AP, bbox/AP50, "
            f"boundary/AP or panoptic_seg/PQ (behind the data set's name and / where DATASETS.TEST has several), or {VALIDATION_LOSS}"
        )
    if cfg.TEST.PATIENCE and not (metric and cfg.TEST.EVAL_PERIOD):
        raise ValueError(
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE} evaluations without a better TEST.BEST_METRIC: set this and "
            "TEST.EVAL_PERIOD, or TEST.PATIENCE 0"
        )


class EvaluationHook(HookBase):
    """Evaluates every ``TEST.EVAL_PERIOD`` iterations and at the end, as Detectron2's hook; then, with ``BEST_METRIC``,

    - writes ``model_best.pth`` where the metric is better than before, and ``best.json``, which a resumed run reads;
    - ends training where it has not been better for ``TEST.PATIENCE`` evaluations.

    Args:
        evaluate: gives metrics in dicts, {task: {metric: value}}; empty in other processes than the main one.
        losses: gives losses of the validation by name; None: they are not wanted.
        checkpointer: of the run.
    """

    def __init__(
        self,
        cfg: CfgNode,
        evaluate: Callable[[], Mapping[str, Any]],
        losses: Callable[[], Mapping[str, float]] | None,
        checkpointer: Checkpointer,
    ) -> None:
        self._period = cfg.TEST.EVAL_PERIOD
        self._metric = cfg.TEST.BEST_METRIC
        self._patience = cfg.TEST.PATIENCE
        self._file = os.path.join(cfg.OUTPUT_DIR, "best.json")
        self._evaluate = evaluate
        self._losses = losses
        self._checkpointer = checkpointer
        self._best: dict[str, Any] = {}
        self._evaluated = 0

    def before_train(self) -> None:
        if not self.trainer.start_iter:
            self._put_aside()
        if not (self._metric and self.trainer.start_iter and PathManager.isfile(self._file)):
            return
        with PathManager.open(self._file) as file:
            best = json.load(file)
        if best["metric"] == self._metric and best["iteration"] <= self.trainer.start_iter:
            self._best = best

    def _put_aside(self) -> None:
        """Keep the best checkpoint of an earlier run in the folder from being taken for one of this run."""
        for path in (self._file, os.path.join(os.path.dirname(self._file), "model_best.pth")):
            if comm.is_main_process() and PathManager.isfile(path):
                if PathManager.isfile(f"{path}.before"):
                    PathManager.rm(f"{path}.before")
                PathManager.mv(path, f"{path}.before")
                logger.info(f"{path} is of an earlier run: it is {path}.before from now on")

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._run(done)
            if self._patience and self._best and (done - self._best["iteration"]) // self._period >= self._patience:
                self._stop(done)

    def after_train(self) -> None:
        done = self.trainer.iter
        if done >= self.trainer.max_iter and done != self._evaluated:  # not after a failure, nor after an early stop
            self._run(done)
        del self._evaluate, self._losses  # which refer to the trainer

    def _run(self, done: int) -> None:
        metrics = {}
        if self._losses is not None:
            metrics = {f"validation/{name}": value for name, value in self._losses().items()}
        metrics.update(flatten_results_dict(self._evaluate() or {}))
        self._evaluated = done
        self.trainer.storage.put_scalars(**{name: float(x) for name, x in metrics.items()}, smoothing_hint=False)
        if self._metric:
            self._compare(comm.all_gather(metrics)[0], done)  # those of the main process
        comm.synchronize()

    def _compare(self, metrics: Mapping[str, float], done: int) -> None:
        if self._metric not in metrics:
            logger.warning(
                f"TEST.BEST_METRIC {self._metric} is not among the metrics, so no best checkpoint is written; there "
                f"are {', '.join(metrics) or 'none'}"
            )
            return
        value = float(metrics[self._metric])
        sign = -1 if self._metric == VALIDATION_LOSS else 1
        if not math.isfinite(value) or (self._best and sign * value <= sign * self._best["value"]):
            return
        self._best = {"metric": self._metric, "value": value, "iteration": done}
        self._checkpointer.save("model_best", iteration=done - 1)
        if comm.is_main_process():
            with PathManager.open(self._file, "w") as file:
                json.dump(self._best, file)
            logger.info(f"{self._metric} {value:.4g} is the best so far: model_best.pth is of iteration {done - 1}")

    def _stop(self, done: int) -> None:
        logger.info(
            f"{self._metric} has not been better for {self._patience} evaluations (TEST.PATIENCE): training ends "
            f"after {done} of {self.trainer.max_iter} iterations"
        )
        self._checkpointer.save("model_final", iteration=done - 1)
        self.trainer.iter = self.trainer.max_iter = done
        raise EarlyStop
