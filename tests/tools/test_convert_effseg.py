"""Conversion of files of EffSeg's release, through the rules and through the tool."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tool_loader import load_tool
from torch import Tensor

from querymask import get_cfg
from querymask.common.checkpoint import FORMATS, CheckpointError, Options, fit_to_model, read_checkpoint, recognise
from querymask.effseg.checkpoint import convert, describe, settings
from querymask.model_zoo import get_value

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "reference" / "golden" / "effseg"
CONFIGS = ROOT / "projects" / "effseg" / "configs"
SEGMENTATION_HEAD = "heads.gvd.heads.2."
OWN = "EffSeg in QueryMask's own names"
# Manifests, and the entries of the one with baseline heads -> config, and what the file is called
PUBLISHED = {
    ("checkpoint", None): ("effseg_v2_r50", "EffSeg on FQDetV2"),
    ("checkpoint_paper", None): ("effseg_r50", "EffSeg on FQDet"),
    ("checkpoint_heads", "mrcnn"): ("mask_rcnn_v2_r50", "Mask R-CNN++ on FQDetV2"),
    ("checkpoint_heads", "pointrend"): ("pointrend_v2_r50", "PointRend++ on FQDetV2"),
    ("checkpoint_heads", "refinemask"): ("refine_mask_v2_r50", "RefineMask++ on FQDetV2"),
}
# Of the segmentation heads
CLASS_LAYERS = {
    "effseg_v2_r50": set(),
    "mask_rcnn_v2_r50": {"mask_branch.head.layers.classifier"},
    "pointrend_v2_r50": {
        "mask_branch.head.coarse_layers.classifier",
        "mask_branch.head.point_layers.classifier",
        *(f"mask_branch.head.point_layers.layers.{number}" for number in range(3)),
    },
    "refine_mask_v2_r50": {f"mask_branch.head.classifiers.{number}" for number in range(3)},
}

tool = load_tool("convert_checkpoint")


def manifest(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict in which every tensor has a value of its own; takes no memory."""
    return {key: torch.tensor(zlib.crc32(key.encode()) / 2**32).expand(tuple(shape)) for key, shape in shapes.items()}


def published(name: str, entry: str | None) -> dict[str, Tensor]:
    """A published state dict; a baseline head stands in the place of EffSeg's in the release's model."""
    if entry is None:
        return filled(manifest(name))
    detector = {key: x for key, x in manifest("checkpoint").items() if not key.startswith(SEGMENTATION_HEAD)}
    return filled(detector | manifest(name)[entry])


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
    assert {path.stem for path in GOLDEN.glob("checkpoint*.json")} == {name for name, _ in PUBLISHED}
    heads = {entry for _, entry in PUBLISHED if entry} | {"conv"}  # EffSeg's with another module, of no published file
    assert set(manifest("checkpoint_heads")) == heads


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_model_fits_its_config(file: tuple[str, str | None]) -> None:
    name, title = PUBLISHED[file]
    cfg, state = config(name), published(*file)
    assert describe(state) == f"{title} (R50, 6 layers, 80 classes)"
    fitted, report = fit_to_model(*convert(state), shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)
    assert len(report.lines) == len(state)
    dropped = {line.source for line in report.of("dropped")}
    assert dropped == {"backbone.in_norm_mean", "backbone.in_norm_std"}
    assert {key: get_value(cfg, key) for key in settings(state)} == settings(state)
    for line in report.of("used", "renamed"):  # every tensor keeps its value
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line


def test_names() -> None:
    names = {line.source: line.target for line in convert(published("checkpoint_paper", None))[1].lines}
    decoder = "heads.gvd.dec_layers.3."
    assert names["backbone.body.layer1.0.conv1.weight"] == "backbone.res2.0.conv1.weight"
    assert names["core.body.fpn_convs.5.conv.bias"] == "detector.neck.outputs.5.bias"
    assert names[decoder + "0.attn.msda.val_proj.bias"] == "detector.layers.3.cross_attention.attention.value_proj.bias"
    assert names[decoder + "2.mlp2.lin.weight"] == "detector.layers.3.ffn.layer.3.weight"
    head = names[SEGMENTATION_HEAD + "proc.1.2.sub_modules.2.0.weight"]
    assert head == "mask_branch.head.stages.1.processing.core.branches.2.weight"


