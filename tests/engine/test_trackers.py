"""Metrics in the packages of services, here recorded by stand-ins and, where it is installed, by mlflow itself."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from querymask.common.engine import Trainer
from querymask.common.engine.trackers import build_trackers


class Recorder(ModuleType):
    """Takes every call of wandb's and mlflow's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(log=self.log, finish=self.finish) if name == "init" else None

        return call


@pytest.mark.parametrize(("name", "log", "last"), [("wandb", "log", "finish"), ("mlflow", "log_metrics", "end_run")])
def test_every_metric_arrives_once(
    name: str, log: str, last: str, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    cfg.TRACKERS = [name]
    (writer,) = build_trackers(cfg)
    with EventStorage() as storage:
        for iteration in range(6):
            storage.iter = iteration
            storage.put_scalar("loss", iteration, smoothing_hint=False)
            if iteration == 3:
                storage.put_scalar("segm/AP", 12.5, smoothing_hint=False)
            if iteration % 2:
                writer.write()
        writer.write()
        writer.close()
    logged = [(args[0], kwargs["step"]) for kind, args, kwargs in recorder.calls if kind == log]
    assert logged == [({"loss": 1.0}, 1), ({"loss": 3.0, "segm/AP": 12.5}, 3), ({"loss": 5.0}, 5)]
    assert recorder.calls[-1][0] == last
    assert "SOLQ" in str(recorder.calls[:2])  # the config


def test_trainer_writes_to_trackers(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    cfg.TRACKERS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = ["wandb"], 2, ()
    trainer = Trainer(cfg)
    trainer.train()
    logged = {kwargs["step"]: args[0] for kind, args, kwargs in recorder.calls if kind == "log"}
    assert {"total_loss", "lr"} <= logged[1].keys()


def test_unknown_and_missing_packages(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.TRACKERS = ["wandbb"]
    with pytest.raises(ValueError, match="'wandbb': known are wandb, mlflow"):
        build_trackers(cfg)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    cfg.TRACKERS = ["mlflow"]
    with pytest.raises(ImportError, match="TRACKERS needs the package mlflow .*: pip install 'mlflow'"):
        build_trackers(cfg)


def test_mlflow_itself(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    cfg.TRACKERS = ["mlflow"]
    (writer,) = build_trackers(cfg)
    run = mlflow.active_run().info.run_id
    with EventStorage() as storage:
        storage.put_scalar("segm/AP", 3.5, smoothing_hint=False)
        writer.write()
    writer.close()
    assert mlflow.get_run(run).data.metrics == {"segm/AP": 3.5}
