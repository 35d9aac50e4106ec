"""Conversion of published ISTR files, through the rules and through the tool."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tool_loader import load_tool

from querymask import get_cfg
from querymask.common.checkpoint import fit_to_model, read_checkpoint, recognise
from querymask.istr.checkpoint import convert, describe, settings
from querymask.model_zoo import get_value

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "reference" / "golden" / "istr"
CONFIGS = ROOT / "projects" / "istr" / "configs"
# Published file -> config, and what the file is called
PUBLISHED = {
    "checkpoint": ("istr_r50", "ISTR (R50, 6 stages, 300 queries, 80 classes, pca mask vectors of 60)"),
    "checkpoint_r101": ("istr_r101", "ISTR (R101, 6 stages, 300 queries, 80 classes, pca mask vectors of 60)"),
    "checkpoint_v2_pca_r50": (
        "istr_v2_pca_r50",
        "ISTR's second release (R50, 6 stages, 300 queries, 80 classes, pca mask vectors of 256)",
    ),
    "checkpoint_v2_dct_r50": (
        "istr_v2_dct_r50",
        "ISTR's second release (R50, 6 stages, 300 queries, 80 classes, dct mask vectors of 256)",
    ),
    "checkpoint_v2_smt_r50": (
        "istr_v2_smt_r50",
        "ISTR's second release (R50, 6 stages, 300 queries, 80 classes, autoencoder mask vectors of 256)",
    ),
    "checkpoint_v2_smt_swinl": (
        "istr_v2_smt_swin_l",
        "ISTR's second release (Swin of width 192, 6 stages, 300 queries, 80 classes, autoencoder mask vectors of 256)",
    ),
}


tool = load_tool("convert_checkpoint")


def published(manifest: str) -> dict[str, torch.Tensor]:
    """A published state dict in which every tensor has a value of its own; takes no memory."""
    shapes = json.loads((GOLDEN / f"{manifest}.json").read_text())
    return {key: torch.tensor(zlib.crc32(key.encode()) / 2**32).expand(tuple(shape)) for key, shape in shapes.items()}


def config(name: str, *overrides: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.merge_from_list(list(overrides))
    return cfg


def shapes_of(cfg: CfgNode) -> dict[str, torch.Size]:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {key: value.shape for key, value in build_model(cfg).state_dict().items()}


def test_every_published_file_is_tested() -> None:
    assert {path.stem for path in GOLDEN.glob("checkpoint*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("manifest", PUBLISHED)
def test_published_model_fits_its_config(manifest: str) -> None:
    name, description = PUBLISHED[manifest]
    cfg = config(name)
    state = published(manifest)
    assert describe(state) == description
    fitted, report = fit_to_model(*convert(state), shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)
    assert len(report.lines) == len(state)
    dropped = {line.source.rpartition(".")[2] for line in report.of("dropped")}
    assert dropped == ({"relative_position_index"} if "swin" in manifest else set())
    assert {key: get_value(cfg, key) for key in settings(state)} == settings(state)
    for line in report.of("used", "renamed"):  # every tensor keeps its value
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line


def test_names() -> None:
    names = {line.source: line.target for line in convert(published("checkpoint_v2_smt_r50"))[1].lines}
    stage = "head.head_series.3."
    assert names["backbone.fpn_lateral3.bias"] == "backbone.fpn_lateral3.bias"
    assert names[stage + "self_attn.in_proj_weight"] == "detector.stages.3.self_attn.in_proj_weight"
    assert names[stage + "cls_module.4.weight"] == "detector.stages.3.cls_module.4.weight"
    assert names[stage + "mask_module.1.running_var"] == "mask_branch.heads.3.mask_module.1.running_var"
    assert names[stage + "ret_roi_layer_2.conv.3.bias"] == "mask_branch.heads.3.ret_roi_layer_2.3.bias"
    assert names["mask_E.encoder.12.weight"] == "mask_branch.coding.encoder.12.weight"
    assert names["mask_D.decoder.6.up.2.running_mean"] == "mask_branch.coding.decoder.6.2.running_mean"
    assert names["mask_D.decoder.1.bias"] == "mask_branch.coding.decoder.1.bias"


def test_parts_can_be_left_out() -> None:
    state = published("checkpoint")
    converted, _ = convert(state, drop_classes=True)
    assert (
        not [key for key in converted if "class_logits" in key] and "detector.stages.0.cls_module.0.weight" in converted
    )
    converted, report = convert(state, detector_only=True)
    _, report = fit_to_model(converted, report, shapes_of(config("istr_r50", "MODEL.MASK_BRANCH.NAME", "none")))
    assert report.fits, report.details(*report.MISFITS)


# ---- The tool -----------------------------------------------------------------------------------------------------

TINY = """
_BASE_: {base}
MODEL:
  BACKBONE: {{NAME: build_resnet_fpn_backbone}}
  RESNETS: {{DEPTH: 50, STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 16}}
  FPN: {{OUT_CHANNELS: 16}}
  ISTR: {{NUM_QUERIES: 5, NUM_STAGES: 2, HIDDEN_DIM: 16, NUM_HEADS: 2, DIM_FEEDFORWARD: 24, DIM_DYNAMIC: 4,
          POOL_SIZE: 3}}
  MASK_CODING: {{SIZE: 12, LENGTH: 10}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A small config of the paper's form, its file under the release's names, and the state dict of the model."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(base=CONFIGS / "Base-ISTR.yaml"))
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    own = build_model(cfg).state_dict()
    own = {key: torch.randn(value.shape) if value.isnan().any() else value for key, value in own.items()}
    release = {}
    for key, value in own.items():
        key = re.sub(r"^(detector\.stages|mask_branch\.heads)\.", "head.head_series.", key)
        key = re.sub(r"^mask_branch\.coding\.", "mask_encoding.", key)
        release[key.removeprefix("detector.")] = value
    torch.save({"model": release, "iteration": 7}, tmp_path / "release.pth")
    return path, tmp_path / "release.pth", own


def test_tool_converts_and_takes_its_own_files(
    tiny: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file, own = tiny
    first, second = str(tmp_path / "first.pth"), str(tmp_path / "second.pth")
    assert tool.main(["--config-file", str(path), str(file), first]) == 0
    assert "ISTR (R50, 2 stages, 5 queries, 80 classes, pca mask vectors of 10)" in capsys.readouterr().out
    assert recognise(read_checkpoint(first)).name == "ISTR in QueryMask's own names"
    assert tool.main(["--config-file", str(path), first, second]) == 0
    for written in (first, second):
        state = read_checkpoint(written)
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


def test_tool_leaves_parts_out(tiny: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, file, own = tiny
    output = str(tmp_path / "part.pth")
    arguments = ["--config-file", str(path), "--drop-classes", "--detector-only", str(file), output]
    assert tool.main([*arguments, "MODEL.MASK_BRANCH.NAME", "none", "MODEL.ISTR.NUM_CLASSES", "3"]) == 0
    kept = {key for key in own if not key.startswith("mask_branch.") and "class_logits" not in key}
    assert read_checkpoint(output).keys() == kept


def test_tool_names_what_does_not_fit(
    tiny: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file, _ = tiny
    output = tmp_path / "never.pth"
    assert tool.main(["--config-file", str(path), str(file), str(output), "MODEL.MASK_CODING.LENGTH", "12"]) == 1
    message = capsys.readouterr().err
    assert "MODEL.MASK_CODING.LENGTH 10 (config: 12)" in message and "(10, 144) in the file" in message
    assert not output.exists()
