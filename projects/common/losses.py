"""Losses, each as a value per instance: the caller sums and normalises. The focal loss is torchvision's."""

import math

import torch

PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)
"""Of every class at first, whose focal loss begins at a probability of 0.01 (Lin et al. 2017, section 3.3)."""


def dice_loss(
    probabilities: torch.Tensor, targets: torch.Tensor, squared: bool = True, smooth: float = 0.0, eps: float = 1e-5
) -> torch.Tensor:
    """1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth + eps), per instance.

    Args:
        probabilities, targets: (n, ...), reduced over all axes but the first.
        squared: squares in the denominator (Milletari et al. 2016) or plain sums.

    Returns:
        (n,)
    """
    p, t = probabilities.flatten(1), targets.flatten(1)
    denominator = (p**2).sum(1) + (t**2).sum(1) if squared else p.sum(1) + t.sum(1)
    return 1 - (2 * (p * t).sum(1) + smooth) / (denominator + smooth + eps)
