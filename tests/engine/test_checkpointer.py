"""What a checkpoint has of a model is told, and a file that has too little of it is refused."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from querymask.common.checkpoint import CheckpointError
from querymask.common.engine import StrictCheckpointer, Trainer
from querymask.common.predictor import Predictor


@pytest.fixture
def state(cfg: CfgNode) -> dict[str, torch.Tensor]:
    """The weights of the config's model, which the config evaluates on a data set."""
    cfg.DATASETS.TEST = ("engine_val",)
    torch.manual_seed(3)
    return Trainer.build_model(cfg).state_dict()


def train(cfg: CfgNode) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


WAYS_IN = pytest.mark.parametrize("way_in", [train, Trainer.evaluate, Predictor], ids=["train", "evaluate", "demo"])


@WAYS_IN
def test_nothing_that_fits(
    cfg: CfgNode, state: dict[str, torch.Tensor], tmp_path: Path, way_in: Callable[[CfgNode], object]
) -> None:
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    torch.save({"model": {f"detr.{key}": value for key, value in state.items()}}, cfg.MODEL.WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        way_in(cfg)
    count = len(state)
    assert (
        f"other.pth does not fit the model: none of its {count} tensors has the name of one of the model's {count}"
        in (str(error.value))
    )
    assert f"in the file: detr.{next(iter(state))}," in str(error.value)
    assert "tools/convert_checkpoint.py" in str(error.value)


def test_counters_of_batch_norms_that_pytorch_makes_up_do_not_count(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    torch.save({"model": {"backbone.body.weight": torch.zeros(2)}}, cfg.MODEL.WEIGHTS)
    with pytest.raises(CheckpointError, match="none of its 1 tensors has the name"):
        train(cfg)


def test_part_is_told_in_training_and_refused_in_evaluation(
    cfg: CfgNode,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    torch.save({"model": {**backbone, "fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}}, cfg.MODEL.WEIGHTS)
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    loaded = train(cfg).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in backbone.items())
    line = next(record.message for record in caplog.records if "tensors of the model" in record.message)
    assert line.startswith(
        f"{len(backbone)} of {len(state)} tensors of the model are in {cfg.MODEL.WEIGHTS}; not in the"
    )
    assert f"not in the file: {len(state) - len(backbone)} (" in line
    assert line.endswith("unused in the file: 2 (fc.weight, fc.bias)")
    for way_in in (Trainer.evaluate, Predictor):
        with pytest.raises(CheckpointError, match=rf"{len(backbone)} of {len(state)} tensors.*would be random.*config"):
            way_in(cfg)


def test_counters_of_batch_norms_may_be_missing_in_evaluation(cfg: CfgNode, tmp_path: Path) -> None:
    model = torch.nn.BatchNorm1d(2)
    state = model.state_dict()
    del state["num_batches_tracked"]
    torch.save({"model": state}, tmp_path / "a.pth")
    StrictCheckpointer(model, cfg=cfg, complete=True).load(str(tmp_path / "a.pth"))
    del state["running_var"]
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"3 of 4 tensors.*not in the file: 1 \(running_var\)"):
        StrictCheckpointer(model, cfg=cfg, complete=True).load(str(tmp_path / "a.pth"))


def test_whole_checkpoint_is_loaded_from_each_place(
    cfg: CfgNode, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    arrays = {key: value.cpu().numpy() for key, value in state.items()}
    for content in ({"model": state}, state, {"state_dict": state, "epoch": 3}, {"model": arrays}):
        torch.save(content, path)
        if content.get("model") is arrays:
            path = tmp_path / "a.pkl"
            path.write_bytes(pickle.dumps(content))
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model, cfg=cfg, complete=True).load(str(path))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_resuming_from_weights_alone(cfg: CfgNode, state: dict[str, torch.Tensor]) -> None:
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True)
    torch.save({"model": state}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointError, match=r"model_final.pth has weights alone.*it lacks trainer.*MODEL.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=True)
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(
        CheckpointError, match=r"model_0000009.pth: there is no such file. .*last_checkpoint may name it"
    ):
        Trainer(cfg).resume_or_load(resume=True)


def test_resuming_a_run_of_detectron2(cfg: CfgNode, state: dict[str, torch.Tensor]) -> None:
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True)
    torch.save({"model": state, "trainer": {"iteration": 4}}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ValueError, match=r"model_final.pth is of a run of another program.*MODEL.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=True)


def damaged(path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """Write a file that is no checkpoint."""
    torch.save({"model": state}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": pytest.fail}))
    elif kind == "no tensors":
        torch.save({"epoch": 3, "best": 0.5}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "absent":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged or incomplete.*Download it again"),
        ("empty", "an empty file"),
        ("web page", "not a checkpoint.*web page"),
        ("code", "which is not an array of numbers; nothing in it was run"),
        ("no tensors", r"no tensors of a model in it \(its entries: best, epoch\)"),
        ("list", "holds a list where a state dict was expected"),
        ("absent", "there is no such file. Check MODEL.WEIGHTS; .*tools/convert_checkpoint.py"),
    ],
)
def test_file_that_is_no_checkpoint(
    cfg: CfgNode, state: dict[str, torch.Tensor], tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "broken.pth"
    damaged(path, state, kind)
    cfg.MODEL.WEIGHTS = str(path)
    for way_in in (train, Trainer.evaluate, Predictor):
        with pytest.raises(CheckpointError, match=rf"broken\.pth.*{message}"):
            way_in(cfg)


def test_start_that_a_command_makes(cfg: CfgNode, tmp_path: Path) -> None:
    """The error has the command, unless another file is asked for."""
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    cfg.MODEL.WEIGHTS_FROM = f"tools/convert_checkpoint.py --config-file a.yaml b.pth {cfg.MODEL.WEIGHTS}"
    with pytest.raises(CheckpointError) as error:
        train(cfg)
    assert f"{cfg.MODEL.WEIGHTS}: there is no such file. " in str(error.value)
    assert f"made once: python {cfg.MODEL.WEIGHTS_FROM} " in str(error.value)
    cfg.MODEL.WEIGHTS = "b.pth"
    with pytest.raises(CheckpointError, match=r"b\.pth: there is no such file\. Check MODEL\.WEIGHTS"):
        train(cfg)


def test_address_that_cannot_be_fetched(cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    cfg.MODEL.WEIGHTS = "http://127.0.0.1:1/model.pth"
    with pytest.raises(
        CheckpointError, match=r"MODEL.WEIGHTS http://127.0.0.1:1/model.pth cannot be fetched.*to its path"
    ):
        train(cfg)
