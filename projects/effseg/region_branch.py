"""Segmentation heads as mask branches: queries become regions, and regions square masks that are pasted.

Data flow (n regions, C width, S side of a mask)::

    training: matched queries of the last layer, their boxes and features -> losses of the head
    inference: pairs of query and class, or their queries -> probabilities (n, S, S) -> pasted, scored, thresholded
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor

from querymask.common.detector import Detector, descending_order
from querymask.common.finer_levels import FinerLevels
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.masks import Bands, pad_masks, pasted_bands
from querymask.common.ops.exporting import exportable
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets
from querymask.common.processes import Processes
from querymask.common.pyramid import FeaturePyramid
from querymask.common.transfer import instances_to_device, to_device
from querymask.effseg.heads.effseg import EffSegHead
from querymask.effseg.heads.mask_rcnn import MaskRCNNHead
from querymask.effseg.heads.pointrend import PointRendHead
from querymask.effseg.heads.refine_mask import RefineMaskHead
from querymask.effseg.pasting import EXPORTS, paste_and_resize
from querymask.effseg.regions import STRIDES, Regions, RegionTargets, SegmentationHead


class RegionBranch(MaskBranch):
    """Masks of regions; subclasses have the heads.

    Args:
        head: masks of regions.
        finer_levels: that the detector's pyramid lacks.
        processes: whose regions are one batch.
        max_train_regions: matched queries of a batch that get masks in training, a random choice of them; 0: all.
        mask_export: how masks get the original image's size, one of ``pasting.EXPORTS``.
    """

    sections = ("MASK_BRANCH.REGION",)
    needs_boxes = True
    finishes = True
    capturable = False

    def __init__(
        self,
        head: SegmentationHead,
        finer_levels: FinerLevels,
        processes: Processes,
        max_train_regions: int,
        mask_export: str,
    ) -> None:
        super().__init__()
        if mask_export not in EXPORTS:
            raise ValueError(f"MODEL.MASK_BRANCH.REGION.EXPORT is {mask_export!r}: choose one of {', '.join(EXPORTS)}")
        self.finer_levels = finer_levels
        self.head = head
        self.processes = head.processes = processes
        self.max_train_regions = max_train_regions
        self.mask_export = mask_export

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "RegionBranch":
        """What ``MODEL.MASK_BRANCH`` describes, for any detector with boxes."""
        region = cfg.MODEL.MASK_BRANCH.REGION
        finer_levels = FinerLevels(shapes, detector.strides, STRIDES[0], detector.width)
        if tuple(finer_levels.strides[: len(STRIDES)]) != STRIDES:
            raise ValueError(
                f"segmentation heads read maps of the strides {list(STRIDES)}, the levels 2 to 5, but the pyramid has "
                f"{finer_levels.strides}: begin MODEL.EFFSEG.LEVELS with these levels, have the backbone give a map "
                "for each, or set MODEL.MASK_BRANCH.NAME none"
            )
        head = cls.build_head(cfg, detector.width, detector.num_classes)
        return cls(head, finer_levels, detector.processes, region.MAX_TRAIN_REGIONS, region.EXPORT)

    @staticmethod
    @abstractmethod
    def build_head(cfg: CfgNode, width: int, num_classes: int) -> SegmentationHead:
        """The head, for maps and queries of ``width`` channels."""

    def forward(self, found: Predictions) -> FeaturePyramid:
        """The levels that heads read."""
        return self.finer_levels(found)[: len(STRIDES)]

    def encode(self, targets: Targets, found: Predictions) -> list[Tensor]:
        """(T, H, W) bool on the padded canvas, for every image."""
        return [pad_masks(masks, found.canvas.size) for masks in targets.masks]

    def losses(
        self,
        found: Predictions,
        made: FeaturePyramid,
        truth: Sequence[Tensor],
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """Those of the head, for the matched queries of the last layer."""
        pairs = limit_pairs(assignment.last(), self.max_train_regions, len(targets.counts), self.processes)
        starts = torch.tensor(targets.starts)
        index = pairs.target - to_device(starts, pairs.target.device)[pairs.image]
        regions = self.matched_regions(found, targets, pairs)
        losses = self.head.losses(made, found.canvas.size, regions, RegionTargets(truth, index))
        terms = [LossTerm(name, value / normalizers.targets) for name, value in losses.items()]
        if not len(regions):  # the head has read no map, so that finer levels lack a gradient
            zero = 0 * sum(parameter.sum() for parameter in self.finer_levels.parameters())
            terms[0] = replace(terms[0], value=terms[0].value + zero)
        return terms

    def matched_regions(self, found: Predictions, targets: Targets, pairs: Assignment) -> Regions:
        """The matched queries with their predicted boxes and the classes of their targets.

        As in the release, boxes learn nothing from masks, although EffSeg reads maps at places within the boxes.
        """
        return Regions(
            boxes=found.pixel_boxes(pairs.image, pairs.query).detach(),
            images=pairs.image,
            queries=found.hidden[-1][pairs.image, pairs.query],
            labels=targets.labels[pairs.target],
        )

    def add_masks(
        self, found: Predictions, made: FeaturePyramid, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """Masks, scores times the mean probability of their foreground; without empty ones, by descending score."""
        device = found.hidden.device
        canvas, size = found.canvas.size, detections.image_size
        region, _, regions = self.regions(found, image, detections, layer)
        probabilities = self.head(made.of_image(image), canvas, regions)
        masks, certainty = paste_and_resize(
            probabilities, regions.boxes, canvas, found.image_sizes[image], size, self.mask_export
        )
        kept = to_device(detections.pred_boxes.nonempty(), device)
        detections = instances_to_device(detections, device)
        detections.scores = detections.scores * certainty[region]
        rows = order_rows(detections, kept & masks.flatten(1).any(1)[region])
        detections = detections[rows]
        detections.pred_masks = masks[region[rows]]
        return detections

    def regions(
        self, found: Predictions, image: int, detections: Instances, layer: int | None = None
    ) -> tuple[Tensor, Tensor, Regions]:
        """What the head gets for the detections of an image.

        Returns:
            the region (D,) of every detection; the query (n,) of every region, ascending where masks do not depend on
            classes; the regions, whose maps are those of this image alone.
        """
        if self.head.per_class:  # every pair of query and class has a mask of its own
            queries, labels = detections.pred_queries, detections.pred_classes
            region, real = torch.arange(len(queries), device=queries.device), None
        else:
            queries, region, real = unite_queries(detections)
            labels = torch.zeros_like(queries)
        region, queries, labels = (to_device(x, found.hidden.device) for x in (region, queries, labels))
        return region, queries, self._regions(found, image, queries, labels, -1 if layer is None else layer, real)

    @staticmethod
    def _regions(
        found: Predictions, image: int, queries: Tensor, labels: Tensor, layer: int, real: Tensor | None = None
    ) -> Regions:
        """Queries (n,) with classes (n,) as regions of the maps of their image alone."""
        boxes = found.pixel_boxes(torch.full_like(queries, image), queries, layer)
        return Regions(boxes, torch.zeros_like(queries), found.hidden[layer, image, queries], labels, real)

    def bands(self, found: Predictions, made: FeaturePyramid, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """See :class:`MaskBranch`; all queries compete for refinement, also those that become no segment."""
        canvas = found.canvas.size
        labels, real = split_off_missing(labels)
        regions = self._regions(found, image, queries, labels, -1, real)
        return pasted_bands(self.head(made.of_image(image), canvas, regions), regions.boxes, canvas[1])


def _mark_missing(labels: Tensor) -> tuple[Tensor, Tensor | None]:
    return labels.clamp(min=0), labels >= 0


@exportable(_mark_missing)
def split_off_missing(labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels (n,) that are classes, and which of them (n,) are not there to fill up the number."""
    return labels, None


