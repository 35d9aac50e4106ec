"""The whole way from the pixels of an image to its detections, in sizes that are known beforehand."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config

from querymask.common.export.files import INPUTS
from querymask.common.mask_coding import LearnedMaskCoding
from querymask.common.meta_arch import QuerySegmenter
from querymask.common.ops.exporting import exporting
from querymask.common.panoptic import merge, segment_ids
from querymask.common.predictions import Predictions

EXAMPLE_SIDES = (541, 797)
"""Height and width of the image that the program is traced with. Every map has several cells each way: what is 1 once
would be 1 always."""
SEGMENT_CANDIDATES = 100
"""Queries that may become segments of a panoptic map, each with a mask of the padded image."""


class ExportNetwork(nn.Module):
    """A model of one image, with what comes before and after the network inside.

    Args:
        model: in evaluation mode, on the CPU.

    Raises:
        ValueError: the model is not one of the project's.

    Attributes:
        outputs: names of what ``forward`` returns: "scores", "classes" and, where the model has them, "boxes", "masks";
            of a panoptic model "panoptic", "segment_classes", "segment_scores", "candidates".
        num_things: as of ``Description``.
    """

    def __init__(self, model: QuerySegmenter) -> None:
        super().__init__()
        if not isinstance(model, QuerySegmenter):
            raise ValueError(
                f"{type(model).__name__} is a model of Detectron2, which has tools of its own for export: give the "
                "config of SOLQ, ISDA, ISTR, EffSeg or one of their pairs"
            )
        self.model = model
        self.num_things = None if model.panoptic is None else model.panoptic.num_things
        if model.panoptic is not None:
            self.outputs: tuple[str, ...] = ("panoptic", "segment_classes", "segment_scores", "candidates")
            return
        parts = {"boxes": model.detector.has_boxes, "masks": model.mask_branch is not None}
        self.outputs = ("scores", "classes", *(name for name, has in parts.items() if has))

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detect, or make a panoptic map.

        Args:
            image: uint8 (1, 3, H, W), channels in the order of ``INPUT.FORMAT``.
            size: int64 (2,) height and width to which boxes and masks are scaled.

        Returns:
            ``outputs``: scores (1, n) float32, negative in rows without a detection; classes (1, n) int64; boxes
            (1, n, 4) float32 x0, y0, x1, y1 in pixels; masks (1, n, height, width) bool. n is the same for all images.

            Panoptic: panoptic (1, height, width) int32, 0 for void, k for the segment of row k - 1; segment_classes
            (1, n) int64; segment_scores (1, n) float32, negative in rows without a segment; candidates (1,) int64, how
            many queries are likely enough for a segment, of which the best n may become one.
        """
        model = self.model
        height, width = image.shape[-2:]
        step = max(model.size_divisibility, 1)
        down, right = ((side + step - 1) // step * step for side in (height, width))
        pixels = (image.to(model.pixel_mean.dtype) - model.pixel_mean) / model.pixel_std
        pixels = F.pad(pixels, (0, right - width, 0, down - height))
        rows, columns = (torch.arange(side, device=image.device) for side in (down, right))
        padding = ((rows >= height)[:, None] | (columns >= width))[None]
        sides = torch.tensor([[width, height, width, height]], dtype=pixels.dtype, device=image.device)
        found, made = model.network(pixels, padding, sides, step > 1)
        found = replace(found, image_sizes=[(height, width)])
        if model.panoptic is not None:
            return self._segment(found, made, known(size))
        (detections,) = model.detect(found, made, [known(size)])
        fields = {
            "scores": detections.scores,
            "classes": detections.pred_classes,
            "boxes": detections.pred_boxes.tensor if detections.has("pred_boxes") else None,
            "masks": detections.pred_masks if detections.has("pred_masks") else None,
        }
        return tuple(fields[name][None] for name in self.outputs)

    def _segment(self, found: Predictions, made: Any, size: tuple[int, int]) -> tuple[Tensor, ...]:
        rule, branch = self.model.panoptic, self.model.mask_branch
        assert rule is not None and branch is not None and found.canvas is not None
        queries, labels, scores = self.model.detector.select_queries(found, 0)
        bands = branch.bands(found, made, 0, queries, labels)  # of all, as masks may depend on each other
        segments = merge(labels[:SEGMENT_CANDIDATES], scores[:SEGMENT_CANDIDATES], bands, found.canvas.size, rule)
        ids = segment_ids(segments, found.image_sizes[0], size)
        likely = (scores > rule.score).sum()
        return tuple(x[None] for x in (ids, segments.labels, segments.scores, likely))


def known(size: Tensor) -> tuple[int, int]:
    """Height and width of a tensor, as numbers that the program computes with."""
    height, width = size.tolist()
    for side in (height, width):
        torch._check(side >= 1)
    return height, width


def export_program(network: ExportNetwork) -> ExportedProgram:
    """The network as a program of plain operators, for images of any height and width.

    Raises:
        ValueError: the model has a part that cannot be exported; says which and why.
    """
    for module in network.modules():
        if isinstance(module, LearnedMaskCoding):
            module.require_basis()  # which looks at values, once
    height, width = EXAMPLE_SIDES
    example = torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([height + 3, width + 5])
    shapes = dict(zip(INPUTS, ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, None), strict=True))
    # Maps of one cell, of small images, are like others
    with torch.no_grad(), exporting(), _config.patch(backed_size_oblivious=True):
        return export(network, example, dynamic_shapes=shapes, strict=False)
