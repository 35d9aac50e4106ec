"""Wrong class counts and checkpoints that do not fit stop a run at once, with the numbers."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tiny_configs import tiny_config

from querymask import get_cfg
from querymask.common.checkpoint import Options, recognise
from querymask.common.engine import StrictCheckpointer, Trainer, check_num_classes, num_classes_key
from querymask.common.engine.checkpointer import class_tensors
from querymask.common.measured_models import build_on_meta


@pytest.mark.parametrize(
    ("meta_architecture", "key"),
    [
        ("SOLQ", "MODEL.SOLQ.NUM_CLASSES"),
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("ProposalNetwork", None),
    ],
)
def test_key_of_the_class_count(meta_architecture: str, key: str | None) -> None:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    assert num_classes_key(cfg) == key


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_data_set_with_another_number_of_classes(cfg: CfgNode, split: str) -> None:
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.DATASETS[split] = ("engine_val",)
    cfg.MODEL.SOLQ.NUM_CLASSES = 80
    with pytest.raises(
        ValueError, match=r"NUM_CLASSES is 80, but .* engine_val has 2 classes \(wide, tall\)\. Set MODE"
    ):
        Trainer(cfg)


def test_known_data_sets_are_checked_without_being_read(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="NUM_CLASSES is 2, but the data set coco_2017_val has 80 classes"):
        check_num_classes(cfg, ["coco_2017_val"])
    cfg.MODEL.SOLQ.NUM_CLASSES = 80
    check_num_classes(cfg, ["coco_2017_val"])


def test_unknown_data_set(cfg: CfgNode) -> None:
    with pytest.raises(KeyError, match="no data set 'shapes_trian'.*shapes_train"):
        check_num_classes(cfg, ["shapes_trian"])


def test_data_set_that_defines_classes_by_metadata_only(
    cfg: CfgNode, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register("engine_metadata", tmp_path / "never_read.json")
    MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    with pytest.raises(ValueError, match="has 3 classes"):
        check_num_classes(cfg, [name])


def test_other_names_of_classes_are_told(
    cfg: CfgNode, register: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    check_num_classes(cfg, ["engine_train", "engine_val"])
    assert "not those" not in caplog.text
    MetadataCatalog.get(register("engine_swapped", Path("unused.json"))).thing_classes = ["tall", "wide"]
    check_num_classes(cfg, ["engine_train", "engine_swapped"])
    assert "classes of engine_swapped, ['tall', 'wide'], are not those of engine_train" in caplog.text


def checkpoint(cfg: CfgNode, path: Path, **changes: int) -> str:
    """Weights of the model with other numbers in MODEL.SOLQ."""
    cfg = cfg.clone()
    cfg.MODEL.SOLQ.merge_from_list([item for change in changes.items() for item in change])
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, path)
    return str(path)


def test_checkpoint_with_another_class_head(cfg: CfgNode, tmp_path: Path) -> None:
    """Evaluation refuses it, and so does training where the head is frozen."""
    cfg.MODEL.WEIGHTS = checkpoint(cfg, tmp_path / "coco.pth", NUM_CLASSES=80)
    cfg.DATASETS.TEST = ("engine_val",)
    message = (
        r"(?s)coco\.pth does not fit.*detector\.class_embed\.0\.weight: \(80, 64\) in the file, \(2, 64\) in the.*"
        r"file has 80 classes, MODEL\.SOLQ\.NUM_CLASSES is 2\. Set MODEL\.SOLQ\.NUM_CLASSES 80.*left out then"
    )
    with pytest.raises(ValueError, match=message):
        Trainer.evaluate(cfg)
    cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR = True
    with pytest.raises(ValueError, match=message):
        Trainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize("names", [(), ("tall", "wide"), ("Wide", "tall ")])
def test_training_starts_from_weights_of_other_classes(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, names: tuple
) -> None:
    """Layers of another size are left out, and those of the same size if the names say that the classes are others."""
    path = Path(checkpoint(cfg, tmp_path / "other.pth", **({} if names else {"NUM_CLASSES": 80})))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "class_names": list(names)}, path)
    cfg.MODEL.WEIGHTS = str(path)
    trainer = Trainer(cfg)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    trainer.resume_or_load(resume=False)
    kept = names == ("Wide", "tall ")
    for key, value in trainer.model.state_dict().items():
        left_out = not kept and "class_embed" in key
        assert torch.equal(value, before[key] if left_out else content["model"][key]), key
    of = "the classes tall, wide" if names else "other classes"
    assert (f"other.pth is of {of}, the model of wide, tall: 2 tensors that depend" in caplog.text) != kept


@pytest.mark.parametrize(
    "name",
    ["solq/solq_shapes", "isda/isda_shapes", "istr/istr_shapes", "effseg/effseg_shapes", "effseg/mask_rcnn_shapes"],
)
def test_tensors_that_depend_on_the_classes(name: str) -> None:
    """They are those that the conversion of checkpoints leaves out by their names."""
    cfg = tiny_config(name)
    model = build_on_meta(cfg)
    key = num_classes_key(cfg)
    assert key is not None
    format = recognise(model.state_dict())
    pattern = format.new_keys(Options(drop_classes=True))
    assert class_tensors(cfg, key, model) == [key for key in model.state_dict() if re.search(pattern, key)] != []


def test_checkpoint_of_another_width(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.MODEL.WEIGHTS = checkpoint(cfg, tmp_path / "wide.pth", HIDDEN_DIM=128)
    with pytest.raises(ValueError, match=r"(?s)tensors have other shapes.*and \d+ more.*config that the file was made"):
        Trainer.evaluate(cfg)


def test_checkpoint_without_class_head_is_for_training_on_other_classes(cfg: CfgNode, tmp_path: Path) -> None:
    path = Path(checkpoint(cfg, tmp_path / "other.pth", NUM_CLASSES=80))
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("detector.class_embed")}}, path)
    cfg.MODEL.WEIGHTS = str(path)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    loaded = trainer.model.state_dict()
    assert torch.equal(loaded["detector.transformer.level_embed"], state["detector.transformer.level_embed"])
    assert loaded["detector.class_embed.0.weight"].shape == (2, 64)


def test_resuming_with_another_class_count(cfg: CfgNode) -> None:
    trainer = Trainer(cfg)
    trainer.checkpointer.save("model_0000004", iteration=4)
    model = Trainer.build_model(cfg)
    StrictCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg).resume_or_load("", resume=True)
    other = cfg.clone()
    other.MODEL.SOLQ.NUM_CLASSES = 3
    with pytest.raises(ValueError, match=r"model_0000004\.pth does not fit.*"):
        StrictCheckpointer(Trainer.build_model(other), cfg.OUTPUT_DIR, cfg=other).resume_or_load("", resume=True)


def test_loss_that_is_not_finite_stops_before_the_checkpoint(cfg: CfgNode) -> None:
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    trainer = Trainer(cfg)

    def spoil(*_: object) -> None:
        if trainer.iter == 1:
            trainer.model.mask_branch.vector_embed.layers[-1].bias.data.fill_(float("inf"))

    trainer.model.register_forward_pre_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"iteration 1: .*loss_vector.*BASE_LR"):
        trainer.train()
    assert not list(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
