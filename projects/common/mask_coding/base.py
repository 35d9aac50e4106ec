"""The interface of all mask codings."""

from abc import abstractmethod

import torch
from torch import nn


def binarize_at_half_range(maps: torch.Tensor) -> torch.Tensor:
    """Foreground is what lies above the middle between a map's minimum and maximum; a constant map is empty.

    Args:
        maps: (n, size, size).

    Returns:
        (n, size, size) bool.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return maps > (low + high) / 2


class MaskCoding(nn.Module):
    """A code of square masks.

    Attributes:
        mask_size: side of the masks.
        length: entries K of a vector.
        is_random: two calls of ``encode`` with the same masks differ.
        uses_batch_statistics: in training, codes and maps depend on the others of the same call, and calls leave
            traces (running statistics).
    """

    mask_size: int
    length: int
    is_random: bool = False
    uses_batch_statistics: bool = False

    @abstractmethod
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, mask_size, mask_size) bool or float -> (n, length)."""

    @abstractmethod
    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, mask_size, mask_size) soft maps; the coding's documentation tells their range."""

    def extra_repr(self) -> str:
        return f"mask_size={self.mask_size}, length={self.length}"


class MissingBasisError(ValueError):
    """A learned coding is used before its basis was loaded."""


class LearnedMaskCoding(MaskCoding):
    """A coding with a basis that is learned beforehand. Without one its constants are nan until a checkpoint is loaded.

    Subclasses name the tensor to look at in ``_witness``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checked = False

    @abstractmethod
    def _witness(self) -> torch.Tensor:
        """A tensor that is finite once the basis is there."""

    def require_basis(self) -> None:
        """Look once whether the basis is there.

        Raises:
            MissingBasisError: it is not.
        """
        if self._checked:
            return
        if not torch.isfinite(self._witness()).all():
            raise MissingBasisError(
                f"{type(self).__name__} has no basis yet. Make one with tools/fit_mask_basis.py (PCA, sparse) or "
                "tools/train_mask_autoencoder.py and name its file in MODEL.MASK_CODING.BASIS, or load a checkpoint "
                "that has one with MODEL.WEIGHTS."
            )
        self._checked = True


def fill_missing_bases(model: nn.Module) -> None:
    """Put ones where a learned coding has no basis yet: for measuring what a model costs, never for its results."""
    for module in model.modules():
        if isinstance(module, LearnedMaskCoding) and not torch.isfinite(module._witness()).all():
            for parameter in module.parameters():
                nn.init.ones_(parameter)
