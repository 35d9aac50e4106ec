"""Conversion of published SOLQ and Deformable DETR files, through the rules and through the tool."""

import argparse
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tool_loader import load_tool

from querymask import get_cfg
from querymask.common.checkpoint import CheckpointError, coco_class_ids, fit_to_model, read_checkpoint
from querymask.model_zoo import find_leaves, fitting_configs, get_value, read_config
from querymask.solq.checkpoint import convert, describe, settings

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "reference" / "golden" / "solq"
CONFIGS = ROOT / "projects" / "solq" / "configs"


tool = load_tool("convert_checkpoint")
COCO = coco_class_ids()


def canonical(key: str) -> str:
    """One name for the keys that hold the same module in a model with box refinement."""
    key = re.sub(r"vector_embed\.\d+\.", "vector_embed.0.", key)
    return re.sub(r"transformer\.decoder\.(bbox|class)_embed", r"\1_embed", key)


def published(manifest: str) -> dict[str, torch.Tensor]:
    """A published state dict in which every module has a value of its own; takes no memory."""

    def value(key: str) -> torch.Tensor:
        return torch.tensor(zlib.crc32(canonical(key).encode()) / 2**32)

    shapes = json.loads((GOLDEN / manifest).read_text())
    return {key: value(key).expand(tuple(shape)) for key, shape in shapes.items()}


def shapes_of(cfg: CfgNode) -> dict[str, torch.Size]:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {key: value.shape for key, value in build_model(cfg).state_dict().items()}


def config(name: str, *overrides: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(list(overrides))
    return cfg


# ---- Files that configs start from ---------------------------------------------------------------------------------


def test_starts_of_configs_have_their_commands() -> None:
    """Where no address has the weights: the command is one of the tool's, for this model, and in the documentation."""
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("projects/*/README.md")]
    documented = re.sub(r"\\\n\s*", "", "".join(page.read_text() for page in pages))
    found = set()
    for leaf in find_leaves():
        cfg = leaf.config()
        weights, command = cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_FROM
        assert bool(command) == bool(weights and "://" not in weights), f"{leaf.name}: {weights} of {command!r}"
        if not command:
            continue
        script, *arguments = command.split()
        args = tool.parse_arguments(arguments)
        assert (script, args.output) == ("tools/convert_checkpoint.py", weights), leaf.name
        assert f"uv run {command}\n" in documented, f"{leaf.name}: {command}"
        detectors = []
        for file in (leaf.path, ROOT / args.config_file):
            shapes = shapes_of(read_config(file))
            detectors.append({key: shape for key, shape in shapes.items() if not key.startswith("mask_branch.")})
        assert detectors[0] == detectors[1], leaf.name
        found.add(f"{leaf.method}/{leaf.name}")
    assert found >= {"isda/isda_r50_paper", "isda/ablations/positions_both", "solq/sqr_r50_frozen", "solq/solq_swin_l"}


# ---- Published models against the project's configs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "overrides"),
    [
        ("checkpoint.json", ()),
        ("checkpoint_c5.json", ("MODEL.SOLQ.IN_FEATURES", ["res5"], "MODEL.SOLQ.NUM_FEATURE_LEVELS", 1)),
        ("checkpoint_swin_l.json", ()),
    ],
)
@pytest.mark.parametrize("classes", [80, 91])
def test_published_model_fits_its_config(manifest: str, overrides: tuple[object, ...], classes: int) -> None:
    name = "solq_swin_l.yaml" if "swin" in manifest else "solq_r50.yaml"
    cfg = config(name, "MODEL.SOLQ.NUM_CLASSES", classes, *overrides)
    state = published(manifest)
    converted, report = convert(state, COCO if classes == 80 else None)
    fitted, report = fit_to_model(converted, report, shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)
    assert fitted.keys() == converted.keys()
    assert len(report.lines) == len(state)
    assert {key: get_value(cfg, key) for key in settings(state)} == settings(state)
    for line in report.of("used", "renamed"):  # every tensor keeps its value
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line


