"""How far the detections of an exported model are from those of the model."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances

from querymask.common.detections import PanopticDetections

SCORE_LIMIT = 1e-4
MASK_LIMIT = 1e-3
"""Of the pixels of an image."""
AP_LIMIT = 0.1


@dataclass(frozen=True)
class Differences:
    """Of two lists of detections of the same images, where a detection is compared with its likest of the same class.

    Attributes:
        count: detections of the model.
        scores: the largest difference.
        boxes: in pixels.
        masks: the largest share of an image's pixels on which a mask differs.
        unpaired: detections without one of their class, and differences in number.
    """

    count: int = 0
    scores: float = 0.0
    boxes: float = 0.0
    masks: float = 0.0
    unpaired: int = 0

    def __or__(self, other: "Differences") -> "Differences":
        """Those of both."""
        return Differences(
            self.count + other.count,
            max(self.scores, other.scores),
            max(self.boxes, other.boxes),
            max(self.masks, other.masks),
            self.unpaired + other.unpaired,
        )

    @property
    def small(self) -> bool:
        """Whether the exported model is the model."""
        return self.scores <= SCORE_LIMIT and self.masks <= MASK_LIMIT and not self.unpaired


def detections_of(output: dict[str, Any]) -> Instances:
    """Those of a model's output for an image; of a panoptic map, its segments."""
    if "panoptic_seg" in output:
        return PanopticDetections.from_output(output["panoptic_seg"], ()).to_instances()
    return output["instances"]


def compare(expected: Instances, found: Instances) -> Differences:
    """Differences of the detections of an image.

    Equal scores come in no particular order, so what has the score of another is looked for among all of its class.

    Args:
        expected, found: on the CPU; of the model and of the exported one.
    """
    total = Differences(count=len(expected), unpaired=abs(len(expected) - len(found)))
    for row in range(len(expected)):
        candidates = (found.pred_classes == expected.pred_classes[row]).nonzero().flatten()
        if not len(candidates):
            total |= Differences(unpaired=1)
            continue
        scores = (found.scores[candidates] - expected.scores[row]).abs()
        near = candidates[scores <= max(SCORE_LIMIT, scores.min().item())]
        distances = torch.zeros(len(near))
        if expected.has("pred_masks"):
            masks = (found.pred_masks[near] != expected.pred_masks[row]).flatten(1).float().mean(1)
            distances = distances + masks
        if expected.has("pred_boxes"):
            boxes = (found.pred_boxes.tensor[near] - expected.pred_boxes.tensor[row]).abs().amax(1)
            distances = distances + boxes / max(expected.image_size)
        best = distances.argmin()
        total |= Differences(
            scores=(found.scores[near[best]] - expected.scores[row]).abs().item(),
            boxes=boxes[best].item() if expected.has("pred_boxes") else 0.0,
            masks=masks[best].item() if expected.has("pred_masks") else 0.0,
        )
    return total
