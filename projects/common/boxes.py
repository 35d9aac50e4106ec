"""Boxes and their overlaps, where torchvision's functions do not do. XYXY boxes are (x0, y0, x1, y1)."""

import torch
from detectron2.structures import Boxes

from querymask.common.ops.exporting import exportable


def unrounded_boxes(boxes: torch.Tensor) -> Boxes:
    """Detectron2's boxes (n, 4) XYXY in the tensor's own precision; its constructor rounds to float32."""
    result = Boxes(boxes)
    result.tensor = boxes
    return result


def _clip_without_looking(boxes: Boxes, size: tuple[int, int]) -> None:
    height, width = size
    limits = torch.tensor([width, height] * 2, dtype=boxes.tensor.dtype, device=boxes.device)
    boxes.tensor = torch.minimum(boxes.tensor.clamp(min=0), limits)


@exportable(_clip_without_looking)
def clip_boxes(boxes: Boxes, size: tuple[int, int]) -> None:
    """Detectron2's ``Boxes.clip`` to an image (height, width), in place; boxes that are not finite are an error."""
    boxes.clip(size)


def to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1): (..., 4); torchvision's ``box_convert`` with half as many operators."""
    centres, halves = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat((centres - halves, centres + halves), dim=-1)


def to_centres(boxes: torch.Tensor) -> torch.Tensor:
    """(x0, y0, x1, y1) -> (cx, cy, w, h): (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def area(sides: torch.Tensor) -> torch.Tensor:
    """Width times height: (..., 2) -> (...). The gradient of ``prod`` would look for zeros, which makes a GPU wait."""
    return sides[..., 0] * sides[..., 1]


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of XYXY boxes (Rezatofighi et al. 2019), element by element with broadcasting.

    ``generalized_iou(a[..., :, None, :], b[..., None, :, :])`` is the pairwise form. Two empty boxes at one place
    give nan, as 0 / 0 has no value.

    Args:
        a, b: (..., 4).

    Returns:
        (...), in [-1, 1].
    """
    a_low, a_high, b_low, b_high = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]
    intersection = area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    hull = area((torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).clamp(min=0))
    union = area(a_high - a_low) + area(b_high - b_low) - intersection
    return intersection / union - (hull - union) / hull


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Logit of x, with x and 1 - x kept at or above ``eps``: within +-11.5 for the default."""
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
