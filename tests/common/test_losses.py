"""Losses against torchvision and loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from querymask.common.losses import dice_loss, sigmoid_focal_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 2.0), (0.25, 1.5), (0.5, 0.0)])
def test_focal_loss(alpha: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64) * 3
    targets = (torch.rand(3, 4, 5) < 0.3).double()
    expected = torchvision_focal_loss(logits, targets, alpha, gamma)
    assert torch.allclose(sigmoid_focal_loss(logits, targets, alpha, gamma), expected, rtol=1e-12, atol=1e-15)
    if gamma:
        assert gradcheck(lambda x: sigmoid_focal_loss(x, targets, alpha, gamma), (logits.requires_grad_(),))


def test_focal_loss_of_extreme_logits() -> None:
    """Where a sigmoid is 0 or 1 in float32, the loss is still that of the formula, and has a gradient."""
    logits = torch.tensor([100.0, -100.0, 100.0, -100.0], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert loss.tolist() == pytest.approx([0, 25, 75, 0], abs=1e-6)
    loss.sum().backward()
    assert logits.grad.tolist() == pytest.approx([0, -0.25, 0.75, 0], abs=1e-6)


def slow_dice(p: list[float], t: list[float], squared: bool, smooth: float, eps: float) -> float:
    overlap = sum(a * b for a, b in zip(p, t, strict=True))
    sizes = math.fsum(a * a if squared else a for a in p) + math.fsum(b * b if squared else b for b in t)
    return 1 - (2 * overlap + smooth) / (sizes + smooth + eps)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_loss(squared: bool, smooth: float) -> None:
    torch.manual_seed(0)
    p = torch.rand(4, 3, 5, dtype=torch.float64)
    t = torch.rand(4, 3, 5, dtype=torch.float64).round()
    t[3] = 0
    loss = dice_loss(p, t, squared, smooth, eps=1e-3)
    assert loss.shape == (4,)
    for i in range(4):
        expected = slow_dice(p[i].flatten().tolist(), t[i].flatten().tolist(), squared, smooth, 1e-3)
        assert loss[i].item() == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda x: dice_loss(x, t, squared, smooth), (p.requires_grad_(),))


def test_dice_loss_at_its_ends() -> None:
    t = torch.zeros(2, 6, 6)
    t[0, :3] = 1
    assert dice_loss(t, t).tolist() == pytest.approx([0, 1], abs=1e-5)  # two empty masks have no overlap
    assert dice_loss(t, t, smooth=1.0)[1].item() == pytest.approx(0, abs=1e-4)  # unless smoothed
    assert dice_loss(1 - t[:1], t[:1]).item() == pytest.approx(1)
    assert dice_loss(t[:0], t[:0]).shape == (0,)
