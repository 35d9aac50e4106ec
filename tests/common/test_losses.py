"""Losses against loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from querymask.common.losses import dice_loss


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
