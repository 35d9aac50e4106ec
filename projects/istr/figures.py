"""How the refinement stages of an ISTR change boxes and masks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import nn

from querymask.common.views import register_view
from querymask.common.visualization import contact_sheet, draw_instances

MOST_COLUMNS = 5  # panels in a row of a picture; rows are filled evenly


def draw_stages(
    image: np.ndarray,
    stages: Sequence[Instances],
    class_names: Sequence[str],
    score_threshold: float,
    annotations: Sequence[dict[str, Any]] | None = None,
) -> np.ndarray:
    """One picture: the ground truth, where there is any, then the detections of every stage.

    Args:
        image: uint8 [H, W, 3] RGB.
        stages: detections at the size of the image, on the CPU.

    Returns:
        uint8 [H', W', 3] RGB.
    """
    panels = [] if annotations is None else [draw_instances(image, annotations, class_names)]
    titles = [] if annotations is None else ["ground truth"]
    panels += [draw_instances(image, instances, class_names, score_threshold) for instances in stages]
    titles += [f"stage {number}" for number in range(1, len(stages) + 1)]
    rows = math.ceil(len(panels) / MOST_COLUMNS)
    return contact_sheet(panels, columns=math.ceil(len(panels) / rows), titles=titles)


@register_view("stages", "ISTR")
@torch.no_grad()
def view_stages(
    model: nn.Module, item: dict[str, Any], image: np.ndarray, class_names: Sequence[str], score_threshold: float
) -> np.ndarray:
    """The detections of every stage; see ``querymask.common.views``."""
    predictions, made = model.predict(model.preprocess([item]))
    stages = []
    for stage in range(predictions.num_layers):
        (found,) = model.detect(predictions, made, [image.shape[:2]], stage)
        stages.append(found[found.scores >= score_threshold].to("cpu"))
    return draw_stages(image, stages, class_names, score_threshold)