def _unite_fixed_number(detections: Instances) -> tuple[Tensor, Tensor, Tensor | None]:
    queries = detections.pred_queries
    first = ((queries[:, None] == queries) & (detections.scores >= 0)).int().argmax(1)
    return queries, first, (first == torch.arange(len(queries), device=queries.device)) & (detections.scores >= 0)


@exportable(_unite_fixed_number)
def unite_queries(detections: Instances) -> tuple[Tensor, Tensor, Tensor | None]:
    """The queries of detections, each once.

    Returns:
        queries (n,), the one (D,) of every detection, and which of them (n,) are not there to fill up the number.
    """
    return *detections.pred_queries.unique(return_inverse=True), None


def _order_all_rows(detections: Instances, kept: Tensor) -> Tensor:
    detections.scores = detections.scores.where(kept & (detections.scores >= 0), -1)
    return descending_order(detections.scores)


@exportable(_order_all_rows)
def order_rows(detections: Instances, kept: Tensor) -> Tensor:
    """The rows that are kept (D,) bool, by descending score."""
    (rows,) = kept.nonzero(as_tuple=True)
    return rows[descending_order(detections.scores[rows])]


def limit_pairs(pairs: Assignment, number: int, num_images: int, processes: Processes) -> Assignment:
    """At most ``number`` pairs, a random choice among those of all processes; 0: all.

    Args:
        pairs: of one layer.
        number: how many, in the whole batch.
        num_images: of this process.
        processes: whose pairs are chosen from.
    """
    if number <= 0:
        return pairs
    device = pairs.query.device
    number = processes.limit(number)
    order = processes.draw(lambda n: torch.randperm(n, device=device).argsort(), pairs.image, num_images)
    if processes.number == 1:  # all numbers below that of the pairs: a GPU need not be asked how many remain
        kept = order.argsort()[:number].sort().values
    else:
        (kept,) = (order < number).nonzero(as_tuple=True)
    return Assignment(pairs.layer[kept], pairs.image[kept], pairs.query[kept], pairs.target[kept], 1)


