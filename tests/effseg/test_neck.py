"""The pyramids: FPN against Detectron2's, further levels and the DeformEncoder against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from torch import Tensor

from querymask.effseg.neck import DeformEncoder, ExtendedFPN

CHANNELS = [8, 12, 16, 20]
SIZES = [(16, 24), (8, 12), (4, 6), (2, 3)]


def make_maps(sizes: list[tuple[int, int]] = SIZES, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
        for channels, size in zip(CHANNELS, sizes)
    ]


class Maps(Backbone):
    """A backbone that gives the maps that it is made of."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = {f"res{level}": feature for level, feature in enumerate(maps, 2)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=feature.shape[1], stride=2**level)
            for level, (name, feature) in enumerate(self.maps.items(), 2)
        }


def test_fpn_is_detectron2s() -> None:
    torch.manual_seed(0)
    neck, maps = ExtendedFPN(CHANNELS, 32, 4).double(), make_maps()
    other = FPN(Maps(maps), ["res2", "res3", "res4", "res5"], 32).double()
    state = {}
    for name, ours in (("lateral", neck.laterals), ("output", neck.outputs)):
        for level, conv in enumerate(ours, 2):
            for key, value in conv.state_dict().items():
                state[f"fpn_{name}{level}.{key}"] = value + 0.1  # biases too
    other.load_state_dict(state)
    for conv in [*neck.laterals, *neck.outputs]:
        conv.load_state_dict({key: value + 0.1 for key, value in conv.state_dict().items()})
    expected = other(torch.zeros(1))
    for level, actual in enumerate(neck(maps), 2):
        torch.testing.assert_close(actual, expected[f"p{level}"])


def test_further_levels() -> None:
    """The first is made of the lateral of the last map, the second of its rectified values."""
    torch.manual_seed(0)
    neck, maps = ExtendedFPN(CHANNELS, 32, 6).double(), make_maps()
    levels = neck(maps)
    assert [level.shape[2:] for level in levels] == [*SIZES, (1, 2), (1, 1)]
    lateral = neck.laterals[3](maps[3])
    p6 = F.conv2d(lateral, neck.outputs[4].weight, neck.outputs[4].bias, stride=2, padding=1)
    torch.testing.assert_close(levels[4], p6)
    p7 = F.conv2d(p6.clamp(min=0), neck.outputs[5].weight, neck.outputs[5].bias, stride=2, padding=1)
    torch.testing.assert_close(levels[5], p7)


def test_odd_sizes() -> None:
    """A finer cell takes the coarser one that covers it: cell floor(i * coarse / fine)."""
    sizes = [(11, 13), (6, 7), (3, 4), (2, 2)]
    neck, maps = ExtendedFPN(CHANNELS, 32, 4).double(), make_maps(sizes)
    for conv in neck.outputs:  # a level is what it was before the last convolution
        torch.nn.init.dirac_(conv.weight)
    expected = [lateral(feature) for lateral, feature in zip(neck.laterals, maps)]
    for fine in (2, 1, 0):
        (height, width), (rows, columns) = sizes[fine], sizes[fine + 1]
        y = [i * rows // height for i in range(height)]
        x = [i * columns // width for i in range(width)]
        expected[fine] = expected[fine] + expected[fine + 1][:, :, y][:, :, :, x]
    for actual, wanted in zip(neck(maps), expected):
        torch.testing.assert_close(actual, wanted)


def test_deform_encoder_without_layers() -> None:
    """What is around the encoder: projections, the finest level, last convolutions."""
    torch.manual_seed(0)
    neck, maps = DeformEncoder(CHANNELS, 32, 6, num_layers=0).double(), make_maps()
    encoded = neck.input_proj(maps[1:])
    assert [level.shape[2:] for level in encoded] == [*SIZES[1:], (1, 2), (1, 1)]
    p6 = F.conv2d(maps[3], neck.input_proj[3][0].weight, neck.input_proj[3][0].bias, stride=2, padding=1)
    torch.testing.assert_close(encoded[3], neck.input_proj[3][1](p6))
    fine = neck.fine[0]
    upsampled = F.interpolate(encoded[0], scale_factor=2, mode="bilinear", align_corners=False)
    joined = F.group_norm(F.conv2d(maps[0], fine.lateral[0].weight), 32) + upsampled
    joined = F.group_norm(F.conv2d(joined, fine.join[0].weight, padding=1), 32).relu()
    expected = [fine.projection(joined), *encoded]
    for actual, level, conv in zip(neck(maps), expected, neck.outputs, strict=True):
        torch.testing.assert_close(actual, conv(level))


def test_deform_encoder_orders_levels_from_coarse_to_fine() -> None:
    """Level embedding, attention weights and tokens begin with the coarsest level; results keep their places."""
    torch.manual_seed(0)
    neck, maps = DeformEncoder(CHANNELS, 32, 6, num_layers=1).double(), make_maps()
    seen = {}
    layer = neck.encoder.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, output=output))
    neck(maps)
    tokens, position, _, shapes, padding_mask = seen["inputs"]
    assert shapes == ((1, 1), (1, 2), (2, 3), (4, 6), (8, 12)) and padding_mask is None
    encoded = neck.input_proj(maps[1:])
    torch.testing.assert_close(tokens, torch.cat([x.flatten(2) for x in reversed(encoded)], 2).transpose(1, 2))
    # One cell: its number is 1 of 1, a whole turn for the first frequency of both axes
    single = position[0, 0] - neck.level_embed[0]
    torch.testing.assert_close(single[[0, 1, 16, 17]], torch.tensor([0.0, 1, 0, 1]).double(), atol=1e-5, rtol=0)
    parts = neck.encode(encoded)
    torch.testing.assert_close(parts[0].flatten(2).transpose(1, 2), seen["output"][:, -96:])
    torch.testing.assert_close(parts[4].flatten(2).transpose(1, 2), seen["output"][:, :1])


def test_deform_encoder_without_a_fine_level() -> None:
    neck = DeformEncoder(CHANNELS[1:], 32, 5, num_fine=0, num_layers=1).double()
    levels = neck(make_maps()[1:])
    assert [level.shape for level in levels] == [(2, 32, *size) for size in [*SIZES[1:], (1, 2), (1, 1)]]


@pytest.mark.parametrize("neck", [ExtendedFPN(CHANNELS, 32, 6), DeformEncoder(CHANNELS, 32, 6, num_layers=2)])
def test_every_parameter_has_a_gradient(neck: torch.nn.Module) -> None:
    neck = neck.double()
    sum((level**2).sum() for level in neck(make_maps())).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
