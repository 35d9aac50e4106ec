"""Pictures of reference points: which object a query belongs to, and where its dot is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import nn

from querymask.common.visualization import class_colour
from querymask.isda.figures import OTHER_COLOUR, assign_queries, draw_reference_points, reference_points


def test_assignment() -> None:
    objects = torch.zeros(2, 4, 4, dtype=torch.bool)
    objects[0, :2], objects[1, 2:] = True, True
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, 2:] = True  # the second object
    masks[1, :2, :3] = True  # three quarters of the first
    masks[2] = True  # half of each: IoU 0.5 with both
    assert assign_queries(masks, objects).tolist() == [1, 0, 0, -1]
    assert assign_queries(masks, objects, min_iou=0.6).tolist() == [1, 0, -1, -1]
    assert assign_queries(masks, objects[:0]).tolist() == [-1] * 4


def test_points_are_drawn_where_they_are() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    detections = Instances((60, 80))
    detections.pred_masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    picture = draw_reference_points(image, torch.tensor([[0.25, 0.5], [0.75, 0.25]]), torch.tensor([1, -1]), detections)
    height, width = picture.shape[:2]
    assert max(height, width) == 512
    assert tuple(picture[height // 2, width // 4]) == class_colour(1)
    assert tuple(picture[height // 4, width * 3 // 4]) == OTHER_COLOUR
    assert not picture[-1, -1].any()


def test_from_a_model(make_model: Callable[..., nn.Module], make_batch: Callable[..., list[dict[str, Any]]]) -> None:
    model = make_model().eval()
    (item,) = make_batch([0], [(40, 66)])
    points, objects, detections = reference_points(model, {**item, "height": 20, "width": 33}, score_threshold=0.0)
    assert points.shape == (6, 2) and len(objects) == 6 and detections.image_size == (20, 33)
    kept = model([{**item, "height": 20, "width": 33}])[0]["instances"]
    assert len(detections) == len(kept)
    # A query that made a detection with a mask covers at least that one
    for query in detections.pred_queries[detections.pred_masks.any(-1).any(-1)].tolist():
        assert objects[query] >= 0
    assert len(reference_points(model, item, score_threshold=2.0)[2]) == 0
