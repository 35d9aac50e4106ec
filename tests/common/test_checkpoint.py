"""Reading files of others safely, renaming by rules, the report, and recognition of formats."""

import argparse
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from querymask.common.backbones import SwinTransformer
from querymask.common.checkpoint import (
    FORMATS,
    Change,
    CheckpointError,
    Copy,
    Drop,
    Options,
    Rename,
    apply_rules,
    fit_to_model,
    read_checkpoint,
    recognise,
    write_checkpoint,
)

GOLDEN = Path(__file__).parents[1] / "reference" / "golden"
STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


# ---- Rules --------------------------------------------------------------------------------------------------------


def test_rules_apply_in_order_and_are_reported() -> None:
    state = {"a.w": torch.tensor(1.0), "a.copy": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0]), "c": torch.ones(1)}
    rules = [
        Copy(r"^a\.copy$", "a.w"),
        Rename(r"^a\.", "first."),
        Rename(r"^first\.w$", lambda match: match[0].upper()),  # sees what the rule before it made
        Change(r"^b$", lambda value: value[1:], "last entry"),
        Drop(r"^c$", "not needed"),
    ]
    converted, report = apply_rules(state, rules)
    assert_equal(converted, {"FIRST.W": torch.tensor(1.0), "b": torch.tensor([2.0])})
    assert [(line.status, line.source, line.target, line.note) for line in report.lines] == [
        ("renamed", "a.w", "FIRST.W", ""),
        ("dropped", "a.copy", "", "equal copy of a.w"),
        ("used", "b", "b", "last entry"),
        ("dropped", "c", "", "not needed"),
    ]
    assert torch.equal(state["b"], torch.tensor([1.0, 2.0]))  # the input stays as it is


def test_copies_that_differ_are_refused() -> None:
    state = {"head.0": torch.zeros(2), "head.1": torch.tensor([0.0, 1e-7])}
    with pytest.raises(CheckpointError, match=r"'head\.1' differs from 'head\.0'"):
        apply_rules(state, [Copy(r"^head\.1$", "head.0")])


def test_copy_without_original_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'head\.1' should repeat 'head\.0'"):
        apply_rules({"head.1": torch.zeros(2)}, [Copy(r"^head\.1$", "head.0")])


def test_two_keys_with_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'a' and 'b' both become 'b'"):
        apply_rules({"a": torch.zeros(1), "b": torch.zeros(1)}, [Rename("^a$", "b")])


def test_fit_to_model_names_every_misfit() -> None:
    state = {"kept": torch.ones(2), "old": torch.ones(3), "wrong": torch.ones(4), "extra": torch.ones(5)}
    shapes = {"kept": (2,), "renamed": (3,), "wrong": (7,), "absent": (6,), "head.new": (8,)}
    fitted, report = fit_to_model(*apply_rules(state, [Rename("^old$", "renamed")]), shapes, new=r"^head\.")
    assert_equal(fitted, {"kept": torch.ones(2), "renamed": torch.ones(3)})
    assert {line.target: line.status for line in report.lines} == {
        "kept": "used",
        "renamed": "renamed",
        "wrong": "mismatch",
        "extra": "unexpected",
        "absent": "missing",
        "head.new": "new",
    }
    assert not report.fits
    assert "(4,) in the file, (7,) in the model" in report.details("mismatch")
    assert "and 2 more" in report.details("missing", "unexpected", "mismatch", limit=1)
    summary = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in report.summary().splitlines()[2:]}
    assert summary == {status: "1" for status in report.STATUSES if status != "dropped"} | {"dropped": "0"}


# ---- Reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_reads_pytorch_files(tmp_path: Path, wrapper: str | None, new_format: bool) -> None:
    content = {f"module.{key}": value for key, value in STATE.items()}
    if wrapper:
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        args = argparse.Namespace(lr=2e-4, masks=True, output="out", sizes=[1, 2])
        content = {wrapper: OrderedDict(content), "optimizer": optimizer, "epoch": 49, "args": args}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=new_format)
    assert_equal(read_checkpoint(tmp_path / "model.pth"), STATE)


