"""EffSeg (Picron and Tuytelaars 2023): FQDet, and a segmentation head on its queries.

Data flow (B images, Q queries, C width, K classes, n regions, S side of a mask)::

    images (B, 3, H, W) -> backbone C2..C5 -> neck, levels P_l (B, C, H_l, W_l)
      -> FQDet: anchors are selected, their features become queries (B, Q, C) -> class logits (B, Q, K + 1), boxes
      -> training: matching and losses of the detector; regions are the matched queries with their predicted boxes
      -> inference: best pairs of query and class, non-maximum suppression; regions are the pairs or their queries
      -> segmentation head: regions -> probabilities (n, S, S) -> pasted, scored, thresholded

Without a segmentation head this is FQDet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from querymask.common.masks import instance_masks
from querymask.common.meta_arch import QuerySegmenter, feature_channels
from querymask.common.precision import full_precision
from querymask.common.processes import Processes
from querymask.common.transfer import instances_to_device, to_device
from querymask.effseg.criterion import FQDetCriterion, Matches
from querymask.effseg.fqdet import Detections, FQDet, FQDetOutput, detect
from querymask.effseg.heads.build import build_mask_head
from querymask.effseg.masks import EXPORTS, paste_and_resize
from querymask.effseg.neck import build_neck
from querymask.effseg.regions import NUM_MAPS, Regions, RegionTargets, SegmentationHead

LOSS_REDUCTIONS = ("global", "local")


@META_ARCH_REGISTRY.register()
class EffSeg(QuerySegmenter):
    """The meta-architecture.

    Args:
        backbone: gives the maps ``in_features``.
        in_features: names of the maps, fine to coarse.
        neck: maps (B, C_i, H_i, W_i) of the backbone -> those of the detector's levels.
        detector: boxes and classes.
        criterion: matching and losses of the detector.
        mask_head: masks of regions; None: the detector alone.
        loss_reduction: losses, limit of regions and refinement budget are "global", those of the whole batch, or
            "local", of each process by itself.
        max_train_regions: matched queries of a batch that get masks in training, a random choice of them; 0: all.
        nms_threshold: IoU with a better pair of the same class above which a pair of query and class is left out.
        detections_per_image: pairs that are kept.
        mask_export: how masks get the original image's size, one of ``masks.EXPORTS``.
        pixel_mean, pixel_std: per channel, for pixels in 0..255.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        neck: nn.Module,
        detector: FQDet,
        criterion: FQDetCriterion,
        mask_head: SegmentationHead | None,
        loss_reduction: str,
        max_train_regions: int,
        nms_threshold: float,
        detections_per_image: int,
        mask_export: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std, backbone.size_divisibility)
        if mask_head is not None and detector.levels[:NUM_MAPS] != (2, 3, 4, 5):
            raise ValueError(
                f"segmentation heads read the levels 2 to 5, but MODEL.EFFSEG.LEVELS is {list(detector.levels)}: begin "
                "it with these, or set MODEL.EFFSEG.MASK_HEAD none"
            )
        if mask_export not in EXPORTS:
            raise ValueError(f"MODEL.EFFSEG.MASK_EXPORT is {mask_export!r}: choose one of {', '.join(EXPORTS)}")
        if loss_reduction not in LOSS_REDUCTIONS:
            choices = ", ".join(LOSS_REDUCTIONS)
            raise ValueError(f"MODEL.EFFSEG.LOSS_REDUCTION is {loss_reduction!r}: choose one of {choices}")
        self.in_features = list(in_features)
        self.neck = neck
        self.detector = detector
        self.criterion = criterion
        self.mask_head = mask_head
        self.processes = Processes(together=loss_reduction == "global")
        if mask_head is not None:
            mask_head.processes = self.processes
        self.max_train_regions = max_train_regions
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.mask_export = mask_export

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        effseg = cfg.MODEL.EFFSEG
        if cfg.TEST.CUDA_GRAPHS.ENABLED:
            raise ValueError(
                "TEST.CUDA_GRAPHS.ENABLED is True, but in EffSeg the number of regions decides what is computed, which "
                "no CUDA graph can follow: set it False"
            )
        backbone = build_backbone(cfg)
        channels = feature_channels(backbone, effseg.IN_FEATURES)
        check_levels(backbone, effseg.IN_FEATURES, effseg.LEVELS)
        return {
            "backbone": backbone,
            "in_features": effseg.IN_FEATURES,
            "neck": build_neck(effseg, channels),
            "detector": FQDet(
                width=effseg.HIDDEN_DIM,
                levels=effseg.LEVELS,
                num_queries=effseg.NUM_QUERIES,
                num_classes=effseg.NUM_CLASSES,
                num_layers=effseg.DEC_LAYERS,
                num_heads=effseg.NUM_HEADS,
                num_points=effseg.DEC_POINTS,
                ffn_dim=effseg.DIM_FEEDFORWARD,
                version=effseg.VERSION,
            ),
            "criterion": FQDetCriterion(
                effseg.VERSION, effseg.SELECTION_WEIGHT, effseg.CLASS_WEIGHT, effseg.BOX_WEIGHT
            ),
            "mask_head": build_mask_head(effseg),
            "loss_reduction": effseg.LOSS_REDUCTION,
            "max_train_regions": effseg.MAX_TRAIN_REGIONS,
            "nms_threshold": effseg.NMS_THRESHOLD,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "mask_export": effseg.MASK_EXPORT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def training_losses(self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses of a batch of normalised images, whose mean over the processes is the whole batch's loss."""
        maps, output = self.predict(images)
        instances = [instances_to_device(item["instances"], self.device) for item in batched_inputs]
        boxes = [x.gt_boxes.tensor for x in instances]
        labels = [x.gt_classes for x in instances]
        losses, matches = self.criterion(output, boxes, labels)
        if self.mask_head is not None:
            canvas = canvas_size(images)
            masks = [pad_masks(instance_masks(x), canvas) for x in instances]
            matches = matches.limit(self.max_train_regions, len(instances), self.processes)
            regions = matched_regions(output, matches, labels)
            targets = RegionTargets(masks, matches.target)
            losses = {**losses, **self.mask_head.losses(maps, canvas, regions, targets)}
        return {name: self.processes.count * loss for name, loss in losses.items()}

    def inference(self, images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of every image, scaled to (height, width) of ``sizes``."""
        return self.detect(*self.predict(images), images, sizes)

    def predict(self, images: ImageList) -> tuple[list[Tensor], FQDetOutput]:
        """The levels of the pyramid (B, C, H_l, W_l), and what the detector says, for a batch of normalised images."""
        features = self.backbone(images.tensor)
        maps = self.neck([features[name] for name in self.in_features])
        return maps, self.detector(maps, canvas_size(images))

    def detect(
        self, maps: Sequence[Tensor], output: FQDetOutput, images: ImageList, sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """From what ``predict`` returned to detections.

        Args:
            maps, output: of ``predict``.
            images: the batch.
            sizes: (height, width) of every image to which boxes and masks are scaled.

        Returns:
            per image ``pred_boxes`` (clipped; empty ones are left out), ``scores``, ``pred_classes``, ``pred_queries``
            and, with a segmentation head, ``pred_masks`` (empty ones are left out), by descending score. The score is
            the probability of the class, times the mean probability of the mask's foreground if there are masks.
        """
        results = []
        for image, size in enumerate(sizes):
            found = self.select(output, image)
            height, width = images.image_sizes[image]
            boxes = Boxes(found.boxes.clone())
            boxes.clip((height, width))
            boxes.scale(size[1] / width, size[0] / height)
            scores, labels, queries, kept = found.scores, found.labels, found.queries, boxes.nonempty()
            if self.mask_head is not None:
                region, probabilities, region_boxes = self.segment(maps, output, image, found, canvas_size(images))
                masks, certainty = paste_and_resize(
                    probabilities, region_boxes, canvas_size(images), (height, width), size, self.mask_export
                )
                boxes = Boxes(to_device(boxes.tensor, self.device))
                scores, labels, queries, kept = (to_device(x, self.device) for x in (scores, labels, queries, kept))
                scores = scores * certainty[region]
                kept = kept & masks.flatten(1).any(1)[region]
            (rows,) = kept.nonzero(as_tuple=True)
            rows = rows[scores[rows].argsort(descending=True, stable=True)]
            instances = Instances(size)
            instances.pred_boxes = boxes[rows]
            instances.scores = scores[rows]
            instances.pred_classes = labels[rows]
            instances.pred_queries = queries[rows]
            if self.mask_head is not None:
                instances.pred_masks = masks[region[rows]]
            results.append(instances_to_device(instances, self.device))
        return results

    def select(self, output: FQDetOutput, image: int) -> Detections:
        """The pairs of query and class that count in an image, by descending probability, on the CPU."""
        return detect(
            full_precision(output.class_logits[image]),
            output.boxes[image],
            self.nms_threshold,
            self.detections_per_image,
            drop_empty=self.mask_head is None,  # the release's segmentation heads do not
        )

    def segment(
        self, maps: Sequence[Tensor], output: FQDetOutput, image: int, found: Detections, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Square masks for the detections of an image.

        Returns:
            the region (D,) of every detection, and the regions' probabilities (n, S, S) and boxes (n, 4).
        """
        assert self.mask_head is not None
        region, _, regions = self.regions(output, image, found)
        maps = [feature[image : image + 1] for feature in maps]
        return region, self.mask_head(maps, canvas, regions), regions.boxes

    def regions(self, output: FQDetOutput, image: int, found: Detections) -> tuple[Tensor, Tensor, Regions]:
        """What the segmentation head gets for the detections of an image.

        Returns:
            the region (D,) of every detection; the query (n,) of every region, ascending where masks do not depend on
            classes; the regions, whose maps are those of this image alone.
        """
        assert self.mask_head is not None
        if self.mask_head.per_class:  # every pair of query and class has a mask of its own
            queries, labels = found.queries, found.labels
            region = torch.arange(len(queries), device=queries.device)
        else:
            queries, region = found.queries.unique(return_inverse=True)
            labels = torch.zeros_like(queries)
        region, queries, labels = (to_device(x, self.device) for x in (region, queries, labels))
        images = torch.zeros_like(queries)
        return region, queries, Regions(output.boxes[image, queries], images, output.queries[image, queries], labels)


def check_levels(backbone: Backbone, in_features: Sequence[str], levels: Sequence[int]) -> None:
    """Whether the pyramid's levels continue those of the backbone's maps.

    Raises:
        ValueError: they do not.
    """
    shapes = backbone.output_shape()
    own = [shapes[name].stride.bit_length() - 1 for name in in_features]
    wanted = [*own, *range(own[-1] + 1, own[-1] + 1 + len(levels) - len(own))] if own else []
    if list(levels) != wanted or not own:
        raise ValueError(
            f"MODEL.EFFSEG.LEVELS is {list(levels)}, but the backbone's maps {list(in_features)} are of the "
            f"levels {own}: the pyramid has these and the ones that follow them"
        )


def canvas_size(images: ImageList) -> tuple[int, int]:
    """Height and width of the padded images."""
    return images.tensor.shape[-2], images.tensor.shape[-1]


def pad_masks(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(T, H, W) of an image -> (T, *canvas), padded with background at the right and the bottom."""
    return F.pad(masks, (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))


def matched_regions(output: FQDetOutput, matches: Matches, labels: Sequence[Tensor]) -> Regions:
    """The matched queries with their predicted boxes and the classes (T,) of their targets.

    As in the release, the box head learns nothing from masks, although EffSeg reads maps at places within the boxes.
    """
    return Regions(
        boxes=output.boxes.detach()[matches.image, matches.query],
        images=matches.image,
        queries=output.queries[matches.image, matches.query],
        labels=torch.cat(list(labels))[matches.flat_target([len(x) for x in labels])],
    )
