"""The two-dimensional cosine transform of masks."""

from functools import lru_cache

import torch

from querymask.common.mask_coding.base import MaskCoding
from querymask.common.precision import without_autocast


@lru_cache
def zigzag_order(size: int) -> tuple[tuple[int, int], ...]:
    """Cells (row, column) of a square in zig-zag order: (0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), ..."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    # Even diagonals rise (row falling), odd ones descend.
    return tuple(sorted(cells, key=lambda c: (c[0] + c[1], c[1] if (c[0] + c[1]) % 2 == 0 else c[0])))


class DCTMaskCoding(MaskCoding):
    """The lowest coefficients of the orthonormal two-dimensional DCT-II (SOLQ, section 3.3; Shen et al. 2021).

    Coefficients are neither centred nor scaled: a full mask of ones has the first one equal to ``mask_size``. Decoded
    maps are near 0 in the background and near 1 in the foreground, with ripples beyond. Autocast does not change the
    precision.

    Args:
        mask_size: side of the masks.
        length: number of coefficients, at most ``mask_size ** 2``.
    """

    def __init__(self, mask_size: int = 128, length: int = 256) -> None:
        super().__init__()
        if not 0 < length <= mask_size**2:
            raise ValueError(f"a {mask_size}x{mask_size} mask has {mask_size**2} DCT coefficients, not {length}")
        self.mask_size = mask_size
        self.length = length
        rows, columns = zip(*zigzag_order(mask_size)[:length], strict=True)
        # Only the first frequencies occur among the first coefficients: the products below stay small.
        self.extent = max(max(rows), max(columns)) + 1
        frequency = torch.arange(self.extent, dtype=torch.float64)[:, None]
        position = torch.arange(mask_size, dtype=torch.float64)[None, :]
        basis = (2 / mask_size) ** 0.5 * torch.cos((position + 0.5) * torch.pi * frequency / mask_size)
        basis[0] = (1 / mask_size) ** 0.5
        self.register_buffer("basis", basis.to(torch.get_default_dtype()), persistent=False)
        cells = torch.tensor(rows) * self.extent + torch.tensor(columns)
        self.register_buffer("cells", cells, persistent=False)

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, mask_size, mask_size) -> (n, length) in zig-zag order."""
        with without_autocast(masks.device):
            coefficients = self.basis @ masks.to(self.basis.dtype) @ self.basis.T
        return coefficients.flatten(1)[:, self.cells]

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, mask_size, mask_size)."""
        coefficients = vectors.new_zeros((len(vectors), self.extent**2))
        coefficients[:, self.cells] = vectors
        basis = self.basis.to(vectors.dtype)
        with without_autocast(vectors.device):
            return basis.T @ coefficients.view(-1, self.extent, self.extent) @ basis
