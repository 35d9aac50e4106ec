"""Where queries look: reference points in the colour of the object that their masks cover (the paper's Figure 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from torch import nn

from querymask.common.views import register_view
from querymask.common.visualization import class_colour, draw_instances, drawing_scale
from querymask.isda.kernels import KernelBranch
from querymask.isda.masks import apply_kernels

OTHER_COLOUR = (150, 150, 150)


def assign_queries(masks: torch.Tensor, objects: torch.Tensor, min_iou: float = 0.5) -> torch.Tensor:
    """The object that each query's mask covers best.

    Args:
        masks: (Q, h, w) bool, of the queries.
        objects: (n, h, w) bool.
        min_iou: a mask that covers none so well belongs to no object.

    Returns:
        (Q,) index of the object, -1 for none.
    """
    if not len(objects):
        return torch.full((len(masks),), -1, device=masks.device)
    masks, objects = masks.flatten(1).float(), objects.flatten(1).float()
    intersection = masks @ objects.T
    iou = intersection / (masks.sum(1)[:, None] + objects.sum(1) - intersection).clamp(min=1)
    best, index = iou.max(1)
    return index.masked_fill(best < min_iou, -1)


@torch.no_grad()
def reference_points(
    model: nn.Module, item: Mapping[str, Any], score_threshold: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, Instances]:
    """Run an ISDA on one image.

    Args:
        model: ISDA in evaluation mode.
        item: the model's input, with ``image`` and, for another size of the masks, ``height`` and ``width``.
        score_threshold: detections from this score on are objects.

    Returns:
        points (Q, 2), x and y in [0, 1] of the image; objects (Q,), the row of the detections that each query's mask
        covers, or -1; the detections that are objects, on the CPU.
    """
    images = model.preprocess([item])
    predictions, kernels = model.predict(images)
    if not isinstance(model.mask_branch, KernelBranch):
        raise ValueError("this model makes its masks without kernels: set MODEL.MASK_BRANCH.NAME KernelBranch")
    size = (item.get("height", images.image_sizes[0][0]), item.get("width", images.image_sizes[0][1]))
    (found,) = model.detect(predictions, kernels, [size])
    found = found[found.scores >= score_threshold]
    masks = apply_kernels(kernels.kernels[-1, 0], kernels.features[0]) > 0
    objects = assign_queries(masks, masks[found.pred_queries])
    return predictions.positions()[-1, 0].cpu(), objects.cpu(), found.to("cpu")


def draw_reference_points(
    image: np.ndarray, points: torch.Tensor, objects: torch.Tensor, detections: Instances
) -> np.ndarray:
    """Draw objects, and over them a dot for every query.

    Args:
        image: uint8 [H, W, 3] RGB.
        points, objects, detections: as ``reference_points`` gives them, detections at the size of the image.

    Returns:
        uint8 [H', W', 3] RGB. Queries of no object are small grey dots.
    """
    shown = Instances(detections.image_size)
    shown.pred_masks = detections.pred_masks
    canvas = draw_instances(image, shown)
    height, width = canvas.shape[:2]
    radius = max(round(4 * drawing_scale(*image.shape[:2]) ** 0.5), 3)
    order = torch.argsort(objects)  # dots of objects over the others
    for (x, y), index in zip(points[order].tolist(), objects[order].tolist(), strict=True):
        centre = (round(x * width), round(y * height))
        if index < 0:
            cv2.circle(canvas, centre, max(radius // 2, 2), OTHER_COLOUR, cv2.FILLED, cv2.LINE_AA)
        else:
            cv2.circle(canvas, centre, radius + 1, (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
            cv2.circle(canvas, centre, radius, class_colour(index), cv2.FILLED, cv2.LINE_AA)
    return canvas


@register_view("reference_points", "ISDA")
def view_reference_points(
    model: nn.Module, item: dict[str, Any], image: np.ndarray, class_names: Sequence[str], score_threshold: float
) -> np.ndarray:
    """Objects, and over them a dot for every query; see ``querymask.common.views``."""
    return draw_reference_points(image, *reference_points(model, item, score_threshold))
