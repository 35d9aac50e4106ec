"""Large images in overlapping slices, whose detections are merged across the slices' borders.

The slices are those of the package sahi (Akyon et al. 2022, "Slicing Aided Hyper Inference"). Its merging is not used:
by boxes of which one covers half of the other it takes an object in front of another one for a part of that, leaves an
object in parts that is larger than the overlap, and makes polygons of masks, which lose holes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from torch import nn
from torchvision.ops import box_iou

from querymask.common.data.augmentation import build_augmentations
from querymask.common.packages import import_package
from querymask.common.run_length_masks import RunLengthMasks
from querymask.common.transfer import instances_to_host

AGREEMENT = 0.5
"""Two detections are of one object if their IoU is that where both slices see it."""

Box = tuple[int, int, int, int]


class SlicedModel(nn.Module):
    """A model that sees an image in slices.

    Its inputs have ``image`` at full size, without augmentation; its detections have no ``pred_queries``, and masks are
    :class:`RunLengthMasks`.

    Args:
        model: of Detectron2's contract, in evaluation mode.
        size: side of the slices, in pixels of the image.
        overlap: of neighbours, in parts of the size.
        augmentations: of every slice, as of an image in evaluation.
    """

    def __init__(self, model: nn.Module, size: int, overlap: float, augmentations: Sequence[T.Augmentation]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.overlap = overlap
        self._augmentations = T.AugmentationList(augmentations)
        self.train(model.training)
        import_sahi()

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "SlicedModel":
        """What ``TEST.SLICE`` says.

        Raises:
            ValueError: the overlap leaves nothing by which slices could be merged, or no slices; the model is panoptic.
            ImportError: sahi is not installed.
        """
        size, overlap = cfg.TEST.SLICE.SIZE, cfg.TEST.SLICE.OVERLAP
        if cfg.MODEL.PANOPTIC.ENABLED:
            raise ValueError(
                f"TEST.SLICE.SIZE is {size}, but the panoptic maps of slices are not merged to one of the image: set "
                "TEST.SLICE.SIZE 0, or MODEL.PANOPTIC.ENABLED False for instances"
            )
        if not 1 <= size * overlap < size:
            raise ValueError(
                f"TEST.SLICE.OVERLAP is {overlap} of slices of TEST.SLICE.SIZE {size} pixels: set it so that "
                "neighbours share at least a pixel, and below 1"
            )
        return cls(model, size, overlap, build_augmentations(cfg, is_train=False))

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._detect(item["image"])} for item in batched_inputs]

    def _detect(self, image: torch.Tensor) -> Instances:
        """Detections in an image, uint8 [3, H, W] on the host."""
        size = (image.shape[1], image.shape[2])
        slices = slice_boxes(*size, self.size, self.overlap)
        found = []
        for x0, y0, x1, y1 in slices:
            aug_input = T.AugInput(np.ascontiguousarray(image[:, y0:y1, x0:x1].permute(1, 2, 0).numpy()))
            self._augmentations(aug_input)
            part = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
            (output,) = self.model([{"image": part, "height": y1 - y0, "width": x1 - x0}])
            found.append(place(instances_to_host(output["instances"]), x0, y0, size))
        return merge(slices, found)


def import_sahi() -> Any:
    """The module of sahi's slices.

    Raises:
        ImportError: it is not installed.
    """
    return import_package("sahi.slicing", "slices of images need", "querymask[sahi]")


def slice_boxes(height: int, width: int, size: int, overlap: float) -> list[Box]:
    """XYXY of the slices of an image, row by row; the last ones of a row and a column end with the image."""
    boxes = import_sahi().get_slice_bboxes(height, width, size, size, False, overlap, overlap)
    return [tuple(box) for box in boxes]


def place(instances: Instances, x: int, y: int, size: tuple[int, int]) -> Instances:
    """The detections of a slice that begins at (x, y) in the image of height and width ``size``."""
    placed = Instances(size, scores=instances.scores, pred_classes=instances.pred_classes)
    if instances.has("pred_boxes"):
        placed.pred_boxes = Boxes(instances.pred_boxes.tensor + torch.tensor([x, y, x, y]))
    if instances.has("pred_masks"):
        placed.pred_masks = RunLengthMasks.place(instances.pred_masks, x, y, size)
    return placed


def resize(instances: Instances, height: int, width: int) -> Instances:
    """The detections in a smaller image of this height and width."""
    resized = Instances((height, width), **instances.get_fields())
    if instances.has("pred_boxes"):
        resized.pred_boxes = Boxes(instances.pred_boxes.tensor.clone())
        resized.pred_boxes.scale(width / instances.image_size[1], height / instances.image_size[0])
    if instances.has("pred_masks"):
        resized.pred_masks = instances.pred_masks.resize(height, width)
    return resized


def merge(slices: Sequence[Box], found: Sequence[Instances]) -> Instances:
    """The detections of all slices as those of the image, by descending score.

    Every two slices that overlap pair their detections of a class, each with one at most, which agree in what both
    slices see: those are of one object. It has the union of the masks, the box around the boxes and the highest score
    of the detections that pairs connect.

    Args:
        found: what ``place`` gives for each of the slices, with the same fields.
    """
    firsts = np.cumsum([0, *map(len, found)])
    groups = np.arange(firsts[-1])
    for a in range(len(slices)):
        for b in range(a + 1, len(slices)):
            for i, j in _pairs(_common(slices[a], slices[b]), found[a], found[b]):
                groups[groups == groups[firsts[b] + j]] = groups[firsts[a] + i]
    return _united(found, groups)


def _common(first: Box, second: Box) -> Box:
    """XYXY of what two slices share; of no area, or turned, where there is nothing."""
    return (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))


def _pairs(region: Box, first: Instances, second: Instances) -> list[tuple[int, int]]:
    """Which detections of two slices agree in the region that both see, surer pairs first."""
    if region[0] >= region[2] or region[1] >= region[3]:
        return []
    near = [_reaching(region, instances) for instances in (first, second)]
    if not len(near[0]) or not len(near[1]):
        return []
    a, b = first[near[0]], second[near[1]]
    values = _overlaps(region, a, b) * (a.pred_classes[:, None] == b.pred_classes).numpy()
    values[values < AGREEMENT] = 0
    values *= (a.scores[:, None] * b.scores).numpy()
    pairs = []
    while values.any():
        i, j = np.unravel_index(values.argmax(), values.shape)
        values[i], values[:, j] = 0, 0
        pairs.append((int(near[0][i]), int(near[1][j])))
    return pairs


def _reaching(region: Box, instances: Instances) -> np.ndarray:
    """Numbers of the detections that have a part in the region, by their masks where there are some."""
    boxes = instances.pred_masks.boxes() if instances.has("pred_masks") else instances.pred_boxes.tensor.numpy()
    inside = np.minimum(boxes[:, 2:], region[2:]) > np.maximum(boxes[:, :2], region[:2])
    return inside.all(axis=1).nonzero()[0]


def _overlaps(region: Box, first: Instances, second: Instances) -> np.ndarray:
    """(n, m) IoU in the region: of masks, of boxes where there are none."""
    if not first.has("pred_masks"):
        limits = torch.tensor(region[:2] * 2), torch.tensor(region[2:] * 2)
        return box_iou(*(x.pred_boxes.tensor.clamp(*limits) for x in (first, second))).numpy()
    x0, y0, x1, y1 = region
    square = torch.ones(1, y1 - y0, x1 - x0, dtype=torch.bool)
    (window,) = RunLengthMasks.place(square, x0, y0, first.image_size).lengths
    parts = [[mask_util.merge([rle, window], True) for rle in x.pred_masks.lengths] for x in (first, second)]
    return mask_util.iou(*parts, [0] * len(second))


def _united(found: Sequence[Instances], groups: np.ndarray) -> Instances:
    """The detections of every group as one."""
    scores = torch.cat([instances.scores for instances in found])
    classes = torch.cat([instances.pred_classes for instances in found])
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    members.sort(key=lambda numbers: -scores[numbers].max())
    result = Instances(found[0].image_size)
    result.scores = torch.tensor([scores[numbers].max() for numbers in members])
    result.pred_classes = classes[[numbers[0] for numbers in members]]
    if found[0].has("pred_boxes"):
        boxes = torch.cat([instances.pred_boxes.tensor for instances in found])
        around = [torch.cat([boxes[n, :2].amin(dim=0), boxes[n, 2:].amax(dim=0)]) for n in members]
        result.pred_boxes = Boxes(torch.stack(around) if around else boxes)
    if found[0].has("pred_masks"):
        lengths = [rle for instances in found for rle in instances.pred_masks.lengths]
        united = [mask_util.merge([lengths[i] for i in n]) if len(n) > 1 else lengths[n[0]] for n in members]
        result.pred_masks = RunLengthMasks(found[0].image_size, united)
    return result