def test_names_of_the_backbone() -> None:
    converted, report = convert(published("checkpoint.json"), None)
    names = {line.source: line.target for line in report.lines}
    assert names["backbone.0.body.conv1.weight"] == "backbone.stem.conv1.weight"
    assert names["backbone.0.body.bn1.running_var"] == "backbone.stem.conv1.norm.running_var"
    assert names["backbone.0.body.layer1.0.downsample.0.weight"] == "backbone.res2.0.shortcut.weight"
    assert names["backbone.0.body.layer1.0.downsample.1.bias"] == "backbone.res2.0.shortcut.norm.bias"
    assert names["backbone.0.body.layer3.5.conv2.weight"] == "backbone.res4.5.conv2.weight"
    assert names["backbone.0.body.layer4.2.bn3.running_mean"] == "backbone.res5.2.conv3.norm.running_mean"


def test_copies_are_dropped_with_their_reason() -> None:
    _, report = convert(published("checkpoint.json"), None)
    notes = {line.source: line.note for line in report.of("dropped")}
    assert len(notes) == 36 + 30  # box heads of the decoder, five of the six mask heads
    assert notes["transformer.decoder.bbox_embed.3.layers.1.bias"] == "equal copy of bbox_embed.3.layers.1.bias"
    assert notes["vector_embed.5.layers.2.weight"] == "equal copy of vector_embed.0.layers.2.weight"


@pytest.mark.parametrize("key", ["vector_embed.2.layers.1.weight", "transformer.decoder.bbox_embed.4.layers.0.bias"])
def test_shared_modules_that_differ_are_refused(key: str) -> None:
    state = published("checkpoint.json")
    state[key] = state[key] + 1
    with pytest.raises(CheckpointError, match=re.escape(f"'{key}' differs")):
        convert(state, None)


def test_leftovers_of_a_profiler_are_dropped() -> None:
    state = published("checkpoint.json")
    state |= {"total_ops": torch.zeros(1), "class_embed.0.total_params": torch.zeros(1)}
    _, report = convert(state, None)
    notes = {line.source: line.note for line in report.of("dropped")}
    assert notes["total_ops"] == notes["class_embed.0.total_params"] == "left over by a profiler"


# ---- Classes ------------------------------------------------------------------------------------------------------


def test_class_rows_are_picked_by_raw_category_id() -> None:
    assert COCO[:3] == [1, 2, 3] and COCO[11] == 13 and COCO[-1] == 90 and len(COCO) == 80
    state = published("checkpoint.json")
    for layer in range(6):
        state[f"class_embed.{layer}.bias"] = 1000 * layer + torch.arange(91.0)
        state[f"class_embed.{layer}.weight"] = state[f"class_embed.{layer}.bias"][:, None].expand(91, 384)
    converted, report = convert(state, COCO)
    for layer in range(6):
        expected = 1000 * layer + torch.tensor(COCO, dtype=torch.float32)
        assert torch.equal(converted[f"detector.class_embed.{layer}.bias"], expected)
        assert torch.equal(converted[f"detector.class_embed.{layer}.weight"], expected[:, None].expand(80, 384))
    assert {line.note for line in report.lines if line.target.startswith("detector.class_embed")} == {"80 of 91 rows"}
    assert torch.equal(convert(state, None)[0]["detector.class_embed.3.bias"], state["class_embed.3.bias"])


def test_class_ids_beyond_the_head_are_refused() -> None:
    state = published("checkpoint.json")
    state |= {key: value[:80] for key, value in state.items() if key.startswith("class_embed.")}
    with pytest.raises(CheckpointError, match=r"Rows up to 90 .* has 80.*--keep-classes"):
        convert(state, COCO)


def test_class_head_can_be_left_out() -> None:
    converted, report = convert(published("checkpoint.json"), None, drop_classes=True)
    assert not [key for key in converted if "class_embed" in key]
    assert len([line for line in report.of("dropped") if line.note == "class head, not asked for"]) == 12