@MASK_BRANCH_REGISTRY.register()
class EffSegBranch(RegionBranch):
    """EffSeg's refinement head (``heads/effseg.py``)."""

    sections = ("MASK_BRANCH.REGION", "MASK_BRANCH.EFFSEG")

    @staticmethod
    def build_head(cfg: CfgNode, width: int, num_classes: int) -> EffSegHead:
        """See :class:`RegionBranch`."""
        effseg = cfg.MODEL.MASK_BRANCH.EFFSEG
        return EffSegHead(
            width,
            processing=effseg.PROCESSING,
            refinements=effseg.REFINEMENTS,
            num_fcn_convs=effseg.NUM_FCN_CONVS,
            dilations=tuple(effseg.DILATIONS),
            seg_weights=tuple(effseg.SEG_WEIGHTS),
            ref_weights=tuple(effseg.REF_WEIGHTS),
            use_position=effseg.USE_POSITION,
            separate_children=effseg.SEPARATE_CHILDREN,
            choose_by=effseg.CHOOSE_BY,
            targets=effseg.TARGETS,
        )


@MASK_BRANCH_REGISTRY.register()
class MaskRCNNBranch(RegionBranch):
    """The head of Mask R-CNN++ (``heads/mask_rcnn.py``)."""

    @staticmethod
    def build_head(cfg: CfgNode, width: int, num_classes: int) -> MaskRCNNHead:
        """See :class:`RegionBranch`."""
        return MaskRCNNHead(width, num_classes)


@MASK_BRANCH_REGISTRY.register()
class PointRendBranch(RegionBranch):
    """The head of PointRend++ (``heads/pointrend.py``)."""

    sections = ("MASK_BRANCH.REGION", "MASK_BRANCH.POINTREND")

    @staticmethod
    def build_head(cfg: CfgNode, width: int, num_classes: int) -> PointRendHead:
        """See :class:`RegionBranch`."""
        return PointRendHead(width, num_classes, subdivisions=cfg.MODEL.MASK_BRANCH.POINTREND.SUBDIVISIONS)


@MASK_BRANCH_REGISTRY.register()
class RefineMaskBranch(RegionBranch):
    """The head of RefineMask++ (``heads/refine_mask.py``)."""

    @staticmethod
    def build_head(cfg: CfgNode, width: int, num_classes: int) -> RefineMaskHead:
        """See :class:`RegionBranch`."""
        return RefineMaskHead(width, num_classes)
