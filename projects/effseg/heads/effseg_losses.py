"""Losses of EffSeg's refinement head (https://arxiv.org/abs/2307.01545, section 3.4; the release's targets)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from querymask.common.precision import full_precision
from querymask.common.processes import ALONE, Processes
from querymask.common.sps import SparseMap
from querymask.common.transfer import numbers_to_device
from querymask.effseg.regions import Regions, RegionTargets, target_coverage

COVERAGE_TOLERANCE = 1e-6
"""A cell that the mask covers up to this share is no border: rounding keeps the share of a full cell from being 1."""


@dataclass(frozen=True)
class Stage:
    """What a stage says about its active cells.

    Attributes:
        features: of the stage's end, with the places of the active cells.
        segmentation, refinement: (N_A,) logits: the cell belongs to the mask; the mask's border is in it.
    """

    features: SparseMap
    segmentation: Tensor
    refinement: Tensor


def is_border(coverage: Tensor, tolerance: float = COVERAGE_TOLERANCE) -> Tensor:
    """Cells that a mask covers in part, by more than ``tolerance``: those to be refined."""
    return (coverage > tolerance) & (coverage < 1 - tolerance)


class RefinementCriterion(nn.Module):
    """Binary cross-entropy of the active cells of every stage.

    A stage's loss is the mean over its active cells, times its weight and the number of regions: of all processes, of
    which each has its part of the sum.

    Args:
        segmentation_weights: of the stages, for "more than half of the cell belongs to the mask".
        refinement_weights: of the stages, for "the mask's border is in the cell".
        coverage_tolerance: a cell that the mask covers up to this share, or leaves free up to it, is no border. The
            release has 0, where rounding makes borders of some full cells.
    """

    def __init__(
        self,
        segmentation_weights: Sequence[float],
        refinement_weights: Sequence[float],
        coverage_tolerance: float = COVERAGE_TOLERANCE,
    ) -> None:
        super().__init__()
        self.coverage_tolerance = coverage_tolerance
        self.segmentation_weights = tuple(segmentation_weights)
        self.refinement_weights = tuple(refinement_weights)

    def normalizers(self, regions: int, cells: Sequence[int], processes: Processes, device: torch.device) -> Tensor:
        """What each stage's sum over its active cells is multiplied by: regions over active cells, of all processes.

        Args:
            regions: number of this process's regions.
            cells: number of its active cells in every stage.
            processes: all of which call this together.
            device: for the exchange.
        """
        counts = processes.total(numbers_to_device([regions, *cells], torch.int64, device))
        return counts[0] / counts[1:].clamp(min=1)

    def forward(
        self,
        stages: Sequence[Stage],
        regions: Regions,
        targets: RegionTargets,
        processes: Processes = ALONE,
    ) -> Mapping[str, Tensor]:
        """Sum over the stages.

        Args:
            stages: of the head, for these regions.
            regions: n > 0, matched with targets.
            targets: theirs.
            processes: whose regions are one batch.

        Returns:
            ``loss_segmentation`` and ``loss_refinement``.
        """
        cells = [len(stage.segmentation) for stage in stages]
        factors = self.normalizers(len(regions), cells, processes, regions.boxes.device)
        sizes = [stage.features.index_map.shape[1] for stage in stages]
        segmentation, refinement = [], []
        for stage, share in zip(stages, target_coverage(regions, targets, sizes)):
            share = share[stage.features.cells.long().unbind(1)]
            segmentation.append(_cross_entropy(stage.segmentation, share > 0.5))
            refinement.append(_cross_entropy(stage.refinement, is_border(share, self.coverage_tolerance)))
        return {
            "loss_segmentation": _weighted(segmentation, self.segmentation_weights, factors),
            "loss_refinement": _weighted(refinement, self.refinement_weights, factors),
        }


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")


def _weighted(sums: Sequence[Tensor], weights: Sequence[float], factors: Tensor) -> Tensor:
    weighted = torch.stack([weight * value for weight, value in zip(weights, sums, strict=True)])
    return (weighted * factors.to(weighted.dtype)).sum()
