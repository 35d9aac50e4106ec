"""Losses, each as a value per element or per instance: the caller sums and normalises."""

import math

import torch
import torch.nn.functional as F

PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)
"""Of every class at first, whose focal loss begins at a probability of 0.01 (Lin et al. 2017, section 3.3)."""


def sigmoid_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Focal loss of independent binary classifiers (Lin et al. 2017, equation 5).

    Args:
        logits: any shape, before the sigmoid.
        targets: same shape, 0 or 1.
        alpha: weight of the positives; 1 - alpha is that of the negatives.

    Returns:
        Same shape.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets  # 1 - p where the target is 1, p elsewhere
    weight = (1 - alpha) + (2 * alpha - 1) * targets
    return weight * cross_entropy * miss**gamma


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
