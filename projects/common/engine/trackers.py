"""Metrics of a run in services that keep track of experiments, through their own packages."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from querymask.common.packages import import_package

SMOOTHING_WINDOW = 20
"""Iterations over which losses are smoothed, as in the log."""


class TrackerWriter(EventWriter):
    """Hands on every metric once, with its iteration.

    Args:
        log: takes {name: value} and the iteration.
        finish: ends the run in the service.
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any], finish: Callable[[], Any]) -> None:
        self._log = log
        self._finish = finish
        self._last = -1

    def write(self) -> None:
        storage: EventStorage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(SMOOTHING_WINDOW).items():
            if iteration > self._last:
                by_iteration.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(by_iteration):
            self._log(by_iteration[iteration], iteration)
            self._last = iteration

    def close(self) -> None:
        self._finish()


def build_trackers(cfg: CfgNode) -> list[EventWriter]:
    """Writers for ``TRACKERS``: the run is named like ``OUTPUT_DIR`` and has the config.

    Raises:
        ValueError: a name is not known.
        ImportError: the package is not installed.
    """
    makers = {"wandb": _wandb, "mlflow": _mlflow}
    writers = []
    for name in cfg.TRACKERS:
        if name not in makers:
            raise ValueError(f"TRACKERS names {name!r}: known are {', '.join(makers)}")
        writers.append(makers[name](import_package(name, "TRACKERS needs", name), cfg))
    return writers


def _wandb(wandb: Any, cfg: CfgNode) -> EventWriter:
    """A run of the project that wandb's own environment variables name."""
    run = wandb.init(name=cfg.OUTPUT_DIR, dir=cfg.OUTPUT_DIR, config=_settings(cfg))
    return TrackerWriter(lambda metrics, iteration: run.log(metrics, step=iteration), run.finish)


def _mlflow(mlflow: Any, cfg: CfgNode) -> EventWriter:
    """A run in the experiment and store that mlflow's own environment variables name."""
    mlflow.start_run(run_name=cfg.OUTPUT_DIR)
    mlflow.log_dict(_settings(cfg), "config.json")
    return TrackerWriter(lambda metrics, iteration: mlflow.log_metrics(metrics, step=iteration), mlflow.end_run)


def _settings(node: Any) -> Any:
    """The config as plain dicts and lists."""
    if isinstance(node, CfgNode):
        return {key: _settings(value) for key, value in node.items()}
    return list(node) if isinstance(node, tuple) else node