@pytest.mark.parametrize("name", CLASS_LAYERS)
def test_classes_can_be_left_out(name: str) -> None:
    """What stays fits a model for another number of classes; what goes are the layers whose shapes depend on it."""
    (file,) = (file for file, (config_name, _) in PUBLISHED.items() if config_name == name)
    whole, other = shapes_of(config(name)), shapes_of(config(name, "MODEL.EFFSEG.NUM_CLASSES", 3))
    differing = {key.rpartition(".")[0] for key in whole if whole[key] != other[key]}
    expected = CLASS_LAYERS[name] | {layer for layer in differing if layer.startswith("detector.class_head")}
    assert differing == expected
    state = published(*file)
    format = recognise(state)
    options = Options(class_ids=None, drop_classes=True, detector_only=False, model_keys=other.keys())
    converted, report = format.convert(state, options)
    fitted, report = fit_to_model(converted, report, other, format.new_keys(options))
    assert report.fits, report.details(*report.MISFITS)
    assert {key.rpartition(".")[0] for key in other.keys() - fitted.keys()} >= expected
    gone = {key for key in other.keys() - fitted.keys() if not key.startswith("detector.class_head.")}
    assert {key.rpartition(".")[0] for key in gone} == {x for x in expected if x.startswith("mask_branch.head.")}
    # Own files are treated alike, also those from before the parts had names
    (own,) = (format for format in FORMATS if format.name == OWN)
    today = convert(state)[0]
    before = {
        key.replace("detector.neck.", "neck.").replace("mask_branch.head.", "mask_head."): today[key] for key in today
    }
    assert before.keys() != today.keys()
    for names in (today, before):
        assert recognise(names) is own
        again, _ = own.convert(names, options)
        assert again.keys() == converted.keys()


def test_class_head_of_the_paper_is_left_out() -> None:
    converted, _ = convert(published("checkpoint_paper", None), drop_classes=True)
    assert not [key for key in converted if "class_head" in key] and "mask_branch.head.convs.0.weight" in converted


@pytest.mark.parametrize("file", PUBLISHED)
def test_the_detector_alone(file: tuple[str, str | None]) -> None:
    cfg = config(PUBLISHED[file][0], "MODEL.MASK_BRANCH.NAME", "none")
    state = published(*file)
    converted, report = convert(state, detector_only=True)
    _, report = fit_to_model(converted, report, shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)


# ---- The tool -----------------------------------------------------------------------------------------------------

TINY = """
_BASE_: {base}
MODEL:
  RESNETS: {{DEPTH: 50, STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 16}}
  EFFSEG: {{HIDDEN_DIM: 32, DEC_LAYERS: 2, NUM_HEADS: 4, DIM_FEEDFORWARD: 24}}
"""


def shrunk(cfg: CfgNode, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file under the release's names whose shapes are those of a small config."""
    shapes = shapes_of(cfg)
    release = {}
    for line in convert(state)[1].of("used", "renamed"):
        if line.target in shapes:
            shape = tuple(shapes[line.target])
            if ".core.branches." in line.target and line.source.endswith("weight"):  # stored tap by tap
                shape = (shape[0], 9 * shape[1])
            release[line.source] = torch.randn(shape)
    return release


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """A small config of the release's form, a file under the release's names, and what it is in the model's."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(base=CONFIGS / "effseg_v2_r50.yaml"))
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    torch.manual_seed(0)
    release = shrunk(cfg, published("checkpoint", None))
    torch.save({"model": release, "epoch": 12}, tmp_path / "release.pth")
    return path, tmp_path / "release.pth", convert(release)[0]


def test_tool_converts_and_takes_its_own_files(
    tiny: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file, own = tiny
    first, second = str(tmp_path / "first.pth"), str(tmp_path / "second.pth")
    assert tool.main(["--config-file", str(path), str(file), first]) == 0, capsys.readouterr().err
    assert "EffSeg on FQDetV2 (R50, 2 layers, 80 classes)" in capsys.readouterr().out
    assert recognise(read_checkpoint(first)).name == OWN
    assert tool.main(["--config-file", str(path), first, second]) == 0
    for written in (first, second):
        state = read_checkpoint(written)
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


def test_tool_leaves_parts_out(tiny: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, file, own = tiny
    output = str(tmp_path / "part.pth")
    arguments = ["--config-file", str(path), "--drop-classes", "--detector-only", str(file), output]
    assert tool.main([*arguments, "MODEL.MASK_BRANCH.NAME", "none", "MODEL.EFFSEG.NUM_CLASSES", "3"]) == 0
    kept = {key for key in own if not key.startswith(("mask_branch.head.", "detector.class_head."))}
    assert read_checkpoint(output).keys() == kept


def test_tool_names_what_does_not_fit(
    tiny: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another generation, and a file that lacks a tensor or is cut off."""
    path, file, _ = tiny
    output = tmp_path / "never.pth"
    assert tool.main(["--config-file", str(path), str(file), str(output), "MODEL.EFFSEG.VERSION", "1"]) == 1
    assert "MODEL.EFFSEG.VERSION 2 (config: 1)" in capsys.readouterr().err

    release = torch.load(file, weights_only=True)["model"]
    del release[SEGMENTATION_HEAD + "trans.1.0.weight"]
    torch.save({"model": release}, tmp_path / "incomplete.pth")
    assert tool.main(["--config-file", str(path), str(tmp_path / "incomplete.pth"), str(output)]) == 1
    assert "mask_branch.head.stages.1.transition.0.weight" in capsys.readouterr().err

    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"damaged\.pth"):
        read_checkpoint(str(damaged))
    assert tool.main(["--config-file", str(path), str(damaged), str(output)]) == 1
    assert "damaged.pth" in capsys.readouterr().err
    assert not output.exists()
