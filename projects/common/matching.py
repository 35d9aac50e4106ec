"""Bipartite matching of predictions to targets (Carion et al. 2020, section 3.1).

Letters: N decoder layers, B images, Q queries, K classes, T largest number of targets of an image in the batch.
All layers and images are handled at once: targets are padded to T, and padding is left out of the assignment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils.events import get_event_storage
from scipy.optimize import linear_sum_assignment

from querymask.common.compat import has_event_storage


@dataclass
class Assignment:
    """Pairs of queries and targets, for all layers and images.

    Every layer matches the same number n of pairs; pairs are ordered by layer, image and query, so a vector over
    pairs viewed as (N, n) has a row per layer.

    Attributes:
        layer, image, query: (N * n,) indices of the prediction.
        target: (N * n,) index among the concatenated targets of the batch.
        num_layers: N.
    """

    layer: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor
    num_layers: int

    def pairs_per_layer(self) -> int:
        """n."""
        return len(self.layer) // self.num_layers

    def select(self, predictions: torch.Tensor) -> torch.Tensor:
        """(N, B, Q, ...) -> (N * n, ...)."""
        return predictions[self.layer, self.image, self.query]

    def sum_layers(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the pairs of a layer: (N * n,) -> (N,)."""
        return values.view(self.num_layers, -1).sum(1)


def pad_targets(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Concatenated targets (sum of counts, ...) -> (B, T, ...), zero on padding."""
    return torch.nn.utils.rnn.pad_sequence(values.split(list(counts)), batch_first=True)


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """At least float32: costs and losses are not for half precision."""
    return x if x.dtype == torch.float64 else x.float()


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


def hungarian_assignment(
    terms: Mapping[str, torch.Tensor], counts: Sequence[int], images: Sequence[str] | None = None
) -> Assignment:
    """Assign every target of an image to one query at the least total cost, per layer.

    Args:
        terms: weighted cost terms by name, (N, B, Q, T) each; their sum is the cost.
        counts: number of targets of every image. Where it exceeds Q, Q of them are matched.
        images: how to name the images in an error.

    Raises:
        FloatingPointError: a cost is nan or infinite; names iteration, layer, image and cost term.
    """
    cost = torch.stack([full_precision(term) for term in terms.values()]).sum(0)
    device = cost.device
    num_layers, batch, num_queries, _ = cost.shape
    matrix = cost.cpu().numpy()
    offsets = [sum(counts[:b]) for b in range(batch)]
    columns: tuple[list[int], ...] = ([], [], [], [])
    for layer in range(num_layers):
        for b, count in enumerate(counts):
            if not count:
                continue
            try:
                queries, targets = linear_sum_assignment(matrix[layer, b, :, :count])
            except ValueError:  # scipy refuses nan, and infinities that leave no assignment
                queries = None
            if queries is None or not torch.isfinite(torch.from_numpy(matrix[layer, b, :, :count])).all():
                raise FloatingPointError(_describe(terms, layer, b, count, images))
            columns[0].extend([layer] * len(queries))
            columns[1].extend([b] * len(queries))
            columns[2].extend(queries.tolist())
            columns[3].extend((targets + offsets[b]).tolist())
    packed = torch.tensor(columns, dtype=torch.int64).view(4, -1).to(device)
    return Assignment(*packed, num_layers=num_layers)


def _describe(
    terms: Mapping[str, torch.Tensor], layer: int, image: int, count: int, images: Sequence[str] | None
) -> str:
    """Which cost is not finite, and whether a prediction or a target is at fault."""
    iteration = f"iteration {get_event_storage().iter}" if has_event_storage() else "outside of training"
    culprits = []
    for name, term in terms.items():
        bad = ~torch.isfinite(term[layer, image, :, :count])
        if bad.any():
            all_of_target = bad.all(0).nonzero().flatten().tolist()
            all_of_query = bad.all(1).nonzero().flatten().tolist()
            if all_of_target and len(all_of_target) < count:
                where = f"target {all_of_target[0]} is at fault (a degenerate annotation?)"
            elif all_of_query:
                where = f"the predictions of {len(all_of_query)} of {len(bad)} queries are at fault"
            else:
                where = f"{int(bad.sum())} entries"
            culprits.append(f"{name}: {where}")
    name = images[image] if images else f"image {image} of the batch"
    return (
        f"{iteration}: the matching cost of decoder layer {layer} for {name} ({count} targets) is not finite. "
        f"{'; '.join(culprits) or 'the sum of the terms overflows'}. If predictions are at fault, training has "
        "diverged: lower SOLVER.BASE_LR, check gradient clipping, or train without mixed precision."
    )
