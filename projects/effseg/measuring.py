"""EffSeg with random weights, as measurements of its cost need it."""

import torch
from detectron2.structures import Boxes, Instances

from querymask.effseg.effseg import EffSeg
from querymask.effseg.fqdet.predictions import FQDetPredictions
from querymask.effseg.region_branch import RegionBranch


def force_detections(model: EffSeg, detections: int, queries: int) -> int | None:
    """Have EffSeg detect a fixed number of pairs of query and class, of as many queries as said; for a panoptic map,
    these queries, each with one class and too unlikely for a segment, so that the masks are measured without the merge.

    Random weights would otherwise decide how many queries the pairs are of, on which EffSeg's cost depends.

    Returns:
        how many regions get a mask: one a query, or one a pair where masks depend on the class; None with a mask branch
        that has no regions, or without any.

    Raises:
        ValueError: the model has fewer queries.
    """
    available = model.detector.num_queries
    if queries > available:
        raise ValueError(f"{queries} regions are asked for, but the model has {available} queries: lower --regions")

    def select(found: FQDetPredictions, image: int, size: tuple[int, int], layer: int | None = None) -> Instances:
        numbers = torch.arange(detections, device=found.boxes.device)
        instances = Instances(size)
        instances.pred_queries = numbers % queries
        instances.pred_classes = numbers // queries % (found.logits.shape[3] - 1)
        instances.scores = found.logits[0, image].sigmoid()[instances.pred_queries, instances.pred_classes]
        instances.pred_boxes = Boxes(found.boxes[image, instances.pred_queries])
        return instances

    def select_queries(found: FQDetPredictions, image: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = select(found, image, (1, 1))[:queries]
        return chosen.pred_queries, chosen.pred_classes, torch.zeros_like(chosen.scores)

    model.detector.select = select  # type: ignore[method-assign]
    model.detector.select_queries = select_queries  # type: ignore[method-assign]
    if not isinstance(model.mask_branch, RegionBranch):
        return None
    return detections if model.mask_branch.head.per_class and model.panoptic is None else queries
