"""What ISTR's stages find."""

from dataclasses import dataclass, replace

from torch import Tensor

from querymask.common.precision import full_precision
from querymask.common.predictions import Predictions


@dataclass
class RecurrentPredictions(Predictions):
    """Of all stages; hidden states are the object features.

    Attributes:
        boxes: (N, B, Q, 4) x0, y0, x1, y1 in pixels of the network's input, not clipped.
    """

    boxes: Tensor = None  # type: ignore[assignment]  # dataclasses ask for a default behind defaults

    def relative_boxes(self) -> Tensor:
        """Boxes (N, B, Q, 4) relative to the images without padding."""
        assert self.canvas is not None
        return full_precision(self.boxes) / self.canvas.sides[:, None]

    def pixel_boxes(self, image: Tensor, query: Tensor, layer: Tensor | int = -1) -> Tensor:
        """See :class:`Predictions`."""
        return self.boxes[layer, image, query]

    def positions(self) -> Tensor:
        """Centres of the boxes (N, B, Q, 2), which learn nothing from where they are used."""
        boxes = self.relative_boxes().detach()
        return (boxes[..., :2] + boxes[..., 2:]) / 2

    def last(self) -> "RecurrentPredictions":
        """The last stage alone."""
        return replace(self, logits=self.logits[-1:], boxes=self.boxes[-1:], hidden=self.hidden[-1:])
