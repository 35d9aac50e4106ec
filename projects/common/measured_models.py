"""Models and inputs to measure where there are no weights and no photographs."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from querymask.common.mask_coding import fill_missing_bases


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model without memory for its parameters; ``MODEL.DEVICE`` of the config becomes "meta"."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def prepare_for_measurement(model: nn.Module) -> None:
    """Let a model with random weights do what a trained one does: have a mask basis, and find objects in the image.

    Boxes that stages of random weights move would soon leave the image, and no mask is made outside of it. Scores of
    random weights are below the threshold of Detectron2's models.
    """
    fill_missing_bases(model)
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
    for name, parameter in model.named_parameters():
        if any(moves in name for moves in ("bboxes_delta", "anchor_deltas", "bbox_pred")):
            nn.init.zeros_(parameter)


def random_model(cfg: CfgNode) -> nn.Module:
    """A model of random weights, always the same, that is prepared for measurement."""
    torch.manual_seed(0)
    model = build_model(cfg)
    prepare_for_measurement(model)
    return model


def random_image(height: int, width: int) -> dict[str, Any]:
    """A model's input for an image of random pixels, always the same."""
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": pixels, "height": height, "width": width}


def make_batch(batch: int, size: tuple[int, int], instances: int, num_classes: int) -> list[dict[str, Any]]:
    """Random images of (height, width) ``size``, each with as many discs."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    items = []
    for _ in range(batch):
        radius = (torch.rand(instances, generator=generator) * 0.15 + 0.08) * min(size)
        center = torch.rand(instances, 2, generator=generator) * 0.5 + 0.25
        center = center * torch.tensor([size[1], size[0]])
        distance = (x - center[:, 0, None, None]) ** 2 + (y - center[:, 1, None, None]) ** 2
        found = Instances(size)
        found.gt_boxes = Boxes(torch.cat((center - radius[:, None], center + radius[:, None]), dim=1))
        found.gt_classes = torch.randint(num_classes, (instances,), generator=generator)
        found.gt_masks = BitMasks(distance < radius[:, None, None] ** 2)
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        items.append({"image": image, "instances": found, "height": size[0], "width": size[1]})
    return items
