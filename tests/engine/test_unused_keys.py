"""A key that a run does not read cannot be changed unnoticed."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
from config_reads import recorded
from detectron2.config import CfgNode
from mask_bases import give_basis
from tiny_configs import LEAVES, tiny_config

from querymask import get_cfg
from querymask.common.compat import detectron2_cfg
from querymask.common.engine import Trainer, default_setup
from querymask.common.engine.unused_keys import READ, check_unused_keys, leaves
from querymask.common.predictor import Predictor

METHODS = {"SOLQ": "solq/solq_r50", "ISDA": "isda/isda_r50", "ISTR": "istr/istr_r50", "EffSeg": "effseg/effseg_r50"}
DEFAULTS = dict(leaves(detectron2_cfg()))
# Read on the way, to refuse it or by Detectron2 for what the project does not do
READ_IN_VAIN = {"INPUT.CROP.ENABLED", "MODEL.LOAD_PROPOSALS", "MODEL.MASK_ON"}


def is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def other_value(value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return type(value)([*value, 1])


def changed(meta_architecture: str, key: str) -> CfgNode:
    """The default config of a method with another value of a key."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    *sections, last = key.split(".")
    node = cfg
    for section in sections:
        node = node[section]
    node[last] = other_value(node[last])
    return cfg


@pytest.mark.parametrize(("meta_architecture", "leaf"), METHODS.items())
def test_every_key_of_detectron2_is_read_or_refused(
    meta_architecture: str, leaf: str, cfg: CfgNode, tmp_path: Path
) -> None:
    """What a run reads is recorded while it trains and evaluates; the keys of the conditions are switched on."""
    tiny = tiny_config(leaf)
    method = tiny.MODEL[meta_architecture.upper()]
    method.NUM_CLASSES = 2
    for section in ("DATASETS", "INPUT", "SOLVER", "DATALOADER"):
        tiny[section] = cfg[section]
    tiny.DATASETS.TEST = ("engine_val",)
    tiny.INPUT.MIN_SIZE_TRAIN, tiny.INPUT.MIN_SIZE_TEST = (96,), 96  # GroupNorm needs more than a cell at stride 64
    tiny.INPUT.MAX_SIZE_TRAIN = tiny.INPUT.MAX_SIZE_TEST = 192
    tiny.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    tiny.SOLVER.OPTIMIZER = "SGD"
    tiny.SOLVER.BASE_LR = 1e-6
    tiny.SOLVER.MAX_ITER, tiny.SOLVER.STEPS = 1, ()
    tiny.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    tiny.MODEL.RESNETS.NORM = "BN"
    tiny.TEST.PRECISE_BN.ENABLED, tiny.TEST.PRECISE_BN.NUM_ITER, tiny.TEST.EVAL_PERIOD = True, 1, 1
    tiny.VIS_NUM_IMAGES = 0
    tiny.MODEL.SWIN = get_cfg().MODEL.SWIN
    tiny.OUTPUT_DIR = str(tmp_path)
    with recorded(tiny) as read:
        default_setup(tiny, argparse.Namespace())
        trainer = Trainer(tiny)
        trainer.resume_or_load(resume=False)
        give_basis(getattr(trainer.model.mask_branch, "coding", None))
        trainer.train()

    # The pyramid of ISTR's configs is read with their backbone, BASE_LR_END and NUM_DECAYS with their schedules
    conditional = {"SOLVER.BASE_LR_END", "SOLVER.NUM_DECAYS", "VERSION"}
    if "_fpn_" not in tiny.MODEL.BACKBONE.NAME:
        conditional |= {key for key in DEFAULTS if key.startswith("MODEL.FPN.")}
    known = {key for key in DEFAULTS if any(is_within(key, section) for section in READ)}
    assert known - read <= conditional, "said to be read, but a run does not read them"
    assert (read & DEFAULTS.keys()) - known <= READ_IN_VAIN

    for key in DEFAULTS.keys() - read - conditional:
        with pytest.raises(ValueError, match=f"a run of {meta_architecture} does not read") as error:
            check_unused_keys(changed(meta_architecture, key))
        (line,) = str(error.value).splitlines()[1:]
        assert line.startswith(f"  {key} ") and "{" not in line.partition(": ")[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("TEST.AUG.ENABLED True", r"TEST.AUG.ENABLED True: there is no test-time augmentation; INPUT.MIN_SIZE_TEST"),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5", "VIS_SCORE_THRESHOLD and --confidence-threshold"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 2", "use MODEL.SOLQ.NUM_CLASSES"),
        ("MODEL.RETINANET.NUM_CLASSES 2", "use MODEL.SOLQ.NUM_CLASSES"),
        ("MODEL.MASK_ON True", "use MODEL.MASK_BRANCH.NAME"),
        ("MODEL.ISTR.NUM_QUERIES 9", "use MODEL.SOLQ.NUM_QUERIES, or set MODEL.META_ARCHITECTURE ISTR"),
        ("MODEL.MASK_BRANCH.KERNEL.MASK_THRESHOLD 0.9", "only MODEL.MASK_BRANCH.NAME KernelBranch reads"),
        (
            "MODEL.MASK_BRANCH.NAME none MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS 9",
            "only MODEL.MASK_BRANCH.NAME EffSegBranch",
        ),
        ("INPUT.CROP.ENABLED True", "use INPUT.DETR_CROP"),
        ("VIS_PERIOD 10", "VIS_NUM_IMAGES"),
        ("SOLVER.MOMENTUM 0.5", "SOLVER.OPTIMIZER SGD"),
        ("SOLVER.NESTEROV True", "SOLVER.OPTIMIZER SGD"),
        ("SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.GAMMA 0.5", "SOLVER.GAMMA 0.5: only WarmupMultiStepLR"),
        ("DATALOADER.REPEAT_THRESHOLD 0.1", "SAMPLER_TRAIN RepeatFactorTrainingSampler"),
        ("TEST.PRECISE_BN.NUM_ITER 3", "set TEST.PRECISE_BN.ENABLED True"),
        ("MODEL.BACKBONE.NAME build_resnet_backbone MODEL.SWIN.WINDOW_SIZE 12", "Its keys are in MODEL.RESNETS"),
        ("MODEL.BACKBONE.NAME build_swin_backbone MODEL.RESNETS.DEPTH 101", "Its keys are in MODEL.SWIN"),
        ("MODEL.BACKBONE.NAME build_basic_resnet_backbone MODEL.RESNETS.NUM_GROUPS 2", "It reads DEPTH, NORM"),
        ("MODEL.BACKBONE.NAME build_resnet_backbone MODEL.FPN.NORM BN", "backbones with _fpn_"),
    ],
)
def test_message_names_what_serves_instead(cfg: CfgNode, settings: str, message: str) -> None:
    cfg.merge_from_list(settings.split())
    cfg.DATASETS.TEST = ("engine_val",)
    for way_in in (Trainer, Trainer.evaluate, lambda cfg: Trainer.evaluate_results(cfg, "none.json"), Predictor):
        with pytest.raises(ValueError, match=message):
            way_in(cfg)


