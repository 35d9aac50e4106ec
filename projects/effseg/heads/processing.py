"""What a stage of EffSeg does with its active cells (https://arxiv.org/abs/2307.01545, section 3.3 and Table 5).

Each module maps a :class:`SparseMap` with F channels to new features of its active cells (N_A, F). All but the MLP see
the neighbours of a cell, passive ones as they are. No norms, no residuals.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from querymask.common.ops import deformable_sparse_conv2d, multi_dilation_sparse_conv2d
from querymask.common.sps import SparseMap

MLP_RATIO = 4
KERNEL_SIZE = 3


class Convolution(nn.Module):
    """3x3 convolution, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, KERNEL_SIZE)  # holds the weights, at their usual initial values

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        return sparse.conv2d(self.conv.weight, self.conv.bias).relu()


class DeformableConvolution(nn.Module):
    """3x3 deformable convolution, ReLU; its offsets are those of a 3x3 convolution, zero at first.

    The release has no such module, and the paper describes it by its name: this is the first version of Dai et al.
    (https://arxiv.org/abs/1703.06211).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(width, 2 * KERNEL_SIZE**2, KERNEL_SIZE)
        self.conv = nn.Conv2d(width, width, KERNEL_SIZE)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        offsets = sparse.conv2d(self.offset.weight, self.offset.bias).view(-1, KERNEL_SIZE**2, 2)
        if offsets.dtype != torch.float64:
            offsets = offsets.float()
        return deformable_sparse_conv2d(
            sparse.features, sparse.index_map, sparse.cells, offsets, self.conv.weight, self.conv.bias
        ).relu()


class SemanticFusion(nn.Module):
    """Semantic fusion module (SFM): the sum of rectified 3x3 convolutions of several dilations."""

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, KERNEL_SIZE, dilation=d) for d in self.dilations)

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        weights, biases = zip(*((branch.weight, branch.bias) for branch in self.branches))
        return multi_dilation_sparse_conv2d(
            sparse.features, sparse.index_map, sparse.cells, weights, biases, self.dilations
        )


class DenseSemanticFusion(SemanticFusion):
    """SFM by dense convolutions of the whole map, for heads that keep all cells active; it has SFM's weights."""

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        features = sparse.dense()
        fused = torch.stack(
            [
                F.conv2d(features, branch.weight, branch.bias, padding=dilation, dilation=dilation).relu()
                for branch, dilation in zip(self.branches, self.dilations)
            ]
        ).sum(0)
        region, y, x = sparse.cells.long().unbind(1)
        return fused[region, :, y, x]


class Processing(nn.Module):
    """Linear layers before and after what looks at the neighbours, each with a ReLU.

    Passive cells skip the layer before, so that neighbours see them as they are.

    Args:
        width: F.
        core: maps a sparse map to active features.
    """

    def __init__(self, width: int, core: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.core = core
        self.after = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        active = self.before(sparse.active)
        passive = sparse.passive.to(active.dtype)  # autocast has its own idea of active's type
        return self.after(self.core(sparse.replace_features(active, passive)))


class CellMLP(nn.Module):
    """Linear layers of each cell by itself, each with a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, MLP_RATIO * width),
            nn.ReLU(),
            nn.Linear(MLP_RATIO * width, width),
            nn.ReLU(),
        )

    def forward(self, sparse: SparseMap) -> Tensor:
        """Active features (N_A, F)."""
        return self.layers(sparse.active)


PROCESSING: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "mlp": lambda width, dilations: CellMLP(width),
    "conv": lambda width, dilations: Processing(width, Convolution(width)),
    "deform_conv": lambda width, dilations: Processing(width, DeformableConvolution(width)),
    "sfm": lambda width, dilations: Processing(width, SemanticFusion(width, dilations)),
    "dense_sfm": lambda width, dilations: Processing(width, DenseSemanticFusion(width, dilations)),
}
"""Makers of the modules of Table 5 by name, from the width and, for SFM, the dilations."""
