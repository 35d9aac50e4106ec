"""Bipartite matching of predictions to targets (Carion et al. 2020, section 3.1).

Letters: N decoder layers, B images, Q queries, K classes, T largest number of targets of an image in the batch.
All layers and images are handled at once: targets are padded to T, and padding is left out of the assignment.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.utils.events import get_event_storage
from scipy.optimize import linear_sum_assignment

from querymask.common.compat import has_event_storage
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, Targets
from querymask.common.transfer import numbers_to_device


def pad_targets(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Concatenated targets (sum of counts, ...) -> (B, T, ...), zero on padding."""
    return torch.nn.utils.rnn.pad_sequence(values.split(list(counts)), batch_first=True)


def probability_cost(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Minus the probability of the target's class (Carion et al. 2020, equation 1).

    Args:
        probabilities: (N, B, Q, K).
        labels: (B, T).

    Returns:
        (N, B, Q, T).
    """
    return -probabilities.gather(-1, labels[None, :, None, :].expand(*probabilities.shape[:3], -1))


def focal_class_cost(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-8
) -> torch.Tensor:
    """Focal loss of the target's class as positive minus as negative (Zhu et al. 2021, appendix A.4).

    Args:
        logits: (N, B, Q, K).
        labels: (B, T).

    Returns:
        (N, B, Q, T).
    """
    index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
    p = full_precision(logits).gather(-1, index).sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + eps).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + eps).log()
    return positive - negative


def hungarian_assignment(terms: Mapping[str, torch.Tensor], targets: Targets) -> Assignment:
    """Assign every target of an image to one query at the least total cost, per layer.

    Args:
        terms: weighted cost terms by name, (N, B, Q, T) each; their sum is the cost.
        targets: of the batch. Where an image has more than Q, Q of them are matched.

    Raises:
        FloatingPointError: a cost is nan or infinite; names iteration, layer, image, cost term, and whether
            predictions or targets are at fault.
    """
    return hungarian_assignments([(terms, targets)])[0]


def hungarian_assignments(problems: Sequence[tuple[Mapping[str, torch.Tensor], Targets]]) -> list[Assignment]:
    """:func:`hungarian_assignment` of several problems, whose costs are copied to the host at once.

    Args:
        problems: one or more, each of terms and targets.
    """
    costs = [torch.stack([full_precision(term) for term in terms.values()]).sum(0) for terms, _ in problems]
    host = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
    return [
        _assign(terms, targets, values.view_as(cost).numpy(), cost.device)
        for (terms, targets), values, cost in zip(problems, host, costs, strict=True)
    ]


def _assign(
    terms: Mapping[str, torch.Tensor], targets: Targets, matrices: np.ndarray, device: torch.device
) -> Assignment:
    """The assignment at the costs (N, B, Q, T), on the device."""
    counts = targets.counts
    starts = targets.starts
    pairs: tuple[list[int], ...] = ([], [], [], [])
    for layer in range(len(matrices)):
        for b, count in enumerate(counts):
            matrix = matrices[layer, b, :, :count]
            if not np.isfinite(matrix).all():
                raise FloatingPointError(_describe(terms, targets, layer, b))
            rows, columns = linear_sum_assignment(matrix)
            pairs[0].extend([layer] * len(rows))
            pairs[1].extend([b] * len(rows))
            pairs[2].extend(rows.tolist())
            pairs[3].extend((columns + starts[b]).tolist())
    packed = numbers_to_device(pairs, torch.int64, device).view(4, -1)
    image_pairs = [min(count, matrices.shape[2]) for count in counts]
    return Assignment(*packed, num_layers=len(matrices), image_pairs=image_pairs)


def _describe(terms: Mapping[str, torch.Tensor], targets: Targets, layer: int, image: int) -> str:
    """Which cost is not finite, and whether a prediction or a target is at fault."""
    iteration = f"iteration {get_event_storage().iter}" if has_event_storage() else "outside of training"
    count = targets.counts[image]
    start = targets.starts[image]
    broken = ~torch.isfinite(targets.boxes[start : start + count]).all(1)
    culprits = []
    for name, term in terms.items():
        bad = ~torch.isfinite(term[layer, image, :, :count])
        at_fault = [f"target {t}" for t in (bad.any(0) & broken).nonzero().flatten().tolist()]
        if queries := int((bad & ~broken).any(1).sum()):
            at_fault.append(f"the predictions of {queries} of {len(bad)} queries")
        if at_fault:
            culprits.append(f"{name}: {' and '.join(at_fault)} at fault")
    name = targets.images[image] if targets.images else f"image {image} of the batch"
    return (
        f"{iteration}: the matching cost of decoder layer {layer} for {name} ({count} targets) is not finite. "
        f"{'; '.join(culprits) or 'the sum of the terms overflows'}. If a target is at fault, repair or drop its "
        "annotation. If predictions are, training has diverged: lower SOLVER.BASE_LR, check gradient clipping, or "
        "train without mixed precision."
    )
