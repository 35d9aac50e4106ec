"""MLP, attention and level projections against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from querymask.common.layers import MLP, LevelProjections, SelfAttention


def test_mlp() -> None:
    torch.manual_seed(0)
    mlp = MLP(4, 6, 3, num_layers=3)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(6, 4), (6, 6), (3, 6)]
    x = torch.randn(2, 5, 4)
    expected = x
    for index, layer in enumerate(mlp.layers):
        expected = expected @ layer.weight.T + layer.bias
        if index < 2:
            expected = expected.clamp(min=0)
    assert torch.allclose(mlp(x), expected, atol=1e-4)
    assert (expected < 0).any(), "no ReLU after the last layer"
    assert len(MLP(4, 6, 3, num_layers=1).layers) == 1


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_self_attention(same: bool, dropout: float) -> None:
    """PyTorch's in numbers, random ones too, and in gradients."""
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, dropout).double()
    expected = torch.nn.MultiheadAttention(12, 3, dropout, batch_first=True).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    expected.load_state_dict(attention.state_dict())
    query, value = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    value = query if same else value
    torch.manual_seed(1)
    output = attention(query, value)
    torch.manual_seed(1)
    wanted = expected(query, query, value, need_weights=False)[0]
    assert torch.allclose(output, wanted, rtol=0, atol=1e-12) and output.shape == (2, 5, 12)
    assert output.stride() == wanted.stride()  # in whose order dropout draws
    output.square().sum().backward()
    wanted.square().sum().backward()
    for parameter, other in zip(attention.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-9, atol=1e-9)
    attention.eval()
    assert torch.equal(attention(query, value), attention(query, value))


def test_level_projections() -> None:
    """Extra levels: the first from the last backbone map, later ones from the level before."""
    torch.manual_seed(0)
    projections = LevelProjections([4, 8], width=64, num_levels=4)
    for parameter in projections.parameters():
        torch.nn.init.normal_(parameter)
    features = [torch.randn(2, 4, 16, 24), torch.randn(2, 8, 8, 12)]
    levels = projections(features)
    assert [tuple(level.shape) for level in levels] == [(2, 64, 16, 24), (2, 64, 8, 12), (2, 64, 4, 6), (2, 64, 2, 3)]
    sources = [features[0], features[1], features[1], levels[2]]
    for index, (source, level) in enumerate(zip(sources, levels, strict=True)):
        conv, norm = projections[index]
        stride, padding = (1, 0) if index < 2 else (2, 1)
        x = F.conv2d(source, conv.weight, conv.bias, stride=stride, padding=padding)
        groups = x.view(2, 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x)
        expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        assert torch.allclose(level, expected, atol=1e-4), f"level {index}"


def test_initialisation_of_level_projections() -> None:
    torch.manual_seed(0)
    for conv, norm in LevelProjections([16, 32], width=64, num_levels=3):
        fan = (conv.in_channels + conv.out_channels) * conv.weight[0, 0].numel()
        bound = (6 / fan) ** 0.5
        assert 0.98 * bound < conv.weight.abs().max() <= bound
        assert (conv.bias == 0).all() and (norm.weight == 1).all() and (norm.bias == 0).all()
    assert all(conv.bias is None for conv, _ in LevelProjections([16], width=32, num_levels=2, bias=False))


def test_impossible_level_projections() -> None:
    with pytest.raises(ValueError, match="2 feature levels for 3 backbone maps: name fewer maps in IN_FEATURES"):
        LevelProjections([4, 8, 16], width=32, num_levels=2)
    with pytest.raises(ValueError, match="width of the transformer, 48, must be a multiple of 32"):
        LevelProjections([4], width=48, num_levels=1)
    LevelProjections([4], width=48, num_levels=1, groups=16)
