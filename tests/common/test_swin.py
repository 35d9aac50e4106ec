"""The Swin transformer against a slow formula written from the paper, and its edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone

import querymask
from querymask.common.backbones import SwinTransformer
from querymask.common.backbones.swin import (
    SwinBlock,
    relative_position_index,
    shifted_window_mask,
    window_partition,
    window_reverse,
)

TINY = {"embed_dim": 8, "depths": (2, 3), "num_heads": (2, 4), "window_size": 3, "out_features": ("stage0", "stage1")}


def tiny(**overrides: object) -> SwinTransformer:
    """A small backbone in float64 with weights that leave no term negligible."""
    torch.manual_seed(0)
    model = SwinTransformer(**{**TINY, **overrides}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def slow_attention(attn: torch.nn.Module, x: torch.Tensor, side: int, shift: int) -> torch.Tensor:
    """One attention over all cells of (H, W, C) with an explicit mask: no windows, no roll.

    The windows are those of a grid displaced by ``shift``, cut off at the border of the map that is zero-padded to
    whole windows; two cells see each other if they lie in the same window.
    """
    height, width, dim = x.shape
    padded = x.new_zeros(math.ceil(height / side) * side, math.ceil(width / side) * side, dim)
    padded[:height, :width] = x
    cells = [(row, column) for row in range(padded.shape[0]) for column in range(padded.shape[1])]
    rows, columns = torch.tensor(cells).T
    # The first window in each direction holds only the first ``shift`` cells
    window_row = (rows - shift).div(side, rounding_mode="floor")
    window_column = (columns - shift).div(side, rounding_mode="floor")
    same = (window_row[:, None] == window_row) & (window_column[:, None] == window_column)
    dy = (rows[:, None] - rows).clamp(1 - side, side - 1) + side - 1
    dx = (columns[:, None] - columns).clamp(1 - side, side - 1) + side - 1
    table = attn.relative_position_bias_table.view(2 * side - 1, 2 * side - 1, attn.num_heads)

    tokens = padded.flatten(0, 1)
    query, key, value = (tokens @ attn.qkv.weight.T + attn.qkv.bias).split(dim, dim=1)
    heads = []
    for head, channels in enumerate(torch.arange(dim).chunk(attn.num_heads)):
        logits = query[:, channels] @ key[:, channels].T / math.sqrt(len(channels)) + table[dy, dx, head]
        logits = logits.masked_fill(~same, -math.inf)
        heads.append(logits.softmax(1) @ value[:, channels])
    output = torch.cat(heads, 1) @ attn.proj.weight.T + attn.proj.bias
    return output.view(padded.shape)[:height, :width]


def slow_swin(model: SwinTransformer, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network of the paper on one (3, height, width) image, cell by cell where that is clearest."""

    def norm(layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def cell(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        inside = row < x.shape[0] and column < x.shape[1]
        return x[row, column] if inside else x.new_zeros(x.shape[2])

    pixels = image.permute(1, 2, 0)
    height, width = math.ceil(image.shape[1] / 4), math.ceil(image.shape[2] / 4)
    kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    pixel_offsets = [(i, j) for i in range(4) for j in range(4)]
    patches = [
        [
            bias + sum(kernel[:, :, i, j] @ cell(pixels, 4 * r + i, 4 * c + j) for i, j in pixel_offsets)
            for c in range(width)
        ]
        for r in range(height)
    ]
    x = torch.stack([torch.stack(row) for row in patches])
    x = norm(model.patch_embed.norm, x)

    outputs = {}
    for index, stage in enumerate(model.layers):
        for number, block in enumerate(stage.blocks):
            shift = stage.side // 2 if number % 2 else 0
            x = x + slow_attention(block.attn, norm(block.norm1, x), stage.side, shift)
            hidden = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        outputs[f"stage{index}"] = norm(getattr(model, f"norm{index}"), x).permute(2, 0, 1)
        if stage.downsample is not None:
            rows, columns = math.ceil(x.shape[0] / 2), math.ceil(x.shape[1] / 2)
            order = [(0, 0), (1, 0), (0, 1), (1, 1)]
            patches = [
                [torch.cat([cell(x, 2 * r + i, 2 * c + j) for i, j in order]) for c in range(columns)]
                for r in range(rows)
            ]
            x = torch.stack([torch.stack(row) for row in patches])
            x = norm(stage.downsample.norm, x) @ stage.downsample.reduction.weight.T
    return outputs


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [
        (24, 24, 3),  # whole windows in every stage
        (25, 43, 3),  # odd everywhere: padding of patches, windows and merging
        (7, 5, 3),  # smaller than a window
        (1, 1, 3),  # one pixel
        (33, 18, 4),  # even window
        (16, 20, 2),
        (16, 20, 1),  # no room for a shift
    ],
)
def test_slow_formula(height: int, width: int, side: int) -> None:
    model = tiny(window_size=side)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(images)
        expected = [slow_swin(model, image) for image in images]
    for name, stride in (("stage0", 4), ("stage1", 8)):
        assert outputs[name].shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
        torch.testing.assert_close(outputs[name], torch.stack([e[name] for e in expected]), rtol=1e-9, atol=1e-9)


def test_images_are_independent() -> None:
    model = tiny()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        together = model(images)["stage1"]
        for index in range(3):
            torch.testing.assert_close(model(images[index : index + 1])["stage1"][0], together[index])


def test_every_parameter_learns() -> None:
    model = tiny()
    sum(
        feature.square().mean() for feature in model(torch.randn(1, 3, 40, 56, dtype=torch.float64)).values()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_of_attention() -> None:
    """The bias table and the added mask take part in the gradient as written."""
    attn = tiny().layers[0].blocks[0].attn
    mask = shifted_window_mask(6, 3, 3, 1, torch.float64, torch.device("cpu"))
    windows = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)

    def attend(windows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        parameters = {"relative_position_bias_table": table}
        return torch.func.functional_call(attn, parameters, (windows, mask)).sum(-1)

    table = attn.relative_position_bias_table.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(attend, (windows, table))


def test_windows_are_undone() -> None:
    x = torch.randn(2, 6, 9, 5)
    windows = window_partition(x, 3)
    assert windows.shape == (2, 6, 9, 5)
    torch.testing.assert_close(windows[1, 4], x[1, 3:6, 3:6].flatten(0, 1))
    torch.testing.assert_close(window_reverse(windows, 3, 6, 9), x)


def test_mask_of_a_single_window() -> None:
    """One row of cells a b c, rolled by one to b c a: a is apart from b and c."""
    mask = shifted_window_mask(3, 3, 3, 1, torch.float32, torch.device("cpu"))
    row = mask[0, :3, :3]
    torch.testing.assert_close(row, torch.tensor([[0.0, 0.0, -100.0], [0.0, 0.0, -100.0], [-100.0, -100.0, 0.0]]))


def test_relative_position_index() -> None:
    index = relative_position_index(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_drop_path_rates_grow_linearly_with_depth() -> None:
    model = SwinTransformer(**{**TINY, "drop_path_rate": 0.4})
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_config_and_output_shapes() -> None:
    cfg = querymask.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
    cfg.MODEL.SWIN.EMBED_DIM = 8
    cfg.MODEL.SWIN.DEPTHS = [1, 2, 1, 1]
    cfg.MODEL.SWIN.NUM_HEADS = [1, 2, 4, 8]
    cfg.MODEL.SWIN.OUT_FEATURES = ["stage1", "stage2"]
    model = build_backbone(cfg)
    assert isinstance(model, SwinTransformer)
    assert len(model.layers) == 3, "the stage beyond the last output is not built"
    assert model.size_divisibility == 0
    outputs = model(torch.randn(1, 3, 60, 90))
    assert {name: (shape.channels, shape.stride) for name, shape in model.output_shape().items()} == {
        "stage1": (16, 8),
        "stage2": (32, 16),
    }
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "stage1": (1, 16, 8, 12),
        "stage2": (1, 32, 4, 6),
    }
    assert {key for key in model.state_dict() if key.startswith("norm")} == {
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
    }
    assert not any("relative_position_index" in key for key in model.state_dict())


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
def test_frozen_stages_do_not_move_and_drop_nothing(freeze_at: int) -> None:
    cfg = querymask.get_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_swin_backbone", freeze_at
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.NUM_HEADS = 8, [2, 2, 2, 2], [1, 2, 4, 8]
    cfg.MODEL.SWIN.OUT_FEATURES, cfg.MODEL.SWIN.DROP_PATH_RATE = ["stage0", "stage3"], 0.9
    model = build_backbone(cfg).train()
    frozen = [f"{name}." for name in ("patch_embed", "layers.0", "layers.1", "layers.2")[:freeze_at]]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen)), name
    for name, module in model.named_modules():
        if isinstance(module, SwinBlock):
            assert module.training != f"{name}.".startswith(tuple(frozen)), name
    sum(output.sum() for output in model(torch.randn(1, 3, 64, 64)).values()).backward()
    assert all((p.grad is None) >= name.startswith(tuple(frozen)) for name, p in model.named_parameters())


