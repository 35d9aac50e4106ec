"""From images to detections: a model with its weights, in batches and from several threads."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model

from querymask.common.data.augmentation import build_augmentations
from querymask.common.data.image_files import ImageFileError, ImageReader
from querymask.common.data.read_ahead import read_ahead
from querymask.common.detections import Detections, PanopticDetections
from querymask.common.engine.checkpointer import StrictCheckpointer
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.engine.class_names import shown
from querymask.common.engine.unused_keys import check_unused_keys
from querymask.common.export import ExportedModel, is_exported
from querymask.common.slicing import SlicedModel, resize
from querymask.common.transfer import instances_to_host
from querymask.common.views import View

logger = logging.getLogger(__name__)

Image = str | os.PathLike[str] | np.ndarray
"""A file, or pixels: uint8 [H, W, 3] RGB."""


class Predictor:
    """A model with its weights. Several threads may use one: the network is theirs in turn, reading files is not.

    The network sees an image as in evaluation.

    Args:
        cfg: with MODEL.WEIGHTS, a checkpoint or an exported model; random weights where it is empty. ``TEST.SLICE``
            counts, too.
        longest_side: of the image that boxes and masks are of, in pixels, where it is larger; 0: no limit. 100 masks of
            a photograph of 4000x3000 pixels take 1.2 GB, at 1280x960 they take 123 MB.

    Attributes:
        model: in evaluation mode, on MODEL.DEVICE.
        class_names: of the model's classes, by ``class_names``.
        reader: of image files.
    """

    def __init__(self, cfg: CfgNode, longest_side: int = 0) -> None:
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: the predictor knows RGB and BGR")
        check_unused_keys(cfg)
        if is_exported(cfg.MODEL.WEIGHTS):
            self.model = ExportedModel.from_config(cfg).eval()
            names = self.model.description.class_names
        else:
            self.model = build_model(cfg).eval()
            checkpointer = StrictCheckpointer(self.model, cfg=cfg, complete=True)
            checkpointer.load(cfg.MODEL.WEIGHTS)
            names = checkpointer.class_names
        self.class_names = class_names(cfg, names)
        self.reader = ImageReader.from_config(cfg)
        self.longest_side = longest_side
        self._sliced = cfg.TEST.SLICE.SIZE > 0
        if self._sliced:
            self.model = SlicedModel.from_config(cfg, self.model).eval()
        self._format = cfg.INPUT.FORMAT
        self._augmentations = T.AugmentationList(() if self._sliced else build_augmentations(cfg, is_train=False))
        self._lock = threading.Lock()

    @overload
    def __call__(self, images: Image, score_threshold: float = ..., batch_size: int = ...) -> Detections: ...

    @overload
    def __call__(
        self, images: Sequence[Image], score_threshold: float = ..., batch_size: int = ...
    ) -> list[Detections]: ...

    def __call__(
        self, images: Image | Sequence[Image], score_threshold: float = 0.0, batch_size: int = 1
    ) -> Detections | list[Detections]:
        """Detections of an image, or a list of those of several; ``stream`` does not hold all of them in memory.

        Those of a panoptic model are :class:`PanopticDetections`.

        Args:
            images: a path, or pixels as uint8 [H, W, 3] RGB (of OpenCV's: ``image[:, :, ::-1]``); or a list of these.
            score_threshold: detections of a lower score are left out.
            batch_size: images that the network sees at once. Those of other sizes are padded to the largest, by which
                scores change a little.

        Raises:
            ValueError, FileNotFoundError: an image cannot be used; the message names it and the remedy.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, score_threshold, batch_size))
        (detections,) = self.stream([images], score_threshold)
        return detections

    def stream(
        self, images: Iterable[Image], score_threshold: float = 0.0, batch_size: int = 1
    ) -> Iterator[Detections]:
        """Detections image by image, of any number: files are read while the network works, a batch ahead.

        Args:
            images, score_threshold, batch_size: as of ``__call__``.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        batch: list[dict[str, Any]] = []
        for _, prepared in read_ahead(self._read_and_prepare, enumerate(images), batch_size):
            batch.append(prepared.result())
            if len(batch) == batch_size:
                yield from self.detect(batch, score_threshold)
                batch = []
        if batch:
            yield from self.detect(batch, score_threshold)

    def _read_and_prepare(self, numbered: tuple[int, Image]) -> dict[str, Any]:
        number, image = numbered
        if isinstance(image, (str, os.PathLike)):
            return self.prepare(self.reader(image))[0]
        try:
            return self.prepare(image)[0]
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None

    def prepare(self, image: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """The model's input, and the image at the size of the detections.

        Args:
            image: uint8 [H, W, 3] RGB.

        Returns:
            input with ``image``, ``height`` and ``width``; uint8 [height, width, 3] RGB.
        """
        check_pixels(image)
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
    def detect(self, inputs: list[dict[str, Any]], score_threshold: float = 0.0) -> list[Detections]:
        """Detections with at least this score, of inputs that ``prepare`` made, as one batch."""
        with self._lock:  # a CUDA graph overwrites what its last call gave
            found: list[Detections] = []
            for item, output in zip(inputs, self.model(inputs)):
                if "panoptic_seg" in output:
                    segments = output["panoptic_seg"]
                    found.append(PanopticDetections.from_output(segments, self.class_names, score_threshold))
                    continue
                scores, order = output["instances"].scores.sort(descending=True, stable=True)
                instances = instances_to_host(output["instances"][order[scores >= score_threshold]])
                instances = resize(instances, item["height"], item["width"]) if self._sliced else instances
                found.append(Detections.from_instances(instances, self.class_names))
        return found

    def draw_view(self, view: View, item: dict[str, Any], image: np.ndarray, score_threshold: float) -> np.ndarray:
        """The picture of a view, uint8 [H', W', 3] RGB.

        Args:
            item, image: that ``prepare`` made.
            score_threshold: least score drawn.
        """
        with self._lock:  # a view may change what the network gives while it looks
            return view(self.model, item, image, self.class_names, score_threshold)


def explain(file: str | os.PathLike[str], error: Exception) -> str:
    """What happened to the file of an image that was read or looked at."""
    if isinstance(error, ImageFileError):
        return f"{file} cannot be read: {error.reason}"
    if isinstance(error, FileNotFoundError):  # a link to nothing
        return f"{file} cannot be read: there is no such file"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        torch.cuda.empty_cache()
        return f"{file} cannot be drawn: out of memory; set a smaller INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST"
    return f"{file} cannot be drawn: {type(error).__name__}: {error}"


def check_pixels(image: Any) -> None:
    """Refuse what is no uint8 [H, W, 3], with the way to make it one.

    Raises:
        ValueError: naming what was given and the remedy.
    """
    if not isinstance(image, np.ndarray):
        given, remedy = type(image).__name__, "Give a path, or the pixels as a NumPy array: np.asarray(image)"
    else:
        given = f"{image.dtype} {list(image.shape)}"
        channels = image.shape[2] if image.ndim == 3 else None
        if image.dtype == np.uint8 and channels == 3 and image.size:
            return
        if not image.size:
            remedy = "It has no pixels"
        elif image.ndim == 4:
            remedy = "Give several images as a list"
        elif channels == 3:
            remedy = "Map its values to 0..255 as in training, and round: image.astype(np.uint8)"
        elif image.ndim == 2 or channels == 1:
            remedy = "It is grey: np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2) has three channels"
        elif channels == 4:
            remedy = "It has an alpha channel: image[:, :, :3] is without"
        elif channels is not None and image.shape[0] in (1, 3):
            remedy = "Its channels come first: image.transpose(1, 2, 0) has them last"
        else:
            remedy = "Choose three channels"
    raise ValueError(f"the predictor needs a uint8 image [H, W, 3] RGB, not {given}. {remedy}")


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
