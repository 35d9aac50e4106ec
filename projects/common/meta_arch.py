"""A meta-architecture is a backbone, a detector and a mask branch: from Detectron2's inputs to losses, detections or
panoptic maps.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from querymask.common.backbones.frozen_norm import keep_frozen_factors
from querymask.common.compat import has_event_storage
from querymask.common.cuda_graphs import CudaGraphs, build_cuda_graphs
from querymask.common.detector import Detector
from querymask.common.images import Canvas, batch_images
from querymask.common.layers import recompute_layers
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.panoptic import PanopticRule, merge, panoptic_output
from querymask.common.predictions import Assignment, Predictions, Targets, weighted
from querymask.common.transfer import HostCopy

LOGGED = ("class_error", "cardinality_error")
"""Statistics of detectors that are logged."""
LOG_PERIOD = 20  # iterations between them


class QuerySegmenter(nn.Module):
    """Queries that become instances or segments. Subclasses are the methods: each says which detector, and which masks
    are its own.

    Args:
        backbone: gives the maps that detector and mask branch read.
        detector: finds objects.
        mask_branch: makes their masks; None: boxes only.
        pixel_mean, pixel_std: per channel, for pixels in 0..255.
        freeze_detector: train the mask branch alone; dropout goes on in training.
        use_checkpoint: layers are computed again in the backward pass.
        graphs: what repeats the network in inference; None: it is run as it is.
        graph_divisibility: with graphs, height and width are multiples of it, too.
        panoptic: how queries become a panoptic map; None: they become instances.

    Attributes:
        detector_type: of the method.
        own_mask_branch: of the method, where ``MODEL.MASK_BRANCH.NAME`` says nothing.
        moved: names in checkpoints from before the parts had names: patterns, and what today has in their place.
    """

    detector_type: type[Detector]
    own_mask_branch: type[MaskBranch]
    moved: Sequence[tuple[str, str]] = ()

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        detector: Detector,
        mask_branch: MaskBranch | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        freeze_detector: bool = False,
        use_checkpoint: bool = False,
        size_divisibility: int = 0,
        graphs: CudaGraphs | None = None,
        graph_divisibility: int = 1,
        panoptic: PanopticRule | None = None,
    ) -> None:
        super().__init__()
        self.graphs = graphs
        self.graph_divisibility = graph_divisibility
        self.panoptic = panoptic
        self.backbone = backbone
        self.detector = detector
        self.mask_branch = mask_branch
        detector.masks_follow = mask_branch is not None
        parts = [detector] if mask_branch is None else [detector, mask_branch]
        if size_divisibility < 0:
            raise ValueError(f"MODEL.SIZE_DIVISIBILITY is {size_divisibility}: set 0 or a positive number")
        needed = max(backbone.size_divisibility, *(part.size_divisibility for part in parts))
        self.size_divisibility = math.lcm(needed, size_divisibility) or max(needed, size_divisibility)  # lcm(0, n) is 0
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self._unwritten: tuple[int, HostCopy] | None = None
        if use_checkpoint:
            recompute_layers(self)
        if freeze_detector:
            backbone.requires_grad_(False)
            detector.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        backbone = keep_frozen_factors(build_backbone(cfg))
        shapes = backbone.output_shape()
        detector = cls.detector_type.from_config(cfg, shapes)
        name = cls.mask_branch_name(cfg)
        branch = None
        if name != "none":
            if name not in MASK_BRANCH_REGISTRY:
                known = ", ".join(sorted(dict(MASK_BRANCH_REGISTRY)))
                raise ValueError(f"MODEL.MASK_BRANCH.NAME is {name!r}: choose one of {known}, or none")
            branch_type = MASK_BRANCH_REGISTRY.get(name)
            if branch_type.needs_boxes and not detector.has_boxes:
                raise ValueError(
                    f"{name} makes masks of boxes, and {type(detector).__name__} has no boxes: choose another "
                    "MODEL.MASK_BRANCH.NAME"
                )
            branch = branch_type.from_config(cfg, detector, shapes)
        elif not detector.has_boxes:
            raise ValueError(
                f"{cls.detector_type.__name__} has no boxes, so without masks it finds nothing: choose a mask branch"
            )
        panoptic = None
        if cfg.MODEL.PANOPTIC.ENABLED:
            if branch is None:
                raise ValueError(
                    "MODEL.PANOPTIC.ENABLED is True, but MODEL.MASK_BRANCH.NAME is none, and segments need masks: "
                    "choose a mask branch"
                )
            panoptic = PanopticRule.from_config(cfg, detector.num_classes)
        if cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR and branch is None:
            raise ValueError(
                "MODEL.MASK_BRANCH.FREEZE_DETECTOR leaves nothing to train where MODEL.MASK_BRANCH.NAME is none: set "
                "it False"
            )
        return {
            "backbone": backbone,
            "detector": detector,
            "mask_branch": branch,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "freeze_detector": cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR,
            "use_checkpoint": cfg.MODEL.USE_CHECKPOINT,
            "size_divisibility": cfg.MODEL.SIZE_DIVISIBILITY,
            **graph_arguments(cfg, [detector] if branch is None else [detector, branch]),
            "panoptic": panoptic,
        }

    @classmethod
    def mask_branch_name(cls, cfg: CfgNode) -> str:
        """Name of the mask branch in the registry, or "none"."""
        return cfg.MODEL.MASK_BRANCH.NAME or cls.own_mask_branch.__name__

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Detectron2's contract: weighted losses in training; otherwise ``{"instances": Instances}`` per image, or
        ``{"panoptic_seg": (ids, segments)}`` of :func:`panoptic_output`.
        """
        images = self.preprocess(batched_inputs)
        found, made = self.predict(images) if self.training else self.predict_for_inference(images)
        if self.training:
            targets = self.targets(batched_inputs)
            return self.training_losses(found, made, targets)
        sizes = [
            (item.get("height", size[0]), item.get("width", size[1]))
            for item, size in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        if self.panoptic is not None:
            return [{"panoptic_seg": output} for output in self.segment(found, made, sizes)]
        return [{"instances": instances} for instances in self.detect(found, made, sizes)]

    def preprocess(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Normalise, then pad with zeros at the right and the bottom to one size."""
        divisibility = self.size_divisibility
        if self.graphs is not None and not self.training:
            divisibility = math.lcm(max(divisibility, 1), self.graph_divisibility)
        return batch_images(batched_inputs, self.pixel_mean, self.pixel_std, divisibility)

    def targets(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Targets:
        """What the parts of the model learn from a batch."""
        with_masks = self.mask_branch is not None
        return Targets.from_inputs(batched_inputs, self.device, with_masks, with_boxes=self.detector.has_boxes)

    def predict(self, images: ImageList) -> tuple[Predictions, Any]:
        """What the detector finds in a batch of normalised images, and what all masks are made of."""
        found, made = self.network(*self.network_inputs(images))
        return replace(found, image_sizes=images.image_sizes), made

    def predict_for_inference(self, images: ImageList) -> tuple[Predictions, Any]:
        """``predict``, as a CUDA graph where those are on: then the next call overwrites the tensors of this one."""
        if self.graphs is None:
            return self.predict(images)
        found, made = self.graphs(self.network, *self.network_inputs(images))
        return replace(found, image_sizes=images.image_sizes), made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.graphs is not None:
            self.graphs.clear()  # parameters move
        return super()._apply(fn, recurse)

    def network_inputs(self, images: ImageList) -> tuple[Tensor, Tensor, Tensor, bool]:
        """What ``network`` reads of a batch: tensors on the device, and constants."""
        canvas = Canvas.of(images)
        return images.tensor, canvas.padding, canvas.sides, canvas.padded

    def network(self, images: Tensor, padding: Tensor, sides: Tensor, padded: bool) -> tuple[Predictions, Any]:
        """``predict`` from ``network_inputs``; where the parts are capturable, without a wait or a copy from the host.

        Args:
            images: (B, 3, H, W), normalised.
            padding, sides, padded: as in :class:`Canvas`.
        """
        padded = torch.compiler.is_dynamo_compiling() or padded  # what is compiled serves all batches of a size
        canvas = Canvas((images.shape[-2], images.shape[-1]), padding, sides, padded)
        found = self.detector(self.backbone(images), canvas)
        return found, None if self.mask_branch is None else self.mask_branch(found)

    def training_losses(self, found: Predictions, made: Any, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses of what ``predict`` gave."""
        truth = None if self.mask_branch is None else self.mask_branch.encode(targets, found)
        assignment = self.match(found, made, truth, targets)
        self._log_statistics(found, targets, assignment)
        normalizers = self.detector.normalizers(targets, assignment)
        terms = self.detector.losses(found, targets, assignment, normalizers)
        if self.mask_branch is not None:
            terms = terms + self.mask_branch.losses(found, made, truth, targets, assignment, normalizers)
        return weighted(terms)

    @torch.no_grad()
    def match(self, found: Predictions, made: Any, truth: Any, targets: Targets) -> Assignment:
        """The assignment of targets to queries, in which the mask branch may have a say."""
        costs = {} if self.mask_branch is None else self.mask_branch.costs(found, made, truth, targets)
        return self.detector.match(found, targets, costs)

    def detect(
        self, found: Predictions, made: Any, sizes: Sequence[tuple[int, int]], layer: int | None = None
    ) -> list[Instances]:
        """Detections of every image.

        Args:
            found, made: of ``predict``.
            sizes: (height, width) of every image to which boxes and masks are scaled.
            layer: of the queries; None: the last one, or what the config asks for.

        Returns:
            per image ``scores``, ``pred_classes``, ``pred_queries`` and, where the detector has boxes and the model a
            mask branch, ``pred_boxes`` and ``pred_masks``.
        """
        results = []
        for image, size in enumerate(sizes):
            detections = self.detector.select(found, image, tuple(size), layer)
            if self.mask_branch is not None:
                detections = self.mask_branch.add_masks(found, made, image, detections, layer)
            if self.mask_branch is None or not self.mask_branch.finishes:
                detections = self.detector.finish(detections)
            results.append(detections)
        return results

    def segment(
        self, found: Predictions, made: Any, sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, list[dict[str, Any]]]]:
        """The panoptic map and the segments of every image, as of :func:`panoptic_output`, at these sizes."""
        assert self.mask_branch is not None and self.panoptic is not None and found.canvas is not None
        results = []
        for image, size in enumerate(sizes):
            queries, labels, scores = self.detector.select_queries(found, image)
            bands = self.mask_branch.bands(found, made, image, queries, labels)
            segments = merge(labels, scores, bands, found.canvas.size, self.panoptic)
            results.append(panoptic_output(segments, found.image_sizes[image], size, self.panoptic.num_things))
        return results

    def _log_statistics(self, found: Predictions, targets: Targets, assignment: Assignment) -> None:
        if not has_event_storage():
            return
        self._write_statistics()
        if (iteration := get_event_storage().iter) % LOG_PERIOD == 0:
            named = self.detector.statistics(found, targets, assignment)
            if not named:
                return
            self._unwritten = iteration, HostCopy(torch.stack([named[name] for name in LOGGED]))
            if found.logits.device.type == "cpu":
                self._write_statistics()

    def _write_statistics(self) -> None:
        """Those of the last time that are not yet in the storage: on a GPU, read at once they would make it wait."""
        if self._unwritten is None:
            return
        (iteration, values), self._unwritten = self._unwritten, None
        storage = get_event_storage()
        now, storage.iter = storage.iter, iteration
        storage.put_scalars(smoothing_hint=False, **dict(zip(LOGGED, values.read().tolist(), strict=True)))
        storage.iter = now

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A hook would hold the model, which then is freed by the garbage collector only
        self.rename_moved(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def rename_moved(self, state: dict[str, Any], prefix: str = "") -> None:
        """Let the names of an older checkpoint be those of today, in place.

        Args:
            state: tensors by name.
            prefix: of the model's names in it.
        """
        for key in [key for key in state if key.startswith(prefix)]:
            name = key[len(prefix) :]
            for pattern, replacement in self.moved:
                if re.match(pattern, name):
                    state[prefix + re.sub(pattern, replacement, name)] = state.pop(key)
                    break


def graph_arguments(cfg: CfgNode, parts: Sequence[Detector | MaskBranch]) -> dict[str, Any]:
    """Arguments of the constructor of :class:`QuerySegmenter` that follow from ``TEST.CUDA_GRAPHS``.

    Raises:
        ValueError: graphs are asked for where they cannot be.
    """
    divisibility = cfg.TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY
    if divisibility < 1:
        raise ValueError(f"TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY is {divisibility}: set at least 1")
    other = [type(part).__name__ for part in parts if not part.capturable]
    if cfg.TEST.CUDA_GRAPHS.ENABLED and other:
        raise ValueError(
            f"TEST.CUDA_GRAPHS.ENABLED is True, but in {' and '.join(other)} values decide what is computed, which a "
            "graph cannot follow: set it False"
        )
    return {"graphs": build_cuda_graphs(cfg), "graph_divisibility": divisibility}


def feature_shapes(shapes: Mapping[str, ShapeSpec], names: Sequence[str]) -> list[ShapeSpec]:
    """Channels and strides of the backbone's maps ``names``.

    Raises:
        ValueError: it does not give one of them.
    """
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"IN_FEATURES names {missing}, but the backbone gives {sorted(shapes)}: name some of these, or have it "
            "give more by its OUT_FEATURES"
        )
    return [shapes[name] for name in names]


def mask_branch_name(cfg: CfgNode) -> str:
    """Name of the model's mask branch, "none" for boxes only; "" of other models than the project's."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return architecture.mask_branch_name(cfg) if issubclass(architecture, QuerySegmenter) else ""


def uses_masks(cfg: CfgNode) -> bool:
    """Whether the model makes masks; of other models than the project's, what ``MODEL.MASK_ON`` says."""
    name = mask_branch_name(cfg)
    return name != "none" if name else cfg.MODEL.MASK_ON
