"""Where an EffSeg refines, and what it gains: the active cells of every stage (the paper's Figure 1), and the masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.views import register_view
from querymask.common.visualization import class_colour, contact_sheet, draw_instances, drawing_scale
from querymask.effseg.heads.effseg import EffSegHead, assemble_masks
from querymask.effseg.pasting import THRESHOLD, paste_probabilities
from querymask.effseg.regions import ROI_SIZE

OPACITY = 0.6
MIN_GRID = 5  # pixels: lines between smaller cells would hide the image


@dataclass(frozen=True)
class Refinement:
    """The objects of one image while they are refined, by descending score.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1 as shares of the image's width and height, not clipped.
        active: (n, S, S) bool for every stage, S doubling from one to the next: cells that the stage computes.
        masks: (n, S, S) probabilities after every stage.
    """

    boxes: Tensor
    active: list[Tensor]
    masks: list[Tensor]


@torch.no_grad()
def refinement(model: nn.Module, item: dict[str, Any], score_threshold: float = 0.3) -> Refinement:
    """Run an EffSeg on one image.

    All regions of the image compete for refinement, as at inference; those that are no object are left out afterwards.

    Args:
        model: EffSeg in evaluation mode, with the head "effseg".
        item: the model's input, with ``image``.
        score_threshold: queries of detections from this score on are objects.

    Returns:
        the objects, on the CPU.

    Raises:
        ValueError: the model has another segmentation head, or none.
    """
    head = getattr(model.mask_branch, "head", None)
    if not isinstance(head, EffSegHead):
        raise ValueError(
            f"only EffSeg's head refines in stages, this model has {type(head).__name__ if head else 'no such head'}: "
            "set MODEL.MASK_BRANCH.NAME EffSegBranch"
        )
    images = model.preprocess([item])
    height, width = images.image_sizes[0]
    predictions, pyramid = model.predict(images)
    (found,) = model.detect(predictions, pyramid, [(height, width)])
    # A query of several classes is one object; the detections are sorted
    queries = list(dict.fromkeys(found.pred_queries[found.scores >= score_threshold].tolist()))
    if not queries:
        sizes = [ROI_SIZE * 2**stage for stage in range(len(head.stages) + 1)]
        return Refinement(
            torch.zeros(0, 4),
            [torch.zeros(0, size, size, dtype=torch.bool) for size in sizes],
            [torch.zeros(0, size, size) for size in sizes],
        )
    selected = model.detector.select(predictions, 0, (height, width))
    _, all_queries, regions = model.mask_branch.regions(predictions, 0, selected)
    stages = head.refine(pyramid, predictions.canvas.size, regions)
    rows = torch.searchsorted(all_queries, all_queries.new_tensor(queries))
    active = []
    for stage in stages:
        marks = torch.zeros(stage.features.index_map.shape, dtype=torch.bool, device=rows.device)
        marks[stage.features.cells.long().unbind(1)] = True
        active.append(marks[rows].cpu())
    masks = [logits[rows].sigmoid().cpu() for logits in assemble_masks(stages)]
    sides = regions.boxes.new_tensor([width, height, width, height])
    return Refinement((regions.boxes[rows] / sides).cpu(), active, masks)


def draw_active_cells(image: np.ndarray, boxes: Tensor, active: Tensor) -> np.ndarray:
    """Draw boxes and the active cells in them, an object in its own colour.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the image.
        active: (n, S, S) bool.

    Returns:
        uint8 [H, W, 3] RGB: pixels whose centres are in an active cell are tinted.
    """
    canvas = image.copy()
    height, width = image.shape[:2]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in areas.argsort(descending=True).tolist():  # small ones stay visible
        box, marks, colour = boxes[index].double().numpy(), active[index].numpy(), np.array(class_colour(index))
        size, sides = len(marks), box[2:] - box[:2]
        if not (np.isfinite(box).all() and (sides > 0).all()):
            continue
        (xs, columns), (ys, rows) = (
            _cells_of_pixels(box[axis], sides[axis], size, extent) for axis, extent in ((0, width), (1, height))
        )
        if not (len(xs) and len(ys)):
            continue
        window = canvas[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        inside = marks[rows[:, None], columns]
        window[inside] = ((1 - OPACITY) * window[inside] + OPACITY * colour).astype(np.uint8)
        if sides.min() >= MIN_GRID * size:
            first = (np.diff(rows, prepend=rows[0]) > 0)[:, None] | (np.diff(columns, prepend=columns[0]) > 0)
            window[inside & first] = (0.6 * window[inside & first]).astype(np.uint8)
        corners = [(int(xs[i]), int(ys[i])) for i in (0, -1)]
        cv2.rectangle(canvas, *corners, class_colour(index))
    return canvas


def draw_refinement(image: np.ndarray, refined: Refinement) -> np.ndarray:
    """One picture: the active cells of every stage, and below them the masks after it.

    Args:
        image: uint8 [H, W, 3] RGB.
        refined: of ``refinement``, with the objects of this image.

    Returns:
        uint8 [H', W', 3] RGB. Masks are made at the size of the picture, so that fine ones are seen as such where
        images are small.
    """
    scale = drawing_scale(*image.shape[:2])
    width, height = (max(round(side * scale), 1) for side in (image.shape[1], image.shape[0]))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    boxes = refined.boxes * refined.boxes.new_tensor([width, height, width, height])
    panels, titles = [], []
    for stage, active in enumerate(refined.active):
        panels.append(draw_active_cells(image, boxes, active))
        share = f", {active.float().mean():.0%} active" if len(active) else ""
        titles.append(f"stage {stage}: {active.shape[1]} x {active.shape[2]} cells{share}")
    for stage, masks in enumerate(refined.masks):
        shown = Instances((height, width))
        shown.pred_masks = paste_probabilities(masks, boxes, (0, height), (0, width)) > THRESHOLD
        panels.append(draw_instances(image, shown))
        titles.append(f"masks after stage {stage}")
    return contact_sheet(panels, columns=len(refined.active), titles=titles)


@register_view("refinement", "EffSeg")
def view_refinement(
    model: nn.Module, item: dict[str, Any], image: np.ndarray, class_names: Sequence[str], score_threshold: float
) -> np.ndarray:
    """The active cells of every stage, and the masks coarse to fine; see ``querymask.common.views``."""
    return draw_refinement(image, refinement(model, item, score_threshold))


def _cells_of_pixels(start: float, side: float, size: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels below ``extent`` with centres from ``start`` to ``start + side``, and the cell of ``size`` of each."""
    first, last = np.clip(np.ceil(np.array([start, start + side]) - 0.5), 0, extent).astype(int)
    pixels = np.arange(first, last)
    return pixels, np.clip(((pixels + 0.5 - start) / side * size).astype(int), 0, size - 1)
