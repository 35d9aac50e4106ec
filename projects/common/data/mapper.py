"""From an entry of a data set to the input of a model."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from querymask.common.data.annotations import Findings, ImageInfo, clean_record
from querymask.common.data.augmentation import build_augmentations
from querymask.common.data.image_files import ImageFileError, ImageReader
from querymask.common.data.segment_maps import annotations_with_masks
from querymask.common.data.segmentation import decode_segmentation
from querymask.common.meta_arch import uses_masks

# Augmented boxes with a side of at most this many pixels are degenerate (Detectron2's own threshold)
_MIN_BOX_SIDE = 1e-5

logger = logging.getLogger(__name__)


class InstanceMapper:
    """Callable that maps an entry of a data set in Detectron2's format to a model input.

    Training: crowd annotations are dropped; boxes are augmented and clipped, and empty ones dropped; they are **not**
    shrunk to what a crop leaves of the mask (DETR). Masks are rasterised at the image's own resolution, then augmented
    with nearest-neighbour sampling. Images without instances stay: keep DATALOADER.FILTER_EMPTY_ANNOTATIONS False
    for them to arrive here.

    An entry of a panoptic data set gives a target for each segment that is no crowd, thing or stuff, whose mask is that
    of the PNG file.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Sequence[T.Augmentation],
        reader: ImageReader = ImageReader(),  # noqa: B008 (it is immutable)
        use_masks: bool = True,
        max_instances: int = 0,
        drop_empty_masks: bool = False,
        num_classes: int | None = None,
        skip_empty: bool = False,
    ) -> None:
        """
        Args:
            is_train: whether to produce ``instances``.
            augmentations: applied one after the other.
            reader: of the image files.
            use_masks: whether ``instances`` have ``gt_masks``.
            max_instances: use a random choice of at most this many instances of an image; 0: all.
            drop_empty_masks: leave out instances of which the augmentations left no pixel.
            num_classes: of the model, for a check of the annotations; None: no check.
            skip_empty: give None for a training image without instances after augmentation: the loader takes another.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.reader = reader
        self.use_masks = use_masks
        self.max_instances = max_instances
        self.drop_empty_masks = drop_empty_masks
        self.num_classes = num_classes
        self.skip_empty = skip_empty
        self._told = False
        # Whether a file with an EXIF orientation was met
        self._met_turned = False

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments from INPUT and from the method's own section, MODEL.<META_ARCHITECTURE>."""
        method = cfg.MODEL.get(cfg.MODEL.META_ARCHITECTURE.upper(), CfgNode())
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "reader": ImageReader.from_config(cfg, cfg.INPUT.FORMAT),
            "use_masks": uses_masks(cfg),
            "max_instances": cfg.INPUT.MAX_INSTANCES,
            "drop_empty_masks": cfg.INPUT.DROP_EMPTY_MASKS,
            "num_classes": method.get("NUM_CLASSES"),
            "skip_empty": cfg.INPUT.REPLACE_EMPTY,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """
        Args:
            dataset_dict: an entry in Detectron2's standard format, left unchanged. Segmentations may be polygons,
                compressed or uncompressed RLE, or bitmasks (ndarray [H, W]).

        Returns:
            The entry without its annotations and with ``image``, uint8 [3, H, W]; when training also ``instances``
            with ``gt_boxes`` (XYXY, pixels of ``image``), ``gt_classes`` int64 and ``gt_masks`` (BitMasks). None for
            an image to be skipped.

        Raises:
            RuntimeError: the image is missing or cannot be used.
            SizeMismatchError: it has another size than the entry says; a ValueError.
            ValueError: an annotation does not fit the image, the model or the task.
        """
        output = {k: value for k, value in dataset_dict.items() if k not in ("annotations", "segments_info")}
        image, orientation = self._read_image(dataset_dict)
        self._check_size(dataset_dict, image.shape[:2], orientation)
        output["height"], output["width"] = image.shape[:2]
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        output["image"] = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if self.is_train:
            output["instances"] = self._instances(dataset_dict, image.shape[:2], transforms, aug_input.image.shape[:2])
            if self.skip_empty and not len(output["instances"]):
                return None
        return output

    def _read_image(self, dataset_dict: dict[str, Any]) -> tuple[np.ndarray, int]:
        """The image and the EXIF orientation of its file."""
        try:
            return self.reader.read(dataset_dict["file_name"])
        except FileNotFoundError as error:
            raise RuntimeError(
                f"{_name(dataset_dict)}: there is no such file. Check the image folder that the data set was "
                "registered with, or the environment variable DETECTRON2_DATASETS (docs/data.md)."
            ) from error
        except ImageFileError as error:
            raise RuntimeError(
                f"{_name(dataset_dict)}: {error.reason} Or take the image out of the data set."
            ) from error

    def _check_size(self, dataset_dict: dict[str, Any], size: tuple[int, int], orientation: int) -> None:
        """Compare the entry's height and width, where given, with the (height, width) of the upright image."""
        stated = tuple(dataset_dict.get(key, side) for key, side in zip(("height", "width"), size))
        if stated != size:
            message = (
                f"{_name(dataset_dict)}: the image is {size[1]}x{size[0]} (width x height), the data set says "
                f"{stated[1]}x{stated[0]}. "
            )
            if orientation >= 5 and stated == size[::-1]:
                message += (
                    f"The file has EXIF orientation {orientation}, a rotation, which is applied; width and height are "
                    "those of the stored pixels, exchanged. If the annotations were drawn on the stored pixels, take "
                    "the tag out of the files (exiftool -Orientation= FILE); if on the upright image, exchange width "
                    "and height in the data set."
                )
            elif stated == size[::-1]:
                message += "Width and height are exchanged: correct the data set."
            else:
                message += "Correct width and height there, or take the image that the annotations were drawn on."
            raise utils.SizeMismatchError(message)
        if orientation > 1 and not self._met_turned:
            self._met_turned = True
            logger.warning(
                "%s: the file has EXIF orientation %d, which is applied, here and in all other files. Annotations are "
                "taken as drawn on the upright image; if they were drawn on the stored pixels, take the tag out of "
                "the files (exiftool -Orientation= FILE).",
                _name(dataset_dict),
                orientation,
            )

    def _instances(
        self,
        dataset_dict: dict[str, Any],
        size: tuple[int, int],
        transforms: T.TransformList,
        new_size: tuple[int, int],
    ) -> Instances:
        """Targets for an image that was (height, width) ``size`` and is ``new_size`` after the transforms."""
        if dataset_dict.get("annotations") is None:
            raise ValueError(
                f"{_name(dataset_dict)}: the entry has no 'annotations'. Training needs them; give an empty list where "
                "an image has no instances."
            )
        annotations = self._usable(dataset_dict, size)
        boxes = np.array([BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations])
        boxes = boxes.reshape(-1, 4).astype(np.float64)
        classes = [self._category(a, dataset_dict) for a in annotations]

        gt_boxes = Boxes(torch.from_numpy(transforms.apply_box(boxes).reshape(-1, 4).astype(np.float32)))
        gt_boxes.clip(new_size)
        kept = np.flatnonzero(gt_boxes.nonempty(threshold=_MIN_BOX_SIDE).numpy())
        if 0 < self.max_instances < len(kept):
            kept = np.sort(np.random.choice(kept, self.max_instances, replace=False))

        instances = Instances(new_size)
        instances.gt_boxes = gt_boxes[torch.from_numpy(kept)]
        instances.gt_classes = torch.tensor([classes[i] for i in kept], dtype=torch.int64)
        if self.use_masks:
            masks = np.zeros((len(kept), *new_size), dtype=bool)
            for mask, i in zip(masks, kept):
                mask[:] = transforms.apply_segmentation(_bitmask(annotations[i], size, dataset_dict))
            instances.gt_masks = BitMasks(torch.from_numpy(masks))
            if self.drop_empty_masks:
                instances = instances[instances.gt_masks.nonempty()]
        return instances

    def _category(self, annotation: dict[str, Any], dataset_dict: dict[str, Any]) -> int:
        category = int(annotation["category_id"])
        if category < 0 or (self.num_classes is not None and category >= self.num_classes):
            allowed = "from 0 on" if self.num_classes is None else f"0 to {self.num_classes - 1}"
            raise ValueError(
                f"{_name(dataset_dict)}: an annotation has category {category}, the model's are {allowed}. Set the "
                "method's NUM_CLASSES to the data set's number of classes; number its categories from 0 without gaps."
            )
        return category

    def _usable(self, dataset_dict: dict[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
        """The annotations that are trained on, checked: those of ``read_dataset`` are that already, others need it."""
        name = _name(dataset_dict)
        findings = Findings(name)
        image = ImageInfo(name, *size)
        annotations = annotations_with_masks(dataset_dict) if self.use_masks else dataset_dict["annotations"]
        clean = [
            clean_record(annotation, image, f"annotation {number}", findings)
            for number, annotation in enumerate(annotations)
        ]
        if (lines := findings.lines()) and not self._told:
            self._told = True
            logger.warning("%s. Others will be mended without a word.", "; ".join(lines))
        return [annotation for annotation in clean if annotation is not None and not annotation["iscrowd"]]


def _name(dataset_dict: dict[str, Any]) -> str:
    return f"{dataset_dict['file_name']} (image id {dataset_dict.get('image_id', 'not given')})"


def _bitmask(annotation: dict[str, Any], size: tuple[int, int], dataset_dict: dict[str, Any]) -> np.ndarray:
    """The segmentation of an annotation as uint8 [H, W] of the image's own ``size`` (height, width)."""
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        raise ValueError(
            f"{_name(dataset_dict)}: an annotation has no segmentation, but masks are wanted. Add segmentations to the "
            "data set, or train without masks (MODEL.MASK_BRANCH.NAME none)."
        )
    try:
        return decode_segmentation(segmentation, *size)
    except ValueError as error:
        raise ValueError(f"{_name(dataset_dict)}: {error}") from error