ARRAYS = {
    "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "int64": np.arange(4),
    "bool": np.array([True, False]),
    "big_endian": np.arange(3, dtype=">f4"),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_pickles_of_arrays(tmp_path: Path, protocol: int) -> None:
    content = {"model": ARRAYS, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
    state = read_checkpoint(tmp_path / "model.pkl")
    for key, value in ARRAYS.items():
        np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)
    assert {key: str(value.dtype) for key, value in state.items()} == {
        "float16": "torch.float16",
        "fortran": "torch.float64",
        "int64": "torch.int64",
        "bool": "torch.bool",
        "big_endian": "torch.float32",
        "scalar": "torch.float32",
        "empty": "torch.float32",
    }


def test_reads_pickles_of_python_2(tmp_path: Path) -> None:
    """Python 2 wrote the bytes of an array as a string, and NumPy 1 knew its functions by other names."""
    content = (
        b"\x80\x02}U\x05modelU\x01w"  # {"model": ...} with byte strings, filled in below
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tb"
    )
    content = content.replace(b"U\x01w", b"}U\x01w", 1) + b"ss."
    (tmp_path / "model.pkl").write_bytes(content)
    assert_equal(read_checkpoint(tmp_path / "model.pkl"), {"w": torch.tensor([1.0, -2.0])})


class Malicious:
    """Touches a file when it is unpickled without protection."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle", "inside namespace"])
def test_code_in_a_file_is_not_run(tmp_path: Path, form: str) -> None:
    evidence, file = tmp_path / "evidence", tmp_path / "model.pth"
    content: Any = {"model": STATE, "args": Malicious(evidence)}
    if form == "inside namespace":
        content["args"] = argparse.Namespace(hook=Malicious(evidence))
    if form == "pickle":
        file.write_bytes(pickle.dumps(content["args"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "torch legacy")
    with pytest.raises(CheckpointError, match=r"model\.pth.*(getattr|pathlib).*not"):
        read_checkpoint(file)
    assert not evidence.exists()
    pickle.loads(pickle.dumps(Malicious(evidence)))
    assert evidence.exists()  # it would have shown


class ForgedDtype:
    """A dtype of objects with the flag cleared that keeps NumPy from reading pointers out of raw bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("O8",), (3, "|", None, None, None, -1, -1, 0)


class ForgedArray:
    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct = np.zeros(1).__reduce__()[0]
        return (
            reconstruct,
            (np.ndarray, (0,), b"b"),
            (1, (1,), ForgedDtype(), False, b"\x08\x00\x00\x00\x00\x00\x00\x00"),
        )


def test_forged_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"w": ForgedArray()}}, 2))
    with pytest.raises(CheckpointError, match="'O8'"):
        read_checkpoint(tmp_path / "model.pkl")


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": np.array([{}, None], dtype=object)}))
    with pytest.raises(CheckpointError, match="'O8'"):
        read_checkpoint(tmp_path / "model.pkl")


