"""An exported model in the place of one that was built."""

import os
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.boxes import unrounded_boxes
from querymask.common.export.files import read


class ExportedModel(nn.Module):
    """Detectron2's contract of a model in evaluation, one image at a time.

    Args:
        file: written by ``tools/export_model.py``.
        device: that it runs on.
        method: that the config says, MODEL.META_ARCHITECTURE; None: any.

    Attributes:
        description: what the file says about itself.
    """

    def __init__(self, file: str | os.PathLike[str], device: str = "cpu", method: str | None = None) -> None:
        super().__init__()
        self._run, self.description = read(file, torch.device(device))
        if method not in (None, self.description.method):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {method}, but {file} was exported from {self.description.method}: give "
                "the config of the model that was exported"
            )

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """``{"instances": Instances}`` per image with ``scores``, ``pred_classes``, ``pred_boxes`` and ``pred_masks``.

        Raises:
            ValueError: an image is not uint8.
        """
        return [
            {"instances": self._detect(item["image"], item.get("height"), item.get("width"))} for item in batched_inputs
        ]

    def _detect(self, image: Tensor, height: int | None, width: int | None) -> Instances:
        if image.dtype != torch.uint8:
            raise ValueError(f"an exported model sees images of uint8, not {image.dtype}: use the checkpoint")
        size = (height or image.shape[1], width or image.shape[2])
        outputs = self._run(image[None], torch.tensor(size))
        found = {name: x[0] for name, x in zip(self.description.outputs, outputs, strict=True)}
        kept = found["scores"] >= 0
        instances = Instances(size, scores=found["scores"][kept], pred_classes=found["classes"][kept])
        if "boxes" in found:
            instances.pred_boxes = unrounded_boxes(found["boxes"][kept])
        if "masks" in found:
            instances.pred_masks = found["masks"][kept]
        return instances
