"""EffSeg under autocast: boxes to the pixel, losses of the detector in float32, and no more error than must be."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from float16_training import check_float16_training
from rounded_products import check_precision
from torch import nn
from torchvision.ops import box_convert

from querymask.common.predictions import Targets, weighted
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.fqdet.anchors import apply_deltas
from querymask.effseg.regions import LEVEL_RULE, STRIDES, Regions, pool_regions

MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]


def test_regions_are_pooled_to_the_pixel() -> None:
    """The type of the maps has no say in where they are read. From 512 on, bfloat16 has steps of 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 1280 // s, 1280 // s, generator=generator).bfloat16() for s in (4, 8, 16, 32)]
    low = torch.rand(40, 2, generator=generator) * 400 + 600
    sides = 2 ** (torch.rand(40, 1, generator=generator) * 6.5 + 3)
    images = torch.arange(40) // 20
    regions = Regions(torch.cat([low, low + sides], 1), images, torch.zeros(40, 3), images)
    pyramid = FeaturePyramid(maps, STRIDES)
    assert len(pyramid.level_of(regions.boxes, LEVEL_RULE).unique()) == 4
    exact = FeaturePyramid([x.double() for x in maps], STRIDES)
    expected = pool_regions(exact, replace(regions, boxes=regions.boxes.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool_regions(pyramid, regions)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("version", [1, 2])
def test_detector_under_autocast(make_model: MakeModel, make_batch: MakeBatch, version: int) -> None:
    """Its outputs are float32; boxes follow from the deltas, and losses from the outputs, as in float64."""
    model = make_model(VERSION=version)
    detector = model.detector
    nn.init.normal_(detector.box_head[-1].weight, std=0.3)  # boxes unlike their anchors
    batch = make_batch([3, 2], [(256, 512), (200, 400)])
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
        found, _ = model.predict(model.preprocess(batch))
        # Near anchors of queries, so that some are matched; at places where no two anchors are equally near
        shift = torch.tensor([1.3, 0.7, 2.1, -0.4], device=model.device)
        boxes = torch.cat([box_convert(anchors[:3], "cxcywh", "xyxy") + shift for anchors in found.query_anchors])
        targets = Targets([3, 3], torch.arange(3, device=model.device).repeat(2), boxes, found.image_sizes)
        assignment = detector.match(found, targets, {})
        normalizers = detector.normalizers(targets, assignment)
        losses = weighted(detector.losses(found, targets, assignment, normalizers))
    tensors = {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() >= {"logits", "hidden", "selection_logits", "anchors", "selected", "deltas", "boxes"}
    assert all(x.dtype in (torch.float32, torch.int64) for x in tensors.values())
    exact_boxes = apply_deltas(found.query_anchors.double(), found.deltas.double())
    sides = exact_boxes[..., 2:] - exact_boxes[..., :2]
    assert sides.max() > 300
    assert (found.boxes - exact_boxes).abs().max() < 1e-2
    exact = replace(found, **{name: x.double() for name, x in tensors.items() if x.dtype == torch.float32})
    exact_assignment = detector.match(exact, targets, {})
    assert len(assignment.query) > 0 and torch.equal(assignment.query, exact_assignment.query)
    expected = weighted(detector.losses(exact, targets, exact_assignment, normalizers))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-5, atol=0, msg=name)


HEADS = pytest.mark.parametrize(
    "form",
    [
        {"BRANCH": "EffSegBranch"},
        {"BRANCH": "EffSegBranch", "VERSION": 2, "NECK": "deform_encoder"},
        {"BRANCH": "MaskRCNNBranch", "VERSION": 2},
        {"BRANCH": "PointRendBranch", "VERSION": 2},
        {"BRANCH": "RefineMaskBranch", "VERSION": 2},
    ],
    ids=["paper", "deformable encoder", "Mask R-CNN", "PointRend", "RefineMask"],
)


@HEADS
def test_error_of_bfloat16(
    make_model: MakeModel,
    make_batch: MakeBatch,
    form: dict[str, Any],
    precision_batches: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most twice that of the same network in float64 whose products alone are rounded."""
    check_precision(make_model(**form), precision_batches(), monkeypatch)


@HEADS
def test_training_in_float16(
    make_model: MakeModel, make_batch: MakeBatch, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that are sums have large gradients; the loss scale leaves room for them from the first step on."""
    model = make_model(**form)
    check_float16_training(model, [make_batch([3], [size]) for size in ((64, 96), (80, 56))], monkeypatch)
