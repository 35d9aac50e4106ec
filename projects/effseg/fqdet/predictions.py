"""What FQDet finds, and how it is matched."""

from dataclasses import dataclass

from torch import Tensor

from querymask.common.predictions import Assignment, Predictions


@dataclass(kw_only=True)
class FQDetPredictions(Predictions):
    """In full precision, of the one layer that has heads.

    Attributes:
        logits: (1, B, Q, K + 1); the last class is "no object".
        hidden: (1, B, Q, C) queries after the last layer.
        selection_logits: (B, A) of the anchors.
        anchors: (A, 4) cx, cy, w, h in pixels, those of every image.
        selected: (B, Q) numbers of the queries' anchors, ascending.
        deltas: (B, Q, 4) from the anchors.
        boxes: (B, Q, 4) x0, y0, x1, y1 in pixels, not clipped.
    """

    selection_logits: Tensor
    anchors: Tensor
    selected: Tensor
    deltas: Tensor
    boxes: Tensor

    @property
    def query_anchors(self) -> Tensor:
        """(B, Q, 4) cx, cy, w, h in pixels."""
        return self.anchors[self.selected]

    def pixel_boxes(self, image: Tensor, query: Tensor, layer: Tensor | int = -1) -> Tensor:
        """See :class:`Predictions`."""
        return self.boxes[image, query]

    def positions(self) -> Tensor:
        """Centres of the boxes (1, B, Q, 2), which learn nothing from where they are used."""
        assert self.canvas is not None
        boxes = self.boxes.detach() / self.canvas.sides[:, None]
        return ((boxes[..., :2] + boxes[..., 2:]) / 2)[None]


@dataclass(frozen=True, kw_only=True)
class FQDetAssignment(Assignment):
    """Of one layer; several queries may have the same target.

    Attributes:
        selection: (B, A), 1 for the anchors that are to be selected.
    """

    selection: Tensor
