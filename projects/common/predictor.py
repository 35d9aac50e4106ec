"""From an image to its detections, with memory that does not grow with the photograph."""

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances

from querymask.common.data.augmentation import build_augmentations
from querymask.common.engine.checkpointer import StrictCheckpointer
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.engine.class_names import shown
from querymask.common.engine.unused_keys import check_unused_keys
from querymask.common.slicing import SlicedModel, resize
from querymask.common.transfer import instances_to_host

logger = logging.getLogger(__name__)

LONGEST_SIDE = 1280
"""Pixels of the longer side of pictures and masks, if not chosen; what the drawing code reduces images to."""


class Predictor:
    """A model with its weights, for one image at a time.

    The network sees the image as in evaluation. Masks are made at a reduced size where the image is larger than
    ``longest_side``: 100 masks of a photograph of 4000x3000 pixels would take 1.2 GB, at 1280x960 they take 123 MB.

    Args:
        cfg: with MODEL.WEIGHTS; random weights where it is empty. ``TEST.SLICE`` counts, too.
        longest_side: of masks and reduced images, in pixels; 0: no limit.

    Attributes:
        class_names: of the model's classes, by ``class_names``.
    """

    def __init__(self, cfg: CfgNode, longest_side: int = LONGEST_SIDE) -> None:
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: the predictor knows RGB and BGR")
        check_unused_keys(cfg)
        self.model = build_model(cfg).eval()
        checkpointer = StrictCheckpointer(self.model, cfg=cfg, complete=True)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        self.class_names = class_names(cfg, checkpointer.class_names)
        self.longest_side = longest_side
        self._sliced = cfg.TEST.SLICE.SIZE > 0
        if self._sliced:
            self.model = SlicedModel.from_config(cfg, self.model).eval()
        self._format = cfg.INPUT.FORMAT
        self._augmentations = T.AugmentationList(() if self._sliced else build_augmentations(cfg, is_train=False))

    def prepare(self, image: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """The model's input, and the image at the size of the detections.

        Args:
            image: uint8 [H, W, 3] RGB.

        Returns:
            input with ``image``, ``height`` and ``width``; uint8 [height, width, 3] RGB.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"the predictor needs a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
        aug_input = T.AugInput(image if self._format == "RGB" else np.ascontiguousarray(image[:, :, ::-1]))
        self._augmentations(aug_input)
        height, width = image.shape[:2]
        scale = min(1.0, self.longest_side / max(height, width)) if self.longest_side else 1.0
        if scale < 1:
            height, width = max(round(height * scale), 1), max(round(width * scale), 1)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        tensor = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}, np.ascontiguousarray(image)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, score_threshold: float = 0.0) -> tuple[Instances, np.ndarray]:
        """Detections with at least this score, on the CPU, and the image at their size."""
        item, reduced = self.prepare(image)
        (output,) = self.model([item])
        instances = output["instances"]
        (kept,) = (instances.scores >= score_threshold).nonzero(as_tuple=True)
        instances = instances_to_host(instances[kept])
        return resize(instances, *reduced.shape[:2]) if self._sliced else instances, reduced


def class_names(cfg: CfgNode, of_checkpoint: Sequence[str] = ()) -> Sequence[str]:
    """Names of the classes: ``MODEL.CLASS_NAMES``, the checkpoint's, or those of a data set in the metadata.

    Data sets are those of DATASETS, known by their metadata; the images are not needed. Names whose number is not that
    of the model's classes are left out: nothing tells which class would be which.

    Args:
        of_checkpoint: ``StrictCheckpointer.class_names``.

    Returns:
        the names, or nothing where they are not known.
    """
    key = num_classes_key(cfg)
    number = None if key is None else get_key(cfg, key)
    configured = list(cfg.MODEL.CLASS_NAMES)
    if configured and number not in (None, len(configured)):
        raise ValueError(
            f"MODEL.CLASS_NAMES has {len(configured)} names, {key} is {number}: give as many, or [] for those known"
        )
    if configured and of_checkpoint and configured != list(of_checkpoint):
        logger.warning(f"MODEL.CLASS_NAMES is used, {shown(configured)}; the checkpoint has {shown(of_checkpoint)}")
    of_data = (MetadataCatalog.get(name).get("thing_classes") for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN))
    for names in (configured, of_checkpoint, *of_data):
        if names and number in (None, len(names)):
            return [str(name) for name in names]
    return ()
