"""Losses of EffSeg's refinement head (https://arxiv.org/abs/2307.01545, section 3.4; the release's targets)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from querymask.common.precision import full_precision
from querymask.common.processes import ALONE, Processes
from querymask.common.sps import SparseMap
from querymask.common.transfer import kept_numbers, numbers_to_device
from querymask.effseg.regions import Regions, RegionTargets, target_at_centres, target_coverage

COVERAGE_TOLERANCE = 1e-6
"""A cell that the mask covers up to this share is no border: rounding keeps the share of a full cell from being 1."""


TARGETS = ("coverage", "centre")


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


def is_mixed(samples: Tensor, size: int) -> Tensor:
    """Cells whose samples are not all the same.

    Args:
        samples: (n, S, S) bool.
        size: cells a side, a divisor of S.

    Returns:
        (n, size, size) bool.
    """
    cells = samples.unflatten(2, (size, -1)).unflatten(1, (size, -1))
    return cells.any(4).any(2) & ~cells.all(4).all(2)


class RefinementCriterion(nn.Module):
    """Binary cross-entropy of the active cells of every stage.

    A stage's loss is the mean over its active cells, times its weight and the number of regions: of all processes, of
    which each has its part of the sum.

    Args:
        segmentation_weights: of the stages, for "the cell belongs to the mask".
        refinement_weights: of the stages, for "the mask's border is in the cell".
        targets: "coverage", a cell belongs to the mask that covers more than half of it, and a border is in it if the
            mask covers a part of it (release); "centre", it belongs to the mask that its centre is in, and a border is
            in it if the centres of the cells in it, twice as fine as those of the last stage, are not all in the mask
            or all outside (paper's text, which does not say how fine).
        coverage_tolerance: a cell that the mask covers up to this share, or leaves free up to it, is no border. The
            release has 0, where rounding makes borders of some full cells.
    """

    def __init__(
        self,
        segmentation_weights: Sequence[float],
        refinement_weights: Sequence[float],
        coverage_tolerance: float = COVERAGE_TOLERANCE,
        targets: str = "coverage",
    ) -> None:
        super().__init__()
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, not {targets!r}")
        self.targets = targets
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

    def labels(self, regions: Regions, targets: RegionTargets, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Whether cells belong to the mask, and whether its border is in them: (n, size, size) bool for every size.

        Args:
            regions: n, of any images.
            targets: theirs.
            sizes: cells a side of every stage, the last a multiple of all.
        """
        if self.targets == "coverage":
            shares = target_coverage(regions, targets, sizes)
            return [(share > 0.5, is_border(share, self.coverage_tolerance)) for share in shares]
        *centres, finest = target_at_centres(regions, targets, [*sizes, 2 * sizes[-1]])
        return [(centre, is_mixed(finest, size)) for centre, size in zip(centres, sizes)]

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
        counts = [len(stage.segmentation) for stage in stages]
        factors = self.normalizers(len(regions), counts, processes, regions.boxes.device)
        sizes = [stage.features.index_map.shape[1] for stage in stages]
        segmentation, refinement = [], []
        for stage, (in_mask, border) in zip(stages, self.labels(regions, targets, sizes)):
            cells = stage.features.cells.long().unbind(1)
            segmentation.append(_cross_entropy(stage.segmentation, in_mask[cells]))
            refinement.append(_cross_entropy(stage.refinement, border[cells]))
        return {
            "loss_segmentation": _weighted(segmentation, self.segmentation_weights, factors),
            "loss_refinement": _weighted(refinement, self.refinement_weights, factors),
        }


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")


def _weighted(sums: Sequence[Tensor], weights: Sequence[float], factors: Tensor) -> Tensor:
    values = torch.stack(list(sums))
    return (kept_numbers(tuple(weights), like=values) * values * factors.to(values.dtype)).sum()
