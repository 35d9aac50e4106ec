"""Mask R-CNN's head in ISTR against Detectron2's loss and inference, and its one box for features, target and paste."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from training_steps import Step, training_step

from querymask.common.masks import paste_masks
from querymask.common.pyramid import FeaturePyramid

MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]
SIZES = [(64, 96), (80, 50)]


@pytest.fixture
def model(make_model: MakeModel) -> nn.Module:
    """Whose boxes cross the borders of their images, and whose masks differ from class to class."""
    model = make_model(BRANCH="PixelBranch", PIXEL_POOL_SIZE=5, PIXEL_WEIGHT=0.6).double()
    with torch.no_grad():
        model.detector.init_proposal_boxes.weight[:, 2:] += 0.5
        for head in model.mask_branch.heads:
            head.classifier.weight.mul_(40)
    return model


def boxes_in_images(step: Step, image: torch.Tensor, query: torch.Tensor, layer: int) -> list[list[float]]:
    """Boxes of a layer, cut off at the borders of images without padding."""
    rows = []
    for i, q in zip(image.tolist(), query.tolist(), strict=True):
        height, width = SIZES[i]
        x0, y0, x1, y1 = step.found.boxes[layer, i, q].tolist()
        rows.append([min(max(x, 0), limit) for x, limit in zip((x0, y0, x1, y1), (width, height) * 2, strict=True)])
    assert any(row != step.found.boxes[layer, i, q].tolist() for row, i, q in zip(rows, image, query)), "none crosses"
    return rows


def class_logits(model: nn.Module, step: Step, boxes: torch.Tensor, image: torch.Tensor, layer: int) -> torch.Tensor:
    """Logits (n, classes, 10, 10) of the layer's head at these boxes."""
    assert step.found.pyramid is not None
    crops = FeaturePyramid(step.found.pyramid.maps, step.found.pyramid.strides).pool(boxes, image, 5)
    return model.mask_branch.heads[layer](crops)


def test_loss_is_that_of_mask_rcnn(model: nn.Module, make_batch: MakeBatch) -> None:
    """In every stage: of the target's class alone, with its mask inside of the box that the features are read from."""
    batch = make_batch([3, 2], SIZES)
    step = training_step(model, batch)
    losses = {term.key: term for term in step.terms if term.name == "loss_mask"}
    assert set(losses) == {"loss_mask", "loss_mask_0"} and {term.weight for term in losses.values()} == {0.6}
    number = step.assignment.pairs_per_layer()
    for layer, key in enumerate(["loss_mask_0", "loss_mask"]):
        here = slice(layer * number, (layer + 1) * number)
        image, query, target = (getattr(step.assignment, name)[here] for name in ("image", "query", "target"))
        boxes = torch.tensor(boxes_in_images(step, image, query, layer), device=model.device, dtype=torch.float64)
        proposals, rows = [], []
        for b, start in enumerate(step.targets.starts):
            own = image == b
            proposals.append(Instances(SIZES[b]))
            proposals[b].proposal_boxes = Boxes(boxes[own])
            proposals[b].gt_classes = step.targets.labels[target[own]]
            proposals[b].gt_masks = BitMasks(step.targets.masks[b][target[own] - start])
            rows.append(own.nonzero().flatten())
        logits = class_logits(model, step, boxes, image, layer)[torch.cat(rows)]
        with EventStorage():
            expected, other = (mask_rcnn_loss(x.float(), proposals).item() for x in (logits, logits.flip(1)))
        assert losses[key].value.item() == pytest.approx(expected, rel=1e-5) != pytest.approx(other, rel=0.01)


def test_inference_is_that_of_mask_rcnn(model: nn.Module, make_batch: MakeBatch) -> None:
    """Of the detected class, pasted into the box that the features are read from."""
    batch = make_batch([0, 0], SIZES)
    model.eval()
    with torch.no_grad():
        found, made = model.predict(model.preprocess(batch))
        detected = model.detect(found, made, SIZES)
        step = Step(found, made, None, None, None, None, [])
        for b, instances in enumerate(detected):
            image = torch.full_like(instances.pred_queries, b)
            boxes = torch.tensor(boxes_in_images(step, image, instances.pred_queries, -1), device=model.device)
            expected = Instances(SIZES[b], pred_classes=instances.pred_classes)
            mask_rcnn_inference(class_logits(model, step, boxes.double(), image, -1), [expected])
            masks = paste_masks(expected.pred_masks[:, 0], boxes.double(), *SIZES[b], threshold=0.5)
            assert (masks != instances.pred_masks).double().mean() < 1e-4  # Detectron2 keeps boxes in float32
            assert 0.02 < masks.double().mean() < 0.98 and len(set(instances.pred_classes.tolist())) > 1