# ---- Variants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "name", "parts"),
    [
        ("checkpoint_sqr.json", "sqr_r50.yaml", ["mask_branch.head.blocks.4.1.bias", "mask_branch.skips.2.weight"]),
        (
            "checkpoint_pca.json",
            "solq_r50_pca.yaml",
            ["mask_branch.coding.explained_variances", "mask_branch.vector_embed.layers.0.bias"],
        ),
    ],
)
def test_other_mask_branches(manifest: str, name: str, parts: list[str]) -> None:
    """They fit their config, and their detector alone fits that without masks."""
    state = published(manifest)
    cfg = config(name)
    converted, report = convert(state, COCO)
    fitted, report = fit_to_model(converted, report, shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)
    assert set(parts) < set(fitted)
    for line in report.of("used", "renamed"):
        assert fitted[line.target].flatten()[0] == state[line.source].flatten()[0], line
    assert {key: get_value(cfg, key) for key in settings(state)} == settings(state)
    configs = [Path(path).name for path in fitting_configs(settings(state))]
    assert configs[0] == name

    cfg = config("solq_r50.yaml", "MODEL.MASK_BRANCH.NAME", "none", "MODEL.SOLQ.HIDDEN_DIM", cfg.MODEL.SOLQ.HIDDEN_DIM)
    _, report = fit_to_model(*convert(state, COCO, detector_only=True), shapes_of(cfg))
    assert report.fits, report.details(*report.MISFITS)


def deformable_detr(refine: bool, two_stage: bool) -> dict[str, torch.Tensor]:
    """A file of the original Deformable DETR, 256 wide, made from the manifest of the SQR baseline."""
    state = {k.removeprefix("detr."): v for k, v in published("checkpoint_sqr.json").items() if k.startswith("detr.")}
    if not refine:
        state = {key: value for key, value in state.items() if not key.startswith("transformer.decoder.bbox_embed")}
        for key in state:
            if re.match(r"(class|bbox)_embed\.\d", key):
                state[key] = state[re.sub(r"_embed\.\d", "_embed.0", key)]
    if two_stage:
        state = {k: v for k, v in state.items() if "reference_points" not in k and not k.startswith("query_embed")}
        for key in [key for key in state if re.match(r"(class|bbox)_embed\.5", key)]:
            state[key.replace("_embed.5", "_embed.6")] = state[key] + 1
        for key in [key for key in state if re.match(r"(class|bbox)_embed\.", key)]:
            state[f"transformer.decoder.{key}"] = state[key]
        for name, size in (("enc_output", 256), ("pos_trans", 512)):
            state[f"transformer.{name}.weight"] = torch.zeros(size, size)
            for key in (f"{name}.bias", f"{name}_norm.weight", f"{name}_norm.bias"):
                state[f"transformer.{key}"] = torch.zeros(size)
    return state


@pytest.mark.parametrize(("refine", "two_stage"), [(False, False), (True, False), (True, True)])
def test_original_deformable_detr(refine: bool, two_stage: bool) -> None:
    state = deformable_detr(refine, two_stage)
    assert describe(state).startswith("Deformable DETR (R50, width 256")
    assert ("two-stage" in describe(state), "with box" in describe(state)) == (two_stage, refine)
    overrides = [item for pair in settings(state).items() for item in pair]
    _, report = fit_to_model(*convert(state, COCO), shapes_of(config("solq_r50.yaml", *overrides)))
    assert report.fits, report.details(*report.MISFITS)


def test_heads_that_should_be_shared_without_refinement() -> None:
    state = deformable_detr(refine=False, two_stage=False)
    converted, _ = convert(state, None)
    heads = {key for key in converted if key.startswith("detector.class_embed")}
    assert heads == {"detector.class_embed.0.weight", "detector.class_embed.0.bias"}
    state["class_embed.3.bias"] = state["class_embed.3.bias"] + 1
    with pytest.raises(CheckpointError, match=r"'class_embed\.3\.bias' differs from 'class_embed\.0\.bias'"):
        convert(state, None)


# ---- The tool -----------------------------------------------------------------------------------------------------

