"""From scores to detections."""

import torch


def select_top_scores(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (query, class) pairs of one image; a query may appear with several classes.

    Args:
        scores: (Q, K).
        count: how many, limited by Q * K.

    Returns:
        scores (n,) in descending order, queries (n,), classes (n,).
    """
    num_classes = scores.shape[1]
    best, index = scores.flatten().topk(min(count, scores.numel()))
    return best, torch.div(index, num_classes, rounding_mode="floor"), index % num_classes
