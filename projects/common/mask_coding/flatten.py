"""The mask itself as its code."""

import torch

from querymask.common.mask_coding.base import MaskCoding
from querymask.common.mask_coding.pca import label_logits


class FlattenMaskCoding(MaskCoding):
    """Pixels in row-major order; K is ``mask_size ** 2`` (ISTR, Table 1a, l = 784).

    Args:
        mask_size: side of the masks.
        logits: vectors are logits of foreground, and decoded maps probabilities; else both are the pixels themselves.
    """

    def __init__(self, mask_size: int = 28, logits: bool = False) -> None:
        super().__init__()
        self.mask_size = mask_size
        self.length = mask_size**2
        self.logits = logits

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, mask_size, mask_size) -> (n, length): 0 or 1, or with ``logits`` -3.66 or 3.66 (2.5 % and 97.5 %)."""
        pixels = masks.flatten(1).to(torch.get_default_dtype())
        return label_logits(pixels) if self.logits else pixels

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, mask_size, mask_size)."""
        maps = vectors.sigmoid() if self.logits else vectors
        return maps.view(-1, self.mask_size, self.mask_size)