def test_safetensors(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + np.array([1, -2], "<f4").tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    try:
        import safetensors  # noqa: F401
    except ImportError:
        with pytest.raises(CheckpointError, match="pip install safetensors"):
            read_checkpoint(tmp_path / "model.safetensors")
    else:
        assert_equal(read_checkpoint(tmp_path / "model.safetensors"), {"w": torch.tensor([1.0, -2.0])})


def test_damaged_files_are_named(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.find(STATE["layer.weight"].numpy().tobytes()) + 10] ^= 255
    pickled = pickle.dumps({"model": {"w": np.zeros(100)}})
    cases = {
        "cut.pth": (whole[: len(whole) // 2], "damaged or incomplete"),
        "flipped.pth": (bytes(flipped), "checksum"),
        "cut.pkl": (pickled[:-200], "damaged or incomplete"),
        "page.pth": (b"<html>not found</html>", "not a checkpoint"),
        "empty.pth": (b"", "not a checkpoint"),
        "list.pkl": (pickle.dumps([1, 2]), "holds a list"),
        "arguments.pkl": (pickle.dumps({"lr": 1.0, "epochs": 3}), r"no tensors in it \(its entries: lr, epochs\)"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: .*{reason}"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"absent\.pth: cannot be opened"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_checkpoint(tmp_path)


# ---- Writing ------------------------------------------------------------------------------------------------------


def test_detectron2_loads_what_is_written(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in torch.nn.Linear(3, 2).state_dict().items()}
    write_checkpoint(state, tmp_path / "new" / "model.pth", "querymask, a test")
    model = torch.nn.Linear(3, 2)
    rest = DetectionCheckpointer(model).load(str(tmp_path / "new" / "model.pth"))
    assert_equal(dict(model.state_dict()), state)
    assert rest["__author__"] == "querymask, a test"
    assert not rest.get("matching_heuristics")


def test_slices_are_written_without_the_rest(tmp_path: Path) -> None:
    write_checkpoint({"w": torch.zeros(1_000_000)[:10]}, tmp_path / "model.pth", "a test")
    assert (tmp_path / "model.pth").stat().st_size < 10_000


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must end in \.pth"):
        write_checkpoint(STATE, tmp_path / "model.pkl", "a test")


# ---- Formats ------------------------------------------------------------------------------------------------------


def expanded(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that need no memory."""
    return {key: torch.zeros(()).expand(tuple(shape)) for key, shape in shapes.items()}


FOREIGN = {
    "ISDA": ["bbox_head.kernel_branches.0.0.weight", "mask_feat_head.conv_pred.0.conv.weight", "bbox_head.transformer"],
    "EffSeg or FQDet (DetSeg) of another form": ["heads.gvd.heads.2.qry.0.weight", "backbone.body.conv1.weight"],
    "Deformable DETR of mmdetection": [
        "bbox_head.transformer.decoder.layers.0.attentions.1.sampling_offsets.weight",
        "bbox_head.reg_branches.0.0.weight",
    ],
    "Detectron2 R-CNN": ["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_predictor.cls_score.weight"],
    "Sparse R-CNN": ["head.head_series.0.inst_interact.norm1.weight", "init_proposal_features.weight"],
    "DETR": ["transformer.encoder.layers.0.self_attn.in_proj_weight", "query_embed.weight", "class_embed.weight"],
    "DN-DETR or DINO": [
        "transformer.level_embed",
        "label_enc.weight",
        "class_embed.0.bias",
        "backbone.0.body.conv1.weight",
    ],
    "Mask2Former or MaskFormer": ["sem_seg_head.predictor.query_feat.weight", "backbone.stem.conv1.weight"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_are_recognised(name: str) -> None:
    assert [f.name for f in FORMATS if f.matches(FOREIGN[name]) and f.meta_architecture is None] == [name]


@pytest.mark.parametrize("path", sorted((GOLDEN / "solq").glob("checkpoint*.json")), ids=lambda path: path.stem)
def test_published_solq_models_have_one_format(path: Path) -> None:
    manifest = json.loads(path.read_text())
    names = [format.name for format in FORMATS if format.matches(manifest) and format.meta_architecture is None]
    assert names == ([] if path.stem.startswith("checkpoint_swin_t") else ["SOLQ or Deformable DETR"])


@pytest.mark.parametrize("path", sorted((GOLDEN / "istr").glob("checkpoint*.json")), ids=lambda path: path.stem)
def test_published_istr_models_have_one_format(path: Path) -> None:
    manifest = json.loads(path.read_text())
    names = [format.name for format in FORMATS if format.matches(manifest)]
    assert names == ["ISTR v2" if "v2" in path.stem else "ISTR"]


def test_unknown_models_have_none() -> None:
    assert recognise(STATE) is None


def test_formats_made_for_a_model_come_first() -> None:
    state = {key: torch.zeros(1) for key in FOREIGN["Deformable DETR of mmdetection"]}
    assert recognise(state).name == recognise(state, "SOLQ").name == "Deformable DETR of mmdetection"
    assert recognise(state, "ISDA").name == "Deformable DETR of mmdetection, as the start of an ISDA"


# ---- Backbones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnet_gives_the_same_features(depth: int) -> None:
    import torchvision
    from detectron2.modeling.backbone import build_resnet_backbone

    from querymask import get_cfg

    torch.manual_seed(0)
    source = getattr(torchvision.models, f"resnet{depth}")()
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    source.eval()
    state = dict(source.state_dict())
    format = recognise(state)
    assert format is not None and format.description(state) == f"torchvision ResNet-{depth}"

    cfg = get_cfg()
    settings = format.settings(state, Options())
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    model = torch.nn.ModuleDict(
        {"backbone": build_resnet_backbone(cfg, argparse.Namespace(channels=3)), "head": torch.nn.Linear(2, 2)}
    )
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    options = Options(model_keys=shapes)
    fitted, report = fit_to_model(*format.convert(state, options), shapes, format.new_keys(options))
    assert report.fits
    assert {line.target for line in report.of("new")} == {"head.weight", "head.bias"}
    model.load_state_dict(fitted, strict=False)

    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        actual = model["backbone"].eval()(image)
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        res2 = source.layer1(x)
        res5 = source.layer4(source.layer3(source.layer2(res2)))
    torch.testing.assert_close(actual["res2"], res2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual["res5"], res5, rtol=1e-4, atol=1e-4)


def swin() -> SwinTransformer:
    return SwinTransformer(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=4)


@pytest.mark.parametrize("naming", ["official", "timm"])
def test_swin_classifiers(naming: str) -> None:
    own = swin().state_dict()
    state = {key: torch.randn_like(value) for key, value in own.items() if not key.startswith("norm")}
    expected = {f"backbone.{key}": value for key, value in state.items()}
    for stage, tokens in ((0, 16), (1, 16)):
        state[f"layers.{stage}.blocks.0.attn.relative_position_index"] = torch.zeros(tokens, tokens)
        state[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(4, tokens, tokens)
    state |= {"norm.weight": torch.ones(192), "head.weight": torch.ones(1000, 192), "head.bias": torch.ones(1000)}
    if naming == "timm":
        for key in [key for key in state if ".downsample." in key]:
            stage = int(key.split(".")[1])
            state[key.replace(f"layers.{stage}.", f"layers.{stage + 1}.moved.", 1)] = state.pop(key)
        state = {key.replace(".moved.", "."): value for key, value in state.items()}

    format = recognise(state)
    assert format is not None and format.name == "Swin transformer"
    assert format.settings(state, Options()) == {
        "MODEL.SWIN.EMBED_DIM": 24,
        "MODEL.SWIN.DEPTHS": [2, 2, 2, 2],
        "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
        "MODEL.SWIN.WINDOW_SIZE": 4,
    }
    shapes = {f"backbone.{key}": value.shape for key, value in own.items()} | {"transformer.norm1.weight": (3,)}
    options = Options(model_keys=shapes)
    fitted, report = fit_to_model(*format.convert(state, options), shapes, format.new_keys(options))
    assert report.fits, report.details(*report.MISFITS)
    assert_equal(fitted, expected)
    assert {line.target for line in report.of("new")} == shapes.keys() - expected.keys()


def test_backbone_for_a_model_without_it_is_refused() -> None:
    state = expanded({"conv1.weight": (64, 3, 7, 7), "layer1.0.conv1.weight": (64, 64, 1, 1)})
    format = recognise(state)
    assert format is not None and format.convert is not None
    with pytest.raises(CheckpointError, match="no such backbone"):
        format.convert(state, Options(model_keys=["backbone.patch_embed.proj.weight"]))
