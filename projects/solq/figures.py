"""What the coefficients of SOLQ's mask vectors add to a mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import nn

from querymask.common.views import register_view
from querymask.common.visualization import contact_sheet, draw_instances
from querymask.solq.vectors import VectorBranch

COUNTS = (16, 64, 256)


@torch.no_grad()
def detections_by_coefficients(
    model: nn.Module, item: dict[str, Any], counts: Sequence[int] = COUNTS
) -> dict[int, Instances]:
    """Detections of a SOLQ whose masks are decoded from the first coefficients alone, the others being zero.

    Args:
        model: SOLQ in evaluation mode, with a mask branch.
        item: the model's input, with ``height`` and ``width`` of the detections.
        counts: how many; those beyond the vectors' length become the length.

    Returns:
        detections by number of coefficients, ascending.

    Raises:
        ValueError: the model predicts no mask vectors.
    """
    branch = model.mask_branch
    if not isinstance(branch, VectorBranch):
        raise ValueError("this model has no mask vectors: set MODEL.MASK_BRANCH.NAME VectorBranch")
    found, made = model.predict(model.preprocess([item]))
    length = branch.coding.length
    results = {}
    for count in sorted({min(count, length) for count in counts}):

        def truncate(module: nn.Module, arguments: Any, vectors: torch.Tensor, count: int = count) -> torch.Tensor:
            return torch.cat((vectors[..., :count], torch.zeros_like(vectors[..., count:])), dim=-1)

        handle = branch.head(-1).register_forward_hook(truncate)
        try:
            (results[count],) = model.detect(found, made, [(item["height"], item["width"])])
        finally:
            handle.remove()
    return results


@register_view("coefficients", "SOLQ")
def view_coefficients(
    model: nn.Module, item: dict[str, Any], image: np.ndarray, class_names: Sequence[str], score_threshold: float
) -> np.ndarray:
    """Masks from 16, 64 and 256 coefficients beside each other; see ``querymask.common.views``."""
    panels, titles = [], []
    for count, found in detections_by_coefficients(model, item).items():
        found = found[found.scores >= score_threshold].to("cpu")
        panels.append(draw_instances(image, found, class_names))
        titles.append(f"{count} coefficients")
    return contact_sheet(panels, columns=len(panels), titles=titles)