TINY = """
_BASE_: {base}
MODEL:
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}
  SOLQ: {{NUM_QUERIES: 5, HIDDEN_DIM: 32, NUM_HEADS: 2, ENC_LAYERS: 1, DEC_LAYERS: 2, DIM_FEEDFORWARD: 16}}
  MASK_CODING: {{SIZE: 16, LENGTH: 20}}
  MASK_BRANCH: {{VECTOR: {{HIDDEN_DIM: 24}}}}
"""
Tiny = tuple[Path, Path, dict[str, torch.Tensor]]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """A small config, and a file as the release would save the model, with 91 class rows."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(base=CONFIGS / "Base-SOLQ.yaml"))
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["MODEL.SOLQ.NUM_CLASSES", 91, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = {key: torch.randn_like(value) for key, value in build_model(cfg).state_dict().items()}
    release: dict[str, torch.Tensor] = {}
    for key, value in model.items():
        name = re.sub(r"^backbone\.(stem\.)?", "backbone.0.body.", key)
        name = re.sub(r"\.res(\d)\.", lambda match: f".layer{int(match[1]) - 1}.", name)
        name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
        name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
        name = re.sub("^(detector|mask_branch)[.]", "", name)
        copies = [name]
        if name.startswith("bbox_embed."):
            copies.append(f"transformer.decoder.{name}")
        if name.startswith("vector_embed."):
            copies = [name.replace("vector_embed.", f"vector_embed.{layer}.") for layer in range(2)]
        release.update(dict.fromkeys(copies, value))
    file = tmp_path / "release.pth"
    content = {"model": release, "args": argparse.Namespace(lr=2e-4), "epoch": 49, "optimizer": {"state": {}}}
    torch.save(content, file)
    return path, file, model


def run(config_file: Path, file: Path, *options: str, opts: tuple[object, ...] = ()) -> tuple[int, Path]:
    output = file.with_name("out.pth")
    arguments = ["--config-file", str(config_file), *options, str(file), str(output), *map(str, opts)]
    return tool.main(arguments), output


def load(config_file: Path, file: Path, *overrides: object) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What Detectron2 makes of a file: the model's tensors, and the warnings."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    model = build_model(cfg)
    problems: list[str] = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = lambda keys: problems.extend(keys.missing_keys + keys.unexpected_keys)
    checkpointer.load(str(file))
    return dict(model.state_dict()), problems


def test_tool_converts(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file, model = tiny
    status, output = run(path, file, "--report", str(tmp_path / "report.txt"))
    assert status == 0
    loaded, problems = load(path, output)
    assert not problems
    for key, value in loaded.items():
        expected = model[key][COCO] if key.startswith("detector.class_embed.") else model[key]
        assert torch.equal(value, expected), key
    shown = capsys.readouterr().out
    assert "SOLQ (R18, width 32" in shown and "mask vectors of 20" in shown
    report = (tmp_path / "report.txt").read_text()
    assert len(report.splitlines()) == 2 + len(read_checkpoint(file))
    assert "80 of 91 rows" in report and "equal copy of vector_embed.0.layers.0.weight" in report


def test_tool_keeps_all_classes(tiny: Tiny) -> None:
    path, file, model = tiny
    status, output = run(path, file, "--keep-classes", opts=("MODEL.SOLQ.NUM_CLASSES", 91))
    assert status == 0
    loaded, problems = load(path, output, "MODEL.SOLQ.NUM_CLASSES", 91)
    assert not problems and all(torch.equal(loaded[key], value) for key, value in model.items())


@pytest.mark.parametrize("source", ["release", "own"])
def test_tool_drops_classes(tiny: Tiny, source: str) -> None:
    path, file, model = tiny
    if source == "own":
        torch.save({"model": model, "iteration": 9}, file)
    status, output = run(path, file, "--drop-classes", opts=("MODEL.SOLQ.NUM_CLASSES", 6))
    assert status == 0
    loaded, problems = load(path, output, "MODEL.SOLQ.NUM_CLASSES", 6)
    assert sorted(problems) == sorted(key for key in model if key.startswith("detector.class_embed."))
    assert torch.equal(
        loaded["mask_branch.vector_embed.layers.2.weight"], model["mask_branch.vector_embed.layers.2.weight"]
    )


def test_tool_keeps_the_names_of_classes(tiny: Tiny) -> None:
    path, file, model = tiny
    names = [f"class of {i}" for i in range(80)]
    state = {key: value[COCO] if key.startswith("detector.class_embed.") else value for key, value in model.items()}
    for options, expected in (((), names), (("--drop-classes",), None)):
        torch.save({"model": state, "class_names": names}, file)
        status, output = run(path, file, *options)
        assert status == 0
        assert torch.load(output, weights_only=True).get("class_names") == expected


def test_tool_leaves_the_mask_branch_out(tiny: Tiny) -> None:
    path, file, _ = tiny
    status, output = run(path, file, "--detector-only", opts=("MODEL.MASK_BRANCH.NAME", "none"))
    assert status == 0
    assert load(path, output, "MODEL.MASK_BRANCH.NAME", "none")[1] == []


def test_tool_writes_a_part_when_asked(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    path, file, model = tiny
    opts = ("MODEL.MASK_CODING.LENGTH", 30)
    assert run(path, file, opts=opts)[0] == 1
    status, output = run(path, file, "--partial", opts=opts)
    assert status == 0
    missing = {key for key in model if key.startswith("mask_branch.vector_embed.layers.2.")}
    assert set(load(path, output, *opts)[1]) == missing


def test_backbone_file(tiny: Tiny, tmp_path: Path) -> None:
    import torchvision

    path, _, _ = tiny
    source = torchvision.models.resnet18().state_dict()
    torch.save(source, tmp_path / "resnet18.pth")
    status, output = run(path, tmp_path / "resnet18.pth")
    assert status == 0
    loaded, problems = load(path, output)
    assert problems and not [key for key in problems if key.startswith("backbone.")]
    assert torch.equal(loaded["backbone.res5.1.conv2.weight"], source["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("options", "opts", "messages"),
    [
        ((), ("MODEL.SOLQ.HIDDEN_DIM", 64), ["MODEL.SOLQ.HIDDEN_DIM 32 (config: 64)", "(4, 32) in the file, (4, 64)"]),
        ((), ("MODEL.SOLQ.NUM_CLASSES", 6), ["MODEL.SOLQ.NUM_CLASSES 80 (config: 6)", "--drop-classes"]),
        ((), ("MODEL.SOLQ.BOX_REFINE", False), ["MODEL.SOLQ.BOX_REFINE True (config: False)", "unexpected"]),
        # The stride of a block shows in no shape, but the features would be wrong
        ((), ("MODEL.RESNETS.STRIDE_IN_1X1", True), ["MODEL.RESNETS.STRIDE_IN_1X1 False (config: True)"]),
        (
            ("--detector-only",),
            (),
            ["MODEL.MASK_BRANCH.NAME none (config: VectorBranch)", "mask_branch.vector_embed.layers.0.weight"],
        ),
    ],
)
def test_tool_refuses_what_does_not_fit(
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    opts: tuple[object, ...],
    messages: list[str],
) -> None:
    path, file, _ = tiny
    status, output = run(path, file, *options, opts=opts)
    assert status == 1 and not output.exists()
    error = capsys.readouterr().err
    assert f"{file} does not fit {path}. It looks like SOLQ (R18, width 32, 4 levels" in error
    for message in messages:
        assert message in error


def test_options_may_stand_anywhere() -> None:
    arguments = ["in.pth", "--partial", "out.pth", "MODEL.SOLQ.NUM_CLASSES", "3", "--config-file", "c.yaml"]
    args = tool.parse_arguments(arguments)
    assert (args.input, args.output, args.partial) == ("in.pth", "out.pth", True)
    assert args.opts == ["MODEL.SOLQ.NUM_CLASSES", "3"]


def save(state: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: torch.save(state, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save({"heads.gvd.heads.2.qry.0.weight": torch.ones(1)}), "looks like EffSeg"),
        (save({"anything": torch.ones(1)}), "not recognised. Its keys begin with anything"),
        (save(published("checkpoint_sqr.json")), "It looks like the SQR baseline of SOLQ (R50, width 256"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "damaged or incomplete"),
        (lambda path: path.unlink(), "cannot be opened"),
    ],
)
def test_tool_names_the_trouble(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], message: str
) -> None:
    path, file, _ = tiny
    write(file)
    assert run(path, file)[0] == 1
    assert message in capsys.readouterr().err


def test_refusal_names_the_configs_that_fit() -> None:
    configs = [Path(path).name for path in fitting_configs(settings(published("checkpoint.json")))]
    assert configs[0] == "solq_r50.yaml"
    others = {"solq_r101.yaml", "solq_r50_width256.yaml", "solq_r50_no_refine.yaml", "solq_r50_paper.yaml"}
    assert not {"Base-SOLQ.yaml", *others} & set(configs)
