"""Predicted boxes within their images, and the masks of targets there."""

import torch
from torch import Tensor

from querymask.common.masks import crop_masks
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, Predictions, Targets


def clipped_boxes(found: Predictions, image: Tensor, query: Tensor, layer: Tensor | int) -> Tensor:
    """Boxes (n, 4) x0, y0, x1, y1 in pixels of chosen queries (n,), cut off at the borders of their images."""
    assert found.canvas is not None
    boxes = full_precision(found.pixel_boxes(image, query, layer))
    return boxes.clamp(min=0).minimum(found.canvas.sides[image])


@torch.no_grad()
def crop_at_predictions(found: Predictions, targets: Targets, assignment: Assignment, size: int) -> Tensor:
    """The matched targets' masks, each inside of the clipped box of its query: (N * n, size, size) bool."""
    boxes = clipped_boxes(found, assignment.image, assignment.query, assignment.layer)
    # Pairs are ordered by layer and image, so an image's are a slice of every layer: nothing waits for the device
    layers, number = assignment.num_layers, assignment.pairs_per_layer()
    boxes, target = boxes.view(layers, number, 4), assignment.target.view(layers, number)
    crops, start, first = [], 0, 0
    for masks, pairs in zip(targets.masks, assignment.pairs_of_images(len(targets.masks)), strict=True):
        here = slice(start, start + pairs)
        own = crop_masks(masks, boxes[:, here].flatten(0, 1), size, (target[:, here] - first).flatten())
        crops.append(own.view(layers, pairs, size, size))
        start, first = here.stop, first + len(masks)
    return torch.cat(crops, dim=1).flatten(0, 1)
