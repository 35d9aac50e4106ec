"""EffSeg's head: masks refined stage by stage where it counts (Picron and Tuytelaars, https://arxiv.org/abs/2307.01545,
section 3).

Data flow (n regions, F width of a stage, N_A active and N_P passive features)::

    RoIAlign (n, C, 14, 14) + positions + what the query says -> 3x3 convolutions -> stage 0: every cell is active
    each further stage: the cells of highest refinement logit (or of another of CHOICES), of all regions together,
      stay active
      -> four children of each (4 N_A, F), added to copies of the parent
      -> a finer backbone map read at the children's centres, fused and added
      -> linear layer to half the width, active and passive
      -> processing: active cells look at their neighbours
      -> segmentation and refinement logits (4 N_A,)
    mask: logits of the stage before, upsampled, under those of the active cells

Passive cells keep their features and stay neighbours; they never return.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from querymask.common.layers import Recomputable
from querymask.common.precision import full_precision
from querymask.common.processes import ALONE, Processes
from querymask.common.pyramid import FeaturePyramid
from querymask.common.sps import SparseMap
from querymask.effseg.heads.effseg_losses import RefinementCriterion, Stage
from querymask.effseg.heads.processing import PROCESSING
from querymask.effseg.heads.refine_mask import MERGED_WIDTH, boundary
from querymask.effseg.regions import (
    LEVEL_RULE,
    ROI_SIZE,
    STRIDES,
    QueryFusion,
    Regions,
    RegionTargets,
    SegmentationHead,
    pool_regions,
)

POSITION_TEMPERATURE = 10000


def encode_cells(width: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sine encoding of the cells of a square.

    Args:
        width: channels, a multiple of 4: a quarter each of the sines and cosines of x, then of y.
        size: cells a side.

    Returns:
        (width, size, size).
    """
    centres = 2 * math.pi * (torch.arange(size, dtype=dtype, device=device) + 0.5) / size
    powers = torch.arange(width // 4, dtype=dtype, device=device) / (width // 4)
    angles = centres / (POSITION_TEMPERATURE ** powers[:, None])
    waves = torch.cat([angles.sin(), angles.cos()])  # (width / 2, size)
    return torch.cat([waves[:, None, :].expand(-1, size, -1), waves[:, :, None].expand(-1, -1, size)])


class ChildFeatures(nn.Module):
    """What tells the four children of a cell from their parent: two layers, of which the first is each child's own.

    Args:
        width: F.
        separate: so is the second (paper's text); else all four share it (release).
    """

    def __init__(self, width: int, separate: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        if separate:
            self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        else:
            self.shared = nn.Linear(width, width)
        self.separate = separate

    def forward(self, parents: Tensor) -> Tensor:
        """(N_A, F) -> (4 N_A, F), in the order of :meth:`SparseMap.upsample`."""
        hidden = self.expand(parents).relu().view(-1, 4, parents.shape[1])
        if not self.separate:
            return self.shared(hidden.flatten(0, 1))
        return torch.stack([layer(child) for layer, child in zip(self.own, hidden.unbind(1))], 1).flatten(0, 1)


class MapFusion(nn.Module):
    """What a backbone map adds to the features of cells."""

    def __init__(self, width: int, map_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width + map_width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, features: Tensor, sampled: Tensor) -> Tensor:
        """(N_A, F), (N_A, C) -> (N_A, F)."""
        return self.layers(torch.cat([features, sampled], 1))


class RefinementStage(Recomputable):
    """From the active cells of one stage to those of the next, twice as fine and half as wide.

    Args:
        width: F of the stage before.
        map_width: C.
        processing: a name of :data:`PROCESSING`.
        dilations: of its convolutions.
        separate_children: as in :class:`ChildFeatures`.
    """

    def __init__(
        self, width: int, map_width: int, processing: str, dilations: Sequence[int], separate_children: bool
    ) -> None:
        super().__init__()
        self.child_features = ChildFeatures(width, separate_children)
        self.fusion = MapFusion(width, map_width)
        self.transition = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU())
        self.processing = PROCESSING[processing](width // 2, dilations)

    def forward(self, sparse: SparseMap, sample: Callable[[SparseMap], Tensor]) -> SparseMap:
        """Refine.

        Args:
            sparse: F wide; the passive cells have been chosen.
            sample: reads the backbone's features (N_A, C) at the active cells.
        """
        children = self.child_features(sparse.active)
        sparse = sparse.upsample()
        active = full_precision(sparse.active) + children
        active = active + self.fusion(active, sample(sparse))
        features = self.transition(torch.cat([active, sparse.passive]))
        sparse = sparse.replace_features(features[: len(active)], features[len(active) :])
        return sparse.replace_active(self.processing(sparse))


def sample_cells(
    pyramid: FeaturePyramid,
    image_size: tuple[int, int],
    regions: Regions,
    levels: Tensor,
    number: int,
    sparse: SparseMap,
) -> Tensor:
    """The backbone's features at the centres of the active cells: (N_A, C).

    Each stage reads one map finer than the stage before, until the finest.

    Args:
        pyramid: of the backbone's maps.
        image_size: (height, width) of the padded images.
        regions: those of the map.
        levels: (n,) index of the map that stage 0 reads each of them from.
        number: of the stage, from 1 on.
        sparse: the map of the regions.
    """
    region, y, x = sparse.cells.long().unbind(1)
    boxes = full_precision(regions.boxes)
    shares = (torch.stack([x, y], 1).to(boxes.dtype) + 0.5) / sparse.index_map.shape[2]
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    points = corners.index_select(0, region) + shares * sides.index_select(0, region)
    levels = (levels - number).clamp(min=0)
    return pyramid.sample(points, regions.images[region], levels[region], image_size)


class EffSegHead(SegmentationHead):
    """EffSeg's refinement head. Masks do not depend on classes.

    Args:
        width: C of maps and queries, and F of stage 0: a multiple of 4 and of 2 ** num_stages.
        processing: "mlp", "conv", "deform_conv", "sfm" or "dense_sfm" (Table 5); the last keeps all cells active.
        refinements: active cells, of all regions together, that each stage refines at most.
        num_fcn_convs: 3x3 convolutions of stage 0.
        num_stages: refinement stages; each doubles the resolution of 14 x 14 cells.
        dilations: of the branches of SFM.
        seg_weights, ref_weights: of the losses, for stage 0 and each refinement stage.
        use_position: tell the cells where they are in their region.
        separate_children: as in :class:`ChildFeatures`.
        choose_by: a name of :data:`CHOICES`, by which the active cells of the next stage are chosen.
        targets: of the losses, "coverage" or "centre"; see :class:`RefinementCriterion`.

    Raises:
        ValueError: a setting is unknown or does not fit the others.
    """

    per_class = False

    def __init__(
        self,
        width: int = 256,
        processing: str = "sfm",
        refinements: int = 10000,
        num_fcn_convs: int = 4,
        num_stages: int = 3,
        dilations: Sequence[int] = (1, 3, 5),
        seg_weights: Sequence[float] = (0.25, 0.375, 0.375, 0.5),
        ref_weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
        use_position: bool = True,
        separate_children: bool = False,
        choose_by: str = "refinement",
        targets: str = "coverage",
    ) -> None:
        super().__init__()
        if processing not in PROCESSING:
            raise ValueError(f"processing must be one of {', '.join(PROCESSING)}, not {processing!r}")
        if choose_by not in CHOICES:
            raise ValueError(f"choose_by must be one of {', '.join(CHOICES)}, not {choose_by!r}")
        if processing == "dense_sfm" and choose_by != "refinement":
            raise ValueError(f"processing dense_sfm keeps all cells active: leave choose_by {choose_by!r} out")
        if width % 4 or width % 2**num_stages:
            raise ValueError(f"width must be a multiple of 4 and of 2 ** num_stages = {2**num_stages}, not {width}")
        if refinements < 1:
            raise ValueError(f"refinements must be positive, not {refinements}")
        for name, weights in (
            ("seg_weights", seg_weights),
            ("ref_weights", ref_weights),
        ):
            if len(weights) != num_stages + 1:
                raise ValueError(
                    f"{name} must have {num_stages + 1} entries, for stage 0 and {num_stages} refinement stages, "
                    f"got {list(weights)}"
                )
        self.refinements = None if processing == "dense_sfm" else refinements
        self.choose = CHOICES[choose_by]
        self.use_position = use_position
        self.query_fusion = QueryFusion(width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(num_fcn_convs))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        widths = [width // 2**number for number in range(num_stages + 1)]
        self.stages = nn.ModuleList(
            RefinementStage(w, width, processing, dilations, separate_children) for w in widths[:-1]
        )
        self.segmentation = nn.ModuleList(_cell_classifier(w) for w in widths)
        self.refinement = nn.ModuleList(_cell_classifier(w) for w in widths)
        self.criterion = RefinementCriterion(seg_weights, ref_weights, targets=targets)

    def forward(self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions) -> Tensor:
        """Probabilities (n, S, S), S being 112 for three stages. See :class:`SegmentationHead`."""
        if not len(regions):
            size = ROI_SIZE * 2 ** len(self.stages)
            return full_precision(pyramid.maps[0].new_zeros(0, size, size))
        if pyramid.num_images > 1:  # the maps of other images would be laid out for nothing
            pyramid = pyramid.of_image(int(regions.images[0]))
            regions = replace(regions, images=torch.zeros_like(regions.images))
        return assemble_masks(self.refine(pyramid, image_size, regions))[-1].sigmoid()

    def losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        """``loss_segmentation`` and ``loss_refinement``. See :class:`SegmentationHead`."""
        if not len(regions):
            self._follow(full_precision(pyramid.maps[0]).new_zeros(0))
            zero = 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
            return {"loss_segmentation": zero, "loss_refinement": zero}
        stages = self.refine(pyramid, image_size, regions, self.processes)
        return self.criterion(stages, regions, targets, self.processes)

    def _follow(self, no_scores: Tensor) -> None:
        """What ``losses`` asks the other processes, in one that has no regions."""
        for _ in self.stages if self.refinements is not None else ():
            self.processes.share_of_highest(no_scores, self.refinements)
        self.criterion.normalizers(0, [0] * (len(self.stages) + 1), self.processes, no_scores.device)

    def refine(
        self,
        pyramid: FeaturePyramid,
        image_size: tuple[int, int],
        regions: Regions,
        processes: Processes = ALONE,
    ) -> list[Stage]:
        """Run all stages.

        Args:
            pyramid: P2 to P5.
            image_size: (height, width) of the padded images.
            regions: n > 0, of any images; they compete for refinement.
            processes: whose regions compete, all calling this together.

        Returns:
            Stage 0 and the refinement stages.

        Raises:
            ValueError: not the maps that the head reads.
        """
        if tuple(pyramid.strides) != STRIDES:
            raise ValueError(f"EffSeg reads maps of the strides {list(STRIDES)}, got {pyramid.strides}")
        sparse = SparseMap.from_dense(self._dense_features(pyramid, regions))
        stages = [self._classify(0, sparse)]
        levels = pyramid.level_of(regions.boxes, LEVEL_RULE)
        for number, refine in enumerate(self.stages, 1):
            if self.refinements is not None:
                scores = self.choose(stages)
                if regions.real is not None:
                    scores = scores.masked_fill(~regions.real[sparse.cells[:, 0].long()], -torch.inf)
                sparse = sparse.split_highest(scores, processes.share_of_highest(scores, self.refinements))
            sparse = refine.run(sparse, partial(sample_cells, pyramid, image_size, regions, levels, number))
            stages.append(self._classify(number, sparse))
        return stages

    def _dense_features(self, pyramid: FeaturePyramid, regions: Regions) -> Tensor:
        """The features of stage 0 (n, C, 14, 14)."""
        features = pool_regions(pyramid, regions)
        if self.use_position:
            features = features + encode_cells(*features.shape[1:3], features.dtype, features.device)
        features = features + self.query_fusion(features, regions.queries)
        for conv in self.convs:
            features = conv(features).relu()
        return features

    def _classify(self, number: int, sparse: SparseMap) -> Stage:
        segmentation, refinement = (
            full_precision(branches[number](sparse.active).squeeze(1))
            for branches in (self.segmentation, self.refinement)
        )
        return Stage(sparse, segmentation, refinement)


def assemble_masks(stages: Sequence[Stage]) -> list[Tensor]:
    """Masks as they are after every stage: those of the stage before, finer, under the stage's active cells.

    Args:
        stages: one or more, the first with all cells active.

    Returns:
        Logits (n, S, S) for every stage, S doubling from one to the next.
    """
    masks: list[Tensor] = []
    for stage in stages:
        if masks:
            mask = F.interpolate(masks[-1][:, None], scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
        else:
            mask = stage.segmentation.new_zeros(stage.features.index_map.shape)
        masks.append(mask.index_put(stage.features.cells.long().unbind(1), stage.segmentation))
    return masks


# ---- Which cells stay active --------------------------------------------------------------------------------------
# From the stages so far to scores (N_A,) of the last one's active cells, of which the highest stay active


def by_refinement(stages: Sequence[Stage]) -> Tensor:
    """What the classifier of borders says."""
    return stages[-1].refinement.detach()


def by_uncertainty(stages: Sequence[Stage]) -> Tensor:
    """How near to 0.5 the mask is, as in PointRend (https://arxiv.org/abs/1912.08193)."""
    return -stages[-1].segmentation.detach().abs()


@torch.no_grad()
def by_boundary(stages: Sequence[Stage]) -> Tensor:
    """First the boundary of the mask so far, as in RefineMask (https://arxiv.org/abs/2104.08569), then the others.

    Within both, the least certain come first. RefineMask takes the boundary alone, of however many cells; so that the
    choices differ in nothing but the order, and a GPU need not be asked for a number, as many are taken here as always.
    """
    cells = stages[-1].features.cells.long().unbind(1)
    on_boundary = boundary(assemble_masks(stages)[-1] >= 0, MERGED_WIDTH)[cells]
    return on_boundary + 1 / (1 + stages[-1].segmentation.abs())


CHOICES: dict[str, Callable[[Sequence[Stage]], Tensor]] = {
    "refinement": by_refinement,
    "uncertainty": by_uncertainty,
    "boundary": by_boundary,
}


def _cell_classifier(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
