"""Conversion of ISDA's checkpoints, and of Deformable DETRs as its start."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tool_loader import load_tool

import querymask
from querymask.common.checkpoint import CheckpointError, Report, coco_class_ids, fit_to_model, read_checkpoint
from querymask.isda.checkpoint import (
    convert,
    convert_mmdetection_detector,
    convert_original_detector,
    describe,
    settings,
)
from querymask.model_zoo import get_value

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "reference" / "golden"
CONFIG = ROOT / "projects" / "isda" / "configs" / "isda_r50.yaml"
tool = load_tool("convert_checkpoint")
State = dict[str, torch.Tensor]


def manifest(path: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / path).read_text())


def fill(shapes: dict[str, list[int]], canonical: Callable[[str], str] = lambda key: key) -> State:
    """A value of its own for every module; takes no memory."""

    def value(key: str) -> torch.Tensor:
        return torch.tensor(zlib.crc32(canonical(key).encode()) / 2**32)

    return {key: value(key).expand(tuple(shape)) for key, shape in shapes.items()}


def first_copy(key: str) -> str:
    """One name for the heads that the release's code stores once a layer."""
    return re.sub(r"\b((?:cls|kernel|reg)_branches|(?:class|bbox)_embed)\.\d+\.", r"\1.0.", key)


def isda() -> State:
    return fill(manifest("isda/checkpoint.json"), first_copy)


def mmdetection(version: int = 2) -> State:
    """A Deformable DETR: ISDA's file without the parts that are new in it, with the box head."""
    shapes = {
        key: shape
        for key, shape in manifest("isda/checkpoint.json").items()
        if not key.startswith(("mask_feat_head.", "neck.first_conv.", "bbox_head.kernel_branches."))
    }
    for layer in range(6):
        for index, length in ((0, 256), (2, 256), (4, 4)):
            shapes[f"bbox_head.reg_branches.{layer}.{index}.weight"] = [length, 256]
            shapes[f"bbox_head.reg_branches.{layer}.{index}.bias"] = [length]
    state = fill(shapes, first_copy)
    if version == 2:
        return state

    def renamed(key: str) -> str:
        key = key.removeprefix("bbox_head.transformer.").replace("bbox_head.query_embedding", "query_embedding")
        key = key.replace("level_embeds", "level_embed").replace("reference_points.", "reference_points_fc.")
        key = re.sub(r"^((?:en|de)coder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn.", key)
        return re.sub(r"\.attentions\.1\.", ".cross_attn.", key).replace(".ffns.0.", ".ffn.")

    return {renamed(key): value for key, value in state.items()}


def original() -> State:
    """The authors' Deformable DETR without box refinement: SOLQ's file at width 256, without vectors."""
    shapes = {}
    for key, shape in manifest("solq/checkpoint.json").items():
        if "vector_embed" in key or key.startswith("transformer.decoder.bbox_embed"):
            continue
        sizes = [{384: 256, 768: 512, 1152: 768}.get(n, n) for n in shape]
        shapes[key] = shape if key.startswith("backbone.") else sizes
    return fill(shapes, first_copy)


def model_shapes() -> dict[str, torch.Size]:
    cfg = querymask.get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {key: value.shape for key, value in build_model(cfg).state_dict().items()}


def names(report: Report) -> dict[str, str]:
    return {line.source: line.target for line in report.lines}


def test_release_fits_its_config() -> None:
    state = isda()
    converted, report = convert(state)
    fitted, report = fit_to_model(converted, report, model_shapes())
    assert report.fits, report.details(*Report.MISFITS)
    for line in report.of("used", "renamed"):  # every tensor keeps its value
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line
    cfg = querymask.get_cfg()
    cfg.merge_from_file(str(CONFIG))
    assert {key: get_value(cfg, key) for key in settings(state)} == settings(state)
    assert describe(state) == (
        "ISDA (R50, width 256, mask features at 1/4, with coordinate channels, kernels with positions, 80 class rows)"
    )
    found = names(report)
    decoder = "bbox_head.transformer.decoder.layers.2."
    assert found[decoder + "norms.0.weight"] == "detector.transformer.decoder.layers.2.norm2.weight"
    assert found[decoder + "norms.1.weight"] == "detector.transformer.decoder.layers.2.norm1.weight"
    assert found["bbox_head.kernel_branches.0.4.bias"] == "mask_branch.kernel_embed.layers.2.bias"
    assert found["mask_feat_head.convs_all_levels.3.conv2.gn.bias"] == "mask_branch.mask_features.branches.3.2.1.bias"
    assert found["neck.extra_convs.0.conv.weight"] == "detector.input_proj.3.0.weight"


def test_copies_that_differ_are_refused() -> None:
    state = isda()
    state["bbox_head.kernel_branches.3.2.bias"] = state["bbox_head.kernel_branches.3.2.bias"] + 1
    with pytest.raises(CheckpointError, match=re.escape("'bbox_head.kernel_branches.3.2.bias' differs")):
        convert(state)