def test_all_refused_keys_are_named_at_once(cfg: CfgNode) -> None:
    cfg.merge_from_list(["TEST.AUG.FLIP", False, "VIS_PERIOD", 3, "MODEL.KEYPOINT_ON", True])
    with pytest.raises(ValueError, match=r"(?s)TEST.AUG.FLIP False.*VIS_PERIOD 3") as error:
        check_unused_keys(cfg)
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("SOLVER.LR_SCHEDULER_NAME WarmupCosineLR", "SOLVER.STEPS (SOLVER.LR_SCHEDULER_NAME is WarmupCosineLR)"),
        ("INPUT.LSJ.SIZE 512", "INPUT.LSJ.SIZE (INPUT.LSJ.ENABLED is False)"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED False", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE (SOLVER.CLIP_GRADIENTS.ENABLED is"),
        ("INPUT.DETR_CROP.PROBABILITY 0.1", "INPUT.DETR_CROP.PROBABILITY (INPUT.DETR_CROP.ENABLED is False)"),
        ("MODEL.PANOPTIC.AREA_THRESHOLD 9", "MODEL.PANOPTIC.AREA_THRESHOLD (MODEL.PANOPTIC.ENABLED is False)"),
        (
            "MODEL.PANOPTIC.ENABLED True TEST.DETECTIONS_PER_IMAGE 9",
            "TEST.DETECTIONS_PER_IMAGE (MODEL.PANOPTIC.ENABLED is True",
        ),
        ("INPUT.LSJ.ENABLED True", "INPUT.MIN_SIZE_TRAIN (INPUT.LSJ.ENABLED is True)"),
        (
            "MODEL.MASK_BRANCH.NAME none",
            "MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM (only MODEL.MASK_BRANCH.NAME VectorBranch",
        ),
    ],
)
def test_what_another_key_switches_off_is_told(
    cfg: CfgNode, settings: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    check_unused_keys(cfg)
    assert not caplog.text
    cfg.merge_from_list(settings.split())
    check_unused_keys(cfg)
    assert words in caplog.text


@pytest.mark.parametrize("name", LEAVES)
def test_configs_of_the_project_pass(name: str) -> None:
    check_unused_keys(LEAVES[name].config())


def test_models_of_others_have_keys_of_their_own(cfg: CfgNode) -> None:
    cfg.merge_from_list("MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.ROI_HEADS.NMS_THRESH_TEST 0.4".split())
    check_unused_keys(cfg)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ValueError, match="a run of GeneralizedRCNN does not read"):
        check_unused_keys(cfg)


@pytest.mark.parametrize("setting", ["SIZE_DIVISIBILITY 32", "USE_CHECKPOINT True"])
def test_models_of_others_do_not_read_the_projects_keys(cfg: CfgNode, setting: str) -> None:
    cfg.merge_from_list(f"MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.{setting}".split())
    with pytest.raises(ValueError, match=rf"MODEL\.{setting.split()[0]} .*only SOLQ, ISDA, ISTR, EffSeg read it"):
        check_unused_keys(cfg)


def test_keys_that_a_user_adds_are_let_alone(cfg: CfgNode) -> None:
    cfg.MODEL.MINE = CfgNode({"SIZE": 3})
    check_unused_keys(cfg)


def test_config_of_a_run_passes(cfg: CfgNode, tmp_path: Path) -> None:
    """Though YAML makes lists of tuples, also of those in tuples."""
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(path))
    check_unused_keys(again)
    again.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS[0][0] = 9.0
    with pytest.raises(ValueError, match="BBOX_REG_WEIGHTS"):
        check_unused_keys(again)
