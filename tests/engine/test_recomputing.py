"""``MODEL.USE_CHECKPOINT``: layers are computed again in the backward pass, with the same gradients."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from spread_batches import effseg_configs, isda_configs, istr_configs, record, solq_configs
from torch import nn

from querymask.common.backbones.swin import SwinTransformer
from querymask.common.layers import Recomputable, recompute_layers

MODELS = [
    (solq_configs, "one-stage", {"EncoderLayer", "DecoderLayer"}),
    (solq_configs, "two-stage", {"EncoderLayer", "DecoderLayer"}),
    (isda_configs, "dice", {"EncoderLayer", "DecoderLayer"}),
    (istr_configs, "sigmoid", {"RecurrentStage"}),
    (effseg_configs, "limits", {"FQDetLayer", "RefinementStage"}),
    (effseg_configs, "Mask R-CNN", {"FQDetLayer", "MaskLayers"}),
    (effseg_configs, "PointRend", {"FQDetLayer", "MaskLayers"}),
    (effseg_configs, "RefineMask", {"FQDetLayer", "FusionStage"}),
]


def gradients(model: nn.Module, compute: Callable[[], torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Gradients by parameter, and how often layers of each kind were run."""
    runs: dict[str, int] = {}

    def count(module: nn.Module, *_: object) -> None:
        runs[type(module).__name__] = runs.get(type(module).__name__, 0) + 1

    handles = [
        module.register_forward_pre_hook(count) for module in model.modules() if isinstance(module, Recomputable)
    ]
    model.zero_grad()
    torch.manual_seed(1)
    compute().backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, runs


@pytest.mark.parametrize(("make", "form", "kinds"), MODELS, ids=[f"{m.__name__}-{form}" for m, form, _ in MODELS])
def test_gradients_are_the_same(make: Callable, form: str, kinds: set[str], cfg: CfgNode) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [record(count, generator) for count in (2, 1)]
    config = CfgNode.load_cfg(make(cfg)[form])
    if "DROPOUT" in config.MODEL[config.MODEL.META_ARCHITECTURE.upper()]:
        config.MODEL[config.MODEL.META_ARCHITECTURE.upper()].DROPOUT = 0.1  # the same random numbers again
    results = []
    for use_checkpoint in (False, True):
        config.MODEL.USE_CHECKPOINT = use_checkpoint
        torch.manual_seed(0)
        model = build_model(config).train()
        results.append(gradients(model, lambda: sum(model(batch).values())))  # noqa: B023 (called at once)
    (kept, once), (recomputed, twice) = results
    assert once.keys() == twice.keys() == kinds
    assert all(twice[kind] == 2 * once[kind] for kind in kinds)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        _, runs = gradients(model, lambda: torch.zeros((), requires_grad=True))
    assert not runs


def test_swin() -> None:
    torch.manual_seed(0)
    model = SwinTransformer(
        embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, drop_path_rate=0.5, out_features=("stage1",)
    ).train()
    images = torch.rand(4, 3, 40, 48)
    kept, once = gradients(model, lambda: model(images)["stage1"].square().sum())
    recompute_layers(model)
    recomputed, twice = gradients(model, lambda: model(images)["stage1"].square().sum())
    assert (once, twice) == ({"SwinBlock": 4}, {"SwinBlock": 8})
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
