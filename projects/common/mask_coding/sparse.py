"""Masks as sums of few atoms of a learned dictionary (SOLQ, Table 3a, "sparse coding")."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from querymask.common.mask_coding.base import LearnedMaskCoding
from querymask.common.precision import without_autocast

ITERATIONS = 500
_STEP_SLACK = 1.001  # covers the rounding of the largest eigenvalue


def lasso(signals: torch.Tensor, dictionary: torch.Tensor, penalty: torch.Tensor, iterations: int) -> torch.Tensor:
    """The v that minimise |x - v D|^2 / 2 + penalty |v|_1, by accelerated proximal gradients.

    The method is Beck and Teboulle's (FISTA, 2009); the momentum of a signal starts anew where it points uphill
    (O'Donoghue and Candes 2015), which makes convergence linear in the end. Nothing waits for the device but one
    eigenvalue.

    Args:
        signals: (n, P).
        dictionary: (K, P).
        penalty: scalar, not negative.
        iterations: fixed number.

    Returns:
        (n, K), most entries exactly zero if the penalty is large.
    """
    gram = dictionary @ dictionary.T
    correlations = signals @ dictionary.T
    step = 1 / (torch.linalg.eigvalsh(gram)[-1] * _STEP_SLACK)
    codes = ahead = torch.zeros_like(correlations)
    time = correlations.new_ones(len(signals), 1)
    for _ in range(iterations):
        new = ahead - step * (ahead @ gram - correlations)
        new = new.sign() * (new.abs() - step * penalty).clamp(min=0)
        restart = ((ahead - new) * (new - codes)).sum(1, keepdim=True) > 0
        next_time = (1 + (1 + 4 * time**2).sqrt()) / 2
        momentum = torch.where(restart, 0, (time - 1) / next_time)
        ahead = new + momentum * (new - codes)
        time = torch.where(restart, 1, next_time)
        codes = new
    return codes


@dataclass
class SparseBasis:
    """What ``tools/fit_mask_basis.py --method sparse`` writes.

    Attributes:
        dictionary: (K, S * S), rows of length 1.
        penalty: weight of |v|_1, with which it was learned.
    """

    dictionary: np.ndarray
    penalty: float

    def save(self, path: str | os.PathLike[str], **statistics: np.ndarray | float | int | str) -> None:
        """Write float32 arrays, and further entries under their names."""
        with open(path, "wb") as file:
            np.savez(
                file, dictionary=self.dictionary.astype(np.float32), penalty=np.float32(self.penalty), **statistics
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparseBasis":
        """Read a file of ``save``.

        Raises:
            ValueError: the file is not one.
        """
        try:
            with np.load(path) as file:
                return cls(file["dictionary"], float(file["penalty"]))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is not a dictionary of masks ({error}): make one with tools/fit_mask_basis.py --method sparse"
            ) from error


class SparseMaskCoding(LearnedMaskCoding):
    """Coefficients of a Lasso on the atoms of a dictionary.

    ``encode``: the v that minimises |x - v D|^2 / 2 + penalty |v|_1 for the pixels x, 0 or 1; ``decode``: v D, near 0
    in the background and near 1 in the foreground. The constants are parameters without gradient, so that checkpoints
    hold them. Autocast does not change the precision.

    Args:
        mask_size: side S of the masks.
        length: number of atoms K; may exceed S * S.
        basis: None leaves the constants nan until a checkpoint is loaded.
        iterations: of ``lasso``.
    """

    def __init__(
        self, mask_size: int = 28, length: int = 256, basis: SparseBasis | None = None, iterations: int = ITERATIONS
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"a dictionary of masks has at least one atom, not {length}")
        self.mask_size = mask_size
        self.length = length
        self.iterations = iterations
        shape = (length, mask_size**2)
        if basis is not None and basis.dictionary.shape != shape:
            raise ValueError(
                f"the dictionary has shape {basis.dictionary.shape}, but vectors of {length} for masks of "
                f"{mask_size}x{mask_size} need {shape}: set length and size of the config to those of the dictionary, "
                "or fit another one"
            )
        nan = torch.tensor(float("nan"))
        self.dictionary = nn.Parameter(nan.expand(shape).clone(), requires_grad=False)
        self.penalty = nn.Parameter(nan.clone(), requires_grad=False)
        if basis is not None:
            self.dictionary.data.copy_(torch.from_numpy(np.ascontiguousarray(basis.dictionary)))
            self.penalty.data.fill_(basis.penalty)

    def _witness(self) -> torch.Tensor:
        return self.dictionary

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, S, S) -> (n, K)."""
        self.require_basis()
        pixels = masks.flatten(1).to(self.dictionary.dtype)
        if not len(pixels):
            return pixels.new_zeros((0, self.length))
        with without_autocast(masks.device):
            return lasso(pixels, self.dictionary, self.penalty, self.iterations)

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, K) -> (n, S, S)."""
        self.require_basis()
        with without_autocast(vectors.device):
            return (vectors @ self.dictionary.to(vectors.dtype)).view(-1, self.mask_size, self.mask_size)
