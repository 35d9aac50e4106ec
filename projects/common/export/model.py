"""An exported model in the place of one that was built."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from querymask.common.boxes import unrounded_boxes
from querymask.common.export.files import read
from querymask.common.panoptic import describe_segments


class ExportedModel(nn.Module):
    """Detectron2's contract of a model in evaluation, one image at a time.

    Args:
        file: written by ``tools/export_model.py``.
        device: that it runs on.

    Attributes:
        description: what the file says about itself.
    """

    def __init__(self, file: str | os.PathLike[str], device: str = "cpu") -> None:
        super().__init__()
        self._run, self.description = read(file, torch.device(device))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ExportedModel":
        """The file of ``MODEL.WEIGHTS``.

        Raises:
            ValueError: the config is not that of the model that was exported.
        """
        model = cls(cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE)
        for key, value, exported in (
            ("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, model.description.method),
            ("PANOPTIC.ENABLED", cfg.MODEL.PANOPTIC.ENABLED, model.description.num_things is not None),
        ):
            if value != exported:
                raise ValueError(
                    f"MODEL.{key} is {value}, but {cfg.MODEL.WEIGHTS} was exported with {exported}: give the config of "
                    "the model that was exported"
                )
        return model

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``{"instances": Instances}`` per image with ``scores``, ``pred_classes``, ``pred_boxes`` and ``pred_masks``,
        or ``{"panoptic_seg": (ids, segments)}`` of ``panoptic_output``.

        Raises:
            ValueError: an image is not uint8.
        """
        return [self._detect(item["image"], item.get("height"), item.get("width")) for item in batched_inputs]

    def _detect(self, image: Tensor, height: int | None, width: int | None) -> dict[str, Any]:
        if image.dtype != torch.uint8:
            raise ValueError(f"an exported model sees images of uint8, not {image.dtype}: use the checkpoint")
        size = (height or image.shape[1], width or image.shape[2])
        outputs = self._run(image[None], torch.tensor(size))
        found = {name: x[0] for name, x in zip(self.description.outputs, outputs, strict=True)}
        if self.description.num_things is not None:
            return {"panoptic_seg": _segments(found, self.description.num_things)}
        return {"instances": _instances(found, size)}


def _instances(found: Mapping[str, Tensor], size: tuple[int, int]) -> Instances:
    kept = found["scores"] >= 0
    instances = Instances(size, scores=found["scores"][kept], pred_classes=found["classes"][kept])
    if "boxes" in found:
        instances.pred_boxes = unrounded_boxes(found["boxes"][kept])
    if "masks" in found:
        instances.pred_masks = found["masks"][kept]
    return instances


def _segments(found: Mapping[str, Tensor], num_things: int) -> tuple[Tensor, list[dict[str, Any]]]:
    scores = found["segment_scores"]
    if found["candidates"] > len(scores):
        log_first_n(
            logging.WARNING,
            f"an image has {found['candidates']} queries that are likely enough for a segment, of which an exported "
            f"model merges {len(scores)}: raise MODEL.PANOPTIC.SCORE_THRESHOLD before it is exported, or use the "
            "checkpoint",
            name=__name__,
        )
    number = int((scores >= 0).sum())
    labels, scores = found["segment_classes"][:number].tolist(), scores[:number].tolist()
    return found["panoptic"], describe_segments(found["panoptic"], labels, scores, num_things)
