"""What a Deformable DETR finds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from querymask.common.boxes import to_corners
from querymask.common.deformable_transformer import Proposals
from querymask.common.precision import full_precision
from querymask.common.predictions import Predictions, Targets


@dataclass
class DETRPredictions(Predictions):
    """Of all decoder layers. Letters as in ``common/predictions.py``; S tokens, L levels.

    Attributes:
        boxes: (N, B, Q, 4) cx, cy, w, h relative to the images without padding.
        references: of the layers, then what the last one makes of them: (B, Q, 2) or (B, Q, 4), in [0, 1].
        levels: (B, C, H_l, W_l), the projected maps.
        padding: (B, H_l, W_l) bool, true on padding.
        memory: (B, S, C) what the encoder makes of the levels.
        proposals: of the encoder, in the two-stage form.
    """

    boxes: Tensor = None  # type: ignore[assignment]  # dataclasses ask for a default behind defaults
    references: Sequence[Tensor] = ()
    levels: Sequence[Tensor] = ()
    padding: Sequence[Tensor] = ()
    memory: Tensor | None = None
    proposals: Proposals | None = None

    def pixel_boxes(self, image: Tensor, query: Tensor, layer: Tensor | int = -1) -> Tensor:
        """See :class:`Predictions`."""
        boxes = to_corners(full_precision(self.boxes[layer, image, query]))
        assert self.canvas is not None
        return boxes * self.canvas.sides[image]

    def positions(self) -> Tensor:
        """Centres of the boxes (N, B, Q, 2), which learn nothing from where they are used."""
        return full_precision(self.boxes.detach())[..., :2]

    def of_proposals(self, targets: Targets) -> tuple["DETRPredictions", Targets]:
        """The proposals as one layer's predictions, and targets whose class is always 0."""
        assert self.proposals is not None and self.memory is not None
        anything = replace(targets, labels=torch.zeros_like(targets.labels))
        found = DETRPredictions(self.proposals.logits[None], self.memory[None], boxes=self.proposals.boxes[None])
        return found, anything