@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_freezing_what_there_is_not(freeze_at: int) -> None:
    with pytest.raises(ValueError, match=f"FREEZE_AT is {freeze_at}; for a Swin of 4 stages it is 0"):
        SwinTransformer(**{**TINY, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "freeze_at": freeze_at})


def test_swin_t_has_the_published_size() -> None:
    """28.3 M with a classifier (paper, Table 1; published weights: 28,288,354), of which 769,000 are its last layer."""
    with torch.device("meta"):
        model = SwinTransformer()
    more_norms = 2 * (192 + 384)  # outputs of the second and third stage
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_288_354 - 769_000 + more_norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype: torch.dtype) -> None:
    model = tiny().float()
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        expected = model(images)["stage1"]
        with torch.autocast("cpu", dtype=dtype):
            actual = model(images)["stage1"]
    assert F.cosine_similarity(actual.float(), expected, dim=1).min() > 0.98


def test_compiles_in_one_graph() -> None:
    model = tiny(depths=(2, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(1, 3, 25, 43, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": (2,)}, "2 DEPTHS but 1 NUM_HEADS"),
        ({"out_features": ("stage2",)}, r"OUT_FEATURES is \['stage2'\]; choose from \['stage0', 'stage1'\]"),
        ({"out_features": ()}, "OUT_FEATURES is"),
        ({"num_heads": (2, 3)}, "stage1 has 16 channels, not a multiple of its 3 heads"),
        ({"drop_path_rate": 1.0}, "DROP_PATH_RATE is 1.0"),
    ],
)
def test_errors_name_the_setting(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**{**TINY, **overrides})
