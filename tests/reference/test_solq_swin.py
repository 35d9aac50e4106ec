"""Swin backbones of SOLQ against the official implementation, in float64."""

from typing import Any

import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_manifest

from querymask.common.backbones import SwinTransformer

SWIN_CASES = {
    name: case
    for name, case in load_cases("solq", "component").items()
    if str(case.get("backbone", "")).startswith("swin")
}
KNOWN_SETTINGS = {"kind", "file", "backbone", "image", "feature_shapes", "manifest"}
SIZES: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
PREFIX = "backbone.0.body."


def build(backbone: str, num_features: int) -> SwinTransformer:
    """The backbone that a name such as ``swin_t_p4w7`` stands for, with its last ``num_features`` stages as outputs."""
    _, size, geometry = backbone.split("_")
    patch_size, window_size = geometry.removeprefix("p").split("w")
    return SwinTransformer(
        **SIZES[size],
        patch_size=int(patch_size),
        window_size=int(window_size),
        out_features=[f"stage{stage}" for stage in range(4 - num_features, 4)],
    )


def reference_state(manifest: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The official state dict under this project's names: without the prefix and without the computed index."""
    return {
        key.removeprefix(PREFIX): torch.from_numpy(fixture().weight(key, shape))
        for key, shape in manifest.items()
        if key.startswith(PREFIX) and not key.endswith("relative_position_index")
    }


@pytest.mark.parametrize("name", SWIN_CASES)
def test_features(name: str) -> None:
    case = SWIN_CASES[name]
    unknown = set(case) - KNOWN_SETTINGS
    assert not unknown, f"case {name} has settings that this test does not know: {sorted(unknown)}"
    expected = load_arrays("solq", case)
    known_arrays = {f"feature_{index}" for index in case["feature_shapes"]} | {"relative_position_index"}
    assert set(expected) == known_arrays

    model = build(case["backbone"], len(case["feature_shapes"])).double().eval()
    manifest = load_manifest("solq", case.get("manifest", f"checkpoint_{case['backbone']}.json"))
    model.load_state_dict(reference_state(manifest), strict=True)

    image = fixture().image(**case["image"])[:, :, ::-1] / 255.0
    image = (image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        features = list(model(torch.from_numpy(image).permute(2, 0, 1)[None]).values())

    for index, shape in case["feature_shapes"].items():
        feature = features[int(index)]
        assert list(feature.shape) == shape
        step = 4 if feature.shape[1] < 500 else 8
        assert_close(feature[:, ::step], expected[f"feature_{index}"], f"{name}: feature_{index}")
    index_table = model.layers[0].blocks[0].attn.relative_position_index
    assert_close(index_table, expected["relative_position_index"], f"{name}: relative_position_index", tolerance=0)


def test_swin_l_manifest() -> None:
    """The published Swin-L model holds exactly the parameters that are built."""
    state = {key: list(value.shape) for key, value in build_on_meta("swin_l_p4w7").state_dict().items()}
    manifest = load_manifest("solq", "checkpoint_swin_l.json")
    assert state == {
        key.removeprefix(PREFIX): shape
        for key, shape in manifest.items()
        if key.startswith(PREFIX) and not key.endswith("relative_position_index")
    }


def build_on_meta(backbone: str) -> SwinTransformer:
    """A backbone without memory for its parameters."""
    with torch.device("meta"):
        return build(backbone, num_features=3)
