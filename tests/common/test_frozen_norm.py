"""Frozen batch norm with kept factors against Detectron2's."""

import copy

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from querymask.common.backbones.frozen_norm import KeptFrozenBatchNorm2d, keep_frozen_factors


class Operators(TorchDispatchMode):
    """Names of those that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names = [*getattr(self, "names", []), func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


def norms() -> tuple[nn.Module, nn.Module]:
    """Detectron2's, and the same with kept factors."""
    generator = torch.Generator().manual_seed(0)
    norm = FrozenBatchNorm2d(3, eps=1e-3)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return norm, keep_frozen_factors(nn.Sequential(copy.deepcopy(norm)))


def check(plain: nn.Module, kept: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(kept(x).square().sum(), x)
    assert torch.equal(kept(x), plain(x)) and kept(x).dtype == dtype and torch.equal(gradient, expected)
    assert torch.equal(kept(x.detach()), plain(x.detach()))


def test_is_detectron2s() -> None:
    plain, kept = norms()
    assert type(kept[0]) is KeptFrozenBatchNorm2d and list(kept[0].state_dict()) == list(plain.state_dict())
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        check(plain, kept, dtype)
    check(plain.double(), kept.double(), torch.float64)


def test_follows_its_buffers() -> None:
    plain, kept = norms()
    check(plain, kept)
    for norm in (plain, kept[0]):
        norm.running_var.mul_(2)
    check(plain, kept)
    values = {name: value + 1 for name, value in plain.state_dict().items()}
    for norm in (plain, kept[0]):
        norm.load_state_dict(values)
    check(plain, kept)
    for norm in (plain, kept[0]):
        norm.weight.data = norm.weight.data + 1  # as an average of weights is applied
    check(plain, kept)
    check(plain, copy.deepcopy(kept))


def test_makes_its_factors_once() -> None:
    _, kept = norms()
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    kept(x)
    with Operators() as operators:
        kept(x)
    assert operators.names == ["mul", "add"]
