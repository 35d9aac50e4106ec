"""Rows that belong together, found with a single wait for the device."""

import torch
from torch import Tensor


def group_rows(numbers: Tensor, count: int) -> list[Tensor]:
    """The rows of every number.

    One ``nonzero`` for each number would make the host wait for a GPU as often.

    Args:
        numbers: (n,) from 0 to ``count`` - 1.
        count: of groups.

    Returns:
        for every number the rows (n_i,) that have it, ascending.
    """
    sizes = (numbers[:, None] == torch.arange(count, device=numbers.device)).sum(0).tolist()
    return list(numbers.argsort(stable=True).split(sizes))