@pytest.mark.parametrize("version", [2, 3])
def test_start_from_mmdetection(version: int) -> None:
    """Taken over, left out and new are what the release's own loading does (244 common keys of the head)."""
    converted, report = convert_mmdetection_detector(mmdetection(version))
    new = r"^(detector\.fine_proj|mask_branch)\."
    fitted, report = fit_to_model(converted, report, model_shapes(), new)
    assert report.fits, report.details(*Report.MISFITS)
    assert fitted.keys() == {key for key in model_shapes() if not re.match(new, key)}
    dropped = {line.source for line in report.of("dropped") if line.note == "box head: ISDA has no boxes"}
    assert len(dropped) == 36
    taken = [line for line in report.lines if line.source.startswith("bbox_head.") and line.source not in dropped]
    assert version == 3 or len(taken) == 244
    own = convert(isda())[0]  # the same tensors under the same names as ISDA's own file
    for key, value in fitted.items():
        if version == 2:
            assert value.flatten()[0] == own[key].flatten()[0], key


def test_start_from_the_original() -> None:
    state = original()
    coco = coco_class_ids()
    state["class_embed.0.bias"] = torch.arange(91.0)
    for layer in range(1, 6):
        state[f"class_embed.{layer}.bias"] = state["class_embed.0.bias"]
    converted, report = convert_original_detector(state, coco)
    fitted, report = fit_to_model(converted, report, model_shapes(), r"^(detector\.fine_proj|mask_branch)\.")
    assert report.fits, report.details(*Report.MISFITS)
    assert fitted["detector.class_embed.bias"].tolist() == coco
    notes = {line.source: line.note for line in report.of("dropped")}
    assert notes["input_proj.2.0.bias"] == "ISDA's projections have no bias"
    assert notes["class_embed.4.weight"] == "equal copy of class_embed.0.weight"


def test_other_forms_of_deformable_detr_are_refused() -> None:
    refined = {**original(), "transformer.decoder.bbox_embed.0.layers.0.weight": torch.zeros(1)}
    two_stage = {key: value for key, value in original().items() if key != "query_embed.weight"}
    for state, words in ((refined, "with box refinement"), (two_stage, "two-stage")):
        with pytest.raises(CheckpointError, match=f"{words}.*without box refinement"):
            convert_original_detector(state, None)
    refined = mmdetection()
    refined["bbox_head.reg_branches.1.0.weight"] = refined["bbox_head.reg_branches.1.0.weight"] + 1
    two_stage = {**mmdetection(), "bbox_head.transformer.enc_output.weight": torch.zeros(1)}
    for state, words in ((refined, "with box refinement"), (two_stage, "two-stage")):
        with pytest.raises(CheckpointError, match=words):
            convert_mmdetection_detector(state)


def own_detector() -> State:
    """A Deformable DETR as this project saves it."""
    cfg = querymask.get_cfg()
    cfg.merge_from_file(str(ROOT / "projects" / "solq" / "configs" / "deformable_detr_r50_width256.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in build_model(cfg).state_dict().items()}
    return fill(shapes)


def test_start_from_an_own_detector() -> None:
    state = own_detector()
    converted, report = convert_original_detector(state, None)
    fitted, report = fit_to_model(converted, report, model_shapes(), r"^(detector\.fine_proj|mask_branch)\.")
    assert report.fits, report.details(*Report.MISFITS)
    assert fitted["detector.class_embed.bias"].flatten()[0] == state["detector.class_embed.0.bias"].flatten()[0]
    assert {line.source.split(".")[1] for line in report.of("dropped")} == {"bbox_embed", "input_proj"}
    with pytest.raises(CheckpointError, match="with box refinement"):
        convert_original_detector({**state, "detector.bbox_embed.1.layers.0.bias": torch.zeros(256)}, None)


@pytest.mark.parametrize("source", [isda, mmdetection, original, own_detector])
@pytest.mark.parametrize("drop", [False, True])
def test_through_the_tool(
    source: Callable[[], State], drop: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output, report = tmp_path / "in.pth", tmp_path / "out.pth", tmp_path / "report.txt"
    torch.save({"meta": {"epoch": 3}, "state_dict": source(), "optimizer": {}}, path)
    arguments = ["--config-file", str(CONFIG), "--report", str(report), str(path), str(output)]
    assert tool.main([*arguments, *(["--drop-classes"] if drop else [])]) == 0, capsys.readouterr().err
    converted = read_checkpoint(output)
    assert ("detector.class_embed.weight" in converted) != drop
    assert ("mask_branch.kernel_embed.layers.0.weight" in converted) == (source is isda)
    text = report.read_text()
    assert all(key in text for key in source())


def test_own_files_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": convert(isda())[0]}, tmp_path / "own.pth")
    arguments = ["--config-file", str(CONFIG), str(tmp_path / "own.pth"), str(tmp_path / "out.pth")]
    assert tool.main(arguments) == 0
    assert "ISDA in QueryMask's own names" in capsys.readouterr().out


def test_file_of_another_resolution_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": isda()}, tmp_path / "in.pth")
    config = str(CONFIG.parent / "ablations" / "mask_stride_8.yaml")
    assert tool.main(["--config-file", config, str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 1
    message = capsys.readouterr().err
    assert "MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE 4 (config: 8)" in message and "isda_r50.yaml" in message
    assert not (tmp_path / "out.pth").exists()
