"""Structure-preserving sparsity (SPS; Picron and Tuytelaars, EffSeg, https://arxiv.org/abs/2307.01545, Figure 2).

Feature maps that are refined where it counts, and still know their neighbours everywhere.

Shape letters: R regions of H x W cells, N_A active and N_P passive features, F channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from querymask.common.ops import sparse_conv2d
from querymask.common.ops.sps.reference import as_pair, neighbour_rows


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` highest scores, or all if there are no more.

    Args:
        scores: [N_A], of any regions together.
        count: how many to keep.

    Returns:
        [N_A] booleans.
    """
    if len(scores) <= count:
        return torch.ones_like(scores, dtype=torch.bool)
    kept = scores.topk(count).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, kept, 1)  # a trace knows no scatter of True


@dataclass(frozen=True)
class SparseMap:
    """Feature maps of R regions, of which each active cell has a feature of its own and passive cells share theirs.

    Processing runs on active features alone. A cell that is left behind keeps its feature and becomes passive; when
    the map gets finer, a passive feature fills a block of cells without being copied, and an active one becomes four.
    Every method returns a new map; what does not change is shared with the old one.

    A region of 2 x 2 cells, whose upper right cell counts (the others are passive from then on)::

        >>> sparse = SparseMap.from_dense(torch.tensor([[[[10., 20.], [30., 40.]]]]))
        >>> sparse = sparse.split(torch.tensor([False, True, False, False]))
        >>> sparse.active.tolist(), sparse.passive.tolist()
        ([[20.0]], [[10.0], [30.0], [40.0]])
        >>> sparse.index_map.tolist()  # 0 is the active feature, from 1 on come the passive ones
        [[[1, 0], [2, 3]]]

    Twice as fine, the active cell has become four, and each passive feature fills a block of four cells::

        >>> sparse = sparse.upsample()
        >>> sparse = sparse.replace_active(sparse.active + torch.tensor([[1.], [2.], [3.], [4.]]))
        >>> sparse.cells.tolist()  # (region, y, x)
        [[0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3]]
        >>> print(sparse.index_map[0].numpy())
        [[4 4 0 1]
         [4 4 2 3]
         [5 5 6 6]
         [5 5 6 6]]
        >>> print(sparse.dense()[0, 0].numpy())
        [[10. 10. 21. 22.]
         [10. 10. 23. 24.]
         [30. 30. 40. 40.]
         [30. 30. 40. 40.]]

    A convolution gives outputs to the active cells only, and sees all their neighbours::

        >>> sparse.conv2d(torch.ones(1, 1, 3, 3), None).tolist()  # the first: 10 + 21 + 22 + 10 + 23 + 24, zeros above
        [[110.0], [90.0], [220.0], [170.0]]

    Attributes:
        active: [N_A, F] active features.
        passive: [N_P, F] passive features, each stored once.
        index_map: [R, H, W] in int32: below N_A the row of an active feature, which no other cell has, else N_A plus
            the row of a passive one.
        cells: [N_A, 3] in int32: (region, y, x) of each active feature.
    """

    active: Tensor
    passive: Tensor
    index_map: Tensor
    cells: Tensor

    @classmethod
    def from_dense(cls, features: Tensor) -> "SparseMap":
        """A map whose cells are all active, in the order of regions, rows and columns.

        Args:
            features: [R, F, H, W].
        """
        if features.dim() != 4:
            raise ValueError(f"features must be [R, F, H, W], got shape {list(features.shape)}")
        regions, channels, height, width = features.shape
        active = features.permute(0, 2, 3, 1).reshape(-1, channels)
        index_map = torch.arange(len(active), dtype=torch.int32, device=features.device).view(regions, height, width)
        axes = [torch.arange(size, dtype=torch.int32, device=features.device) for size in index_map.shape]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
        return cls(active, active.new_empty(0, channels), index_map, cells)

    @property
    def features(self) -> Tensor:
        """[N_A + N_P, F]: the rows that ``index_map`` counts."""
        return torch.cat([self.active, self.passive])

    def split(self, keep: Tensor) -> "SparseMap":
        """Makes active features passive; they keep their values and places.

        The remaining active ones keep their order, and so do the passive ones, which the new ones follow.

        Args:
            keep: [N_A] booleans: which stay active.
        """
        num_active = len(self.active)
        if keep.dtype != torch.bool or list(keep.shape) != [num_active]:
            raise ValueError(f"keep must be [{num_active}] booleans, got shape {list(keep.shape)} of {keep.dtype}")
        return self._split(keep, int(keep.sum()))

    def split_highest(self, scores: Tensor, count: int) -> "SparseMap":
        """:meth:`split` that keeps the ``count`` active features of the highest scores, or all if there are no more.

        Shapes depend on no values, so a GPU is not waited for, and ``torch.export`` can follow.

        Args:
            scores: [N_A].
            count: how many stay active.
        """
        if list(scores.shape) != [len(self.active)]:
            raise ValueError(f"scores must be [{len(self.active)}], got shape {list(scores.shape)}")
        return self._split(keep_highest(scores, count), min(count, len(self.active)))

    def _split(self, keep: Tensor, num_kept: int) -> "SparseMap":
        num_active, num_passive = len(self.active), len(self.passive)
        rank = torch.where(keep, keep.cumsum(0) - 1, num_kept + (~keep).cumsum(0) - 1)
        order = torch.empty_like(rank).scatter_(0, rank, torch.arange(num_active, device=keep.device))
        kept, left = order[:num_kept], order[num_kept:]
        passive = torch.cat([self.passive, self.active.index_select(0, left)])
        new_rows = torch.cat(
            [
                torch.where(keep, rank, rank + num_passive),
                torch.arange(num_kept, num_kept + num_passive, device=keep.device),
            ]
        ).int()
        index_map = new_rows.index_select(0, self.index_map.flatten()).view_as(self.index_map)
        return SparseMap(self.active.index_select(0, kept), passive, index_map, self.cells.index_select(0, kept))

    def upsample(self) -> "SparseMap":
        """Makes the map twice as fine: each active cell becomes four, a passive feature fills four times its cells.

        Active feature i becomes the rows 4i to 4i + 3, copies of it, for the upper left, upper right, lower left and
        lower right child.
        """
        num_active, device = len(self.active), self.index_map.device
        child = torch.arange(4, dtype=torch.int32, device=device)  # of cell (y, x): 2 * (y % 2) + x % 2
        region, y, x = (value[:, None].expand(-1, 4) for value in self.cells.unbind(1))
        cells = torch.stack([region, 2 * y + (child >> 1), 2 * x + (child & 1)], -1).view(-1, 3)
        regions, height, width = self.index_map.shape
        parents = self.index_map.view(regions, height, 1, width, 1)
        index_map = torch.where(parents < num_active, 4 * parents + child.view(2, 1, 2), parents + 3 * num_active)
        index_map = index_map.view(regions, 2 * height, 2 * width)
        active = self.active[:, None].expand(-1, 4, -1).flatten(0, 1)
        return SparseMap(active, self.passive, index_map, cells)

    def replace_active(self, active: Tensor) -> "SparseMap":
        """The same map with other active features [N_A, F]."""
        return self.replace_features(active, self.passive)

    def replace_features(self, active: Tensor, passive: Tensor) -> "SparseMap":
        """The same map with other features [N_A, F'] and [N_P, F']."""
        for name, new, old in (("active", active, self.active), ("passive", passive, self.passive)):
            if new.dim() != 2 or len(new) != len(old) or new.shape[1] != active.shape[1]:
                raise ValueError(
                    f"{name} must be [{len(old)}, {active.shape[-1]}], with active's channels, got {list(new.shape)}"
                )
        return replace(self, active=active, passive=passive)

    def gather(self, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1) -> Tensor:
        """The neighbours of all active cells, for what is no convolution.

        Args:
            kernel_size: odd, as one number or (vertical, horizontal).
            dilation: likewise.

        Returns:
            [N_A, kH*kW, F], taps row-major, zeros beyond the border of a region.
        """
        features = self.features
        rows = neighbour_rows(self.index_map, self.cells, as_pair(kernel_size), as_pair(dilation), len(features))
        return torch.cat([features, features.new_zeros(1, features.shape[1])])[rows]

    def conv2d(self, weight: Tensor, bias: Tensor | None, dilation: int | Sequence[int] = 1) -> Tensor:
        """Returns the outputs of the active cells, [N_A, C_out]. See :func:`querymask.common.ops.sparse_conv2d`."""
        return sparse_conv2d(self.features, self.index_map, self.cells, weight, bias, dilation)

    def dense(self) -> Tensor:
        """The map as [R, F, H, W], where every cell has a copy of its feature."""
        return self.features[self.index_map.long()].permute(0, 3, 1, 2)
