"""The heads that EffSeg is compared with: sizes, losses, and the parts that the reference cases do not reach."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from querymask.common.ops import flop_formulas
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.heads import mask_rcnn, refine_mask
from querymask.effseg.heads.class_masks import ClassMaskHead
from querymask.effseg.heads.mask_rcnn import MaskRCNNHead
from querymask.effseg.heads.pointrend import PointRendHead, uncertain_cells
from querymask.effseg.heads.points import sample_finest
from querymask.effseg.heads.refine_mask import RefineMaskHead, boundary, merge_masks
from querymask.effseg.regions import STRIDES, Regions, RegionTargets

HEADS = [MaskRCNNHead, PointRendHead, RefineMaskHead]
ALL_HEADS = pytest.mark.parametrize("head_class", HEADS)
WIDTH, NUM_CLASSES, CANVAS = 16, 3, (128, 144)


def make_head(head_class: type[ClassMaskHead], **settings: Any) -> ClassMaskHead:
    torch.manual_seed(0)
    head = head_class(WIDTH, NUM_CLASSES, **settings).double()
    with torch.no_grad():
        for parameter in head.parameters():  # no zero biases, and logits of points that matter
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(1, parameter[0].numel())))
    return head


def make_pyramid(batch: int, dtype: torch.dtype = torch.float64) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(1)
    sizes = [(-(-CANVAS[0] // 2**level), -(-CANVAS[1] // 2**level)) for level in range(2, 6)]
    maps = [torch.randn(batch, WIDTH, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return FeaturePyramid(maps, STRIDES)


def make_regions(batch: int = 2, dtype: torch.dtype = torch.float64) -> Regions:
    """Boxes whose part on the canvas has sides of 112, so that cells of all sizes are blocks of whole pixels."""
    boxes = [[4.0, 8, 116, 120], [-7, -3, 112, 112], [30, 12, 142, 124]]
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(len(boxes), WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    images = torch.tensor([0, 1, 1]) if batch == 2 else torch.zeros(3, dtype=torch.long)
    return Regions(torch.tensor(boxes, dtype=dtype), images, queries, torch.tensor([2, 0, 1]))


def make_targets(batch: int = 2) -> RegionTargets:
    """Masks of blobs, two an image."""
    generator = torch.Generator().manual_seed(3)
    masks = F.interpolate(torch.randn(batch, 2, 9, 10, generator=generator), CANVAS, mode="bicubic") > 0
    return RegionTargets(list(masks), torch.tensor([1, 0, 1]))


def no_regions(regions: Regions) -> Regions:
    return regions[torch.zeros(0, dtype=torch.long)]


def slow_targets(regions: Regions, targets: RegionTargets, size: int) -> Tensor:
    """Blocks of pixels of which half belongs to the mask."""
    crops = []
    for box, image, index in zip(regions.boxes, regions.images, targets.index):
        left, top, right, bottom = (max(0, int(side)) for side in box)
        pixels = targets.masks[image][index, top:bottom, left:right].double()
        crops.append(pixels.view(size, 112 // size, size, 112 // size).mean((1, 3)) >= 0.5)
    return torch.stack(crops)


def slow_read(square: Tensor, x: float, y: float) -> Tensor:
    """(C, H, W) at cells (x, y), where cell i has its centre at i; zero beyond the border."""
    total = square.new_zeros(len(square))
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < square.shape[1] and 0 <= column < square.shape[2]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * square[:, row, column]
    return total


def slow_points(head: PointRendHead, pyramid: FeaturePyramid, regions: Regions, shares: Tensor) -> Tensor:
    """Logits (n, K, P) of points, one at a time."""
    coarse = head.coarse_layers(head.fused_features(pyramid, regions))
    result = []
    for i, (x0, y0, x1, y1) in enumerate(regions.boxes.tolist()):
        fine = [
            slow_read(
                pyramid.maps[0][regions.images[i]], (x0 + u * (x1 - x0)) / 4 - 0.5, (y0 + v * (y1 - y0)) / 4 - 0.5
            )
            for u, v in shares[i].tolist()
        ]
        rough = [slow_read(coarse[i], 28 * u - 0.5, 28 * v - 0.5) for u, v in shares[i].tolist()]
        result.append(head.point_layers(torch.stack(fine, 1)[None], torch.stack(rough, 1)[None])[0])
    return torch.stack(result)


def slow_boundary(masks: Tensor, width: int) -> Tensor:
    """RefineMask's definition: positive responses of a Laplacian to the padded mask and to its complement."""
    side = 2 * width + 1
    kernel = -torch.ones(1, 1, side, side, dtype=torch.float64)
    kernel[..., width, width] += side**2
    padded = F.pad(masks[:, None].double(), [width] * 4)
    responses = [F.conv2d(x, kernel)[:, 0].clamp(min=0) / side**2 > 0.1 for x in (padded, 1 - padded)]
    return responses[0] | responses[1]


def slow_resize(masks: Tensor, size: int) -> Tensor:
    """Bilinear as a product with the weights of rows and columns; the corners' centres stay in place."""
    position = torch.arange(size, dtype=torch.float64) * (masks.shape[1] - 1) / (size - 1)
    weights = (1 - (position[:, None] - torch.arange(masks.shape[1])).abs()).clamp(min=0)
    return weights @ masks.double() @ weights.T


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    probability = logits.sigmoid()
    return -(targets * probability.log() + (1 - targets.double()) * (1 - probability).log())


# ---- Sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head_class, parameters", [(MaskRCNNHead, 2906192), (PointRendHead, 3191968), (RefineMaskHead, 6580590)]
)
def test_parameters_as_published(head_class: type[ClassMaskHead], parameters: int) -> None:
    with torch.device("meta"):
        head = head_class(256, 80)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


# The release also doubles the masks of PointRend's 79 other classes, which nothing reads
UNREAD = 4 * 79 * (56**2 + 112**2 + 224**2) / 1e9  # for each pair


def count_gflops(
    head_class: type[ClassMaskHead], pairs: int, width: int, monkeypatch: pytest.MonkeyPatch, formulas: dict[Any, Any]
) -> float:
    """Of an image of 800 x ``width``. RoIAlign, 0.02 G, picks maps by value and cannot run without values."""
    for module in (mask_rcnn, refine_mask):
        monkeypatch.setattr(module, "pool_regions", lambda _, regions: torch.empty(len(regions), 256, 14, 14))
    formulas = {
        **flop_formulas(),
        torch.ops.aten.upsample_bilinear2d: lambda *_, out_shape, **__: 8 * out_shape.numel(),
        **formulas,
    }
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        numbers = torch.zeros(pairs, dtype=torch.long)
        regions = Regions(torch.empty(pairs, 4), numbers, torch.empty(pairs, 256), numbers)
        head_class(256, 80)(FeaturePyramid([torch.empty(1, 256, 200, width // 4)], [4]), (800, width), regions)
    return counter.get_total_flops() / 2e9  # of an addition and a product each


@pytest.mark.parametrize(
    "head_class, gflops", [(MaskRCNNHead, 56.9), (PointRendHead, 126.3 - 100 * UNREAD), (RefineMaskHead, 282.2)]
)
def test_flops_as_measured(head_class: type[ClassMaskHead], gflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 pairs of an image of 800 x 1088."""
    assert count_gflops(head_class, 100, 1088, monkeypatch, {}) == pytest.approx(gflops, rel=0.01)


def products_of_every_output(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Of a convolution, as fvcore counted until 2021, also where it is transposed and a quarter of them would do."""
    return 2 * x[0] * math.prod(weight) * math.prod(out_shape[2:])


@pytest.mark.parametrize(
    "head_class, gflops", [(MaskRCNNHead, 70.3), (PointRendHead, 137.8 - 97 * UNREAD), (RefineMaskHead, 281.2)]
)
def test_flops_of_the_paper(head_class: type[ClassMaskHead], gflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 4: the three heads agree on a mean of 97 pairs and 800 x 1108, if counted so; with pasting."""
    formulas = {torch.ops.aten.convolution: products_of_every_output}
    found = count_gflops(head_class, 97, 1108, monkeypatch, formulas) + 4 * 97 * 800 * 1108 / 1e9
    assert found == pytest.approx(gflops, rel=0.003)


# ---- Masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_class, size", list(zip(HEADS, (28, 224, 112))))
@torch.no_grad()
def test_images_of_a_batch(head_class: type[ClassMaskHead], size: int) -> None:
    """The masks of an image do not depend on the others."""
    head, pyramid, regions = make_head(head_class), make_pyramid(2), make_regions()
    rows = torch.tensor([1, 2])
    masks = head(pyramid, CANVAS, regions[rows])
    assert masks.shape == (2, size, size)
    alone = Regions(regions.boxes[rows], torch.tensor([0, 0]), regions.queries[rows], regions.labels[rows])
    torch.testing.assert_close(masks, head(pyramid.of_image(1), CANVAS, alone))


@ALL_HEADS
def test_no_regions(head_class: type[ClassMaskHead]) -> None:
    """No masks, and zero losses with a gradient to every parameter."""
    head, pyramid, regions = make_head(head_class), make_pyramid(2), no_regions(make_regions())
    assert head(pyramid, CANVAS, regions).shape == (0, head.mask_size, head.mask_size)
    targets = RegionTargets(make_targets().masks, torch.zeros(0, dtype=torch.long))
    losses = head.losses(pyramid, CANVAS, regions, targets)
    assert set(losses) == set(head.loss_names)
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@ALL_HEADS
def test_autocast(head_class: type[ClassMaskHead]) -> None:
    """Masks and losses stay in full precision."""
    head, pyramid = make_head(head_class).float(), make_pyramid(2, torch.float32)
    regions = make_regions(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = head(pyramid, CANVAS, regions[torch.tensor([0])])
        losses = head.losses(pyramid, CANVAS, regions, make_targets())
    sum(losses.values()).backward()
    assert masks.dtype == torch.float32 and masks.isfinite().all()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_last_logits_of_refine_mask_may_exceed_float16() -> None:
    """Random weights make them hundreds of times as large as the maps, and more than anything before them."""
    torch.manual_seed(0)
    head = RefineMaskHead(4 * WIDTH, NUM_CLASSES)
    maps = [x.repeat(1, 4, 1, 1) for x in make_pyramid(2, torch.float32).maps]
    regions = make_regions(dtype=torch.float32)
    regions = replace(regions, queries=regions.queries.repeat(1, 4))
    largest = max(float(x.abs().max()) for x in head.predict_stages(FeaturePyramid(maps, STRIDES), regions))
    factor = 80000 / largest
    pyramid = FeaturePyramid([factor * x for x in maps], STRIDES)
    regions = replace(regions, queries=factor * regions.queries)
    expected = head.predict_stages(pyramid, regions)
    with torch.autocast("cpu", dtype=torch.float16):
        found = head.predict_stages(pyramid, regions)
    assert expected[-1].half().isinf().any() and all(x.half().isfinite().all() for x in expected[:-1])
    for logits, exact in zip(found, expected):
        assert (logits - exact).norm() < 0.01 * exact.norm()


@torch.no_grad()
def test_points_of_maps() -> None:
    """Bilinear reads of the region's own image, also beyond the border."""
    pyramid, regions = make_pyramid(2), make_regions()
    shares = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.4 - 0.2
    expected = [
        slow_read(pyramid.maps[0][image], *((box[:2] + share * (box[2:] - box[:2])) / 4 - 0.5).tolist())
        for box, image, points in zip(regions.boxes, regions.images, shares)
        for share in points
    ]
    sampled = sample_finest(pyramid, regions, shares)
    torch.testing.assert_close(sampled, torch.stack(expected).view(3, 40, WIDTH).transpose(1, 2))


@torch.no_grad()
def test_subdivision() -> None:
    """The least certain cells of the doubled mask get the logits of points, the others keep theirs."""
    head, pyramid = make_head(PointRendHead, subdivisions=1, subdivision_points=50), make_pyramid(2)
    regions = make_regions()
    coarse = head.coarse_layers(head.fused_features(pyramid, regions))[torch.arange(3), regions.labels]
    doubled = F.interpolate(coarse[:, None], scale_factor=2, mode="bilinear")[:, 0]
    masks = head.logits(pyramid, regions)
    for i, (before, after) in enumerate(zip(doubled, masks)):
        distance = before.flatten().abs().tolist()
        order = sorted(range(56 * 56), key=distance.__getitem__)
        assert set((before != after).flatten().nonzero().flatten().tolist()) == set(order[:50])
        shares = torch.tensor([[(cell % 56 + 0.5) / 56, (cell // 56 + 0.5) / 56] for cell in order[:50]])
        logits = slow_points(head, pyramid, regions[torch.tensor([i])], shares[None].double())
        torch.testing.assert_close(after.flatten()[order[:50]], logits[0, regions.labels[i]], rtol=1e-5, atol=1e-5)


def test_more_points_than_cells() -> None:
    assert sorted(uncertain_cells(torch.randn(1, 3, 3), 20)[0].tolist()) == list(range(9))


def test_drawn_points() -> None:
    """Three quarters are the least certain of three times as many, the rest is uniform."""
    head, masks = make_head(PointRendHead, num_points=40), torch.randn(2, 28, 28, dtype=torch.float64)
    candidates, others = torch.rand(2, 120, 2, dtype=torch.float64), torch.rand(2, 10, 2, dtype=torch.float64)
    shares = head.draw_points(masks, torch.cat([candidates, others], 1))
    for mask, drawn, points, rest in zip(masks, shares, candidates, others):
        distance = [slow_read(mask[None], 28 * u - 0.5, 28 * v - 0.5).abs().item() for u, v in points.tolist()]
        best = sorted(range(120), key=distance.__getitem__)[:30]
        assert {tuple(point) for point in drawn[:30].tolist()} == {tuple(point) for point in points[best].tolist()}
        assert torch.equal(drawn[30:], rest)


@pytest.mark.parametrize("width", [1, 2])
def test_boundary(width: int) -> None:
    """As the Laplacian says, also at the border of the square."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 1, 5, 5, generator=generator)
    full = torch.ones(1, 17, 17, dtype=torch.bool)
    masks = torch.cat([F.interpolate(coarse, (17, 17))[:, 0] > 0, full, ~full])
    found = boundary(masks, width)
    assert torch.equal(found, slow_boundary(masks, width))
    assert found[:4].any() and not found[:4].all()
    assert found[4, 0].all() and not found[5].any()


def test_merged_masks() -> None:
    """Fine logits at the coarse mask's boundary, coarse ones elsewhere."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64), (14, 14))[:, 0]
    fine = torch.randn(2, 28, 28, generator=generator, dtype=torch.float64)
    at_boundary = slow_resize(slow_boundary(coarse.sigmoid() >= 0.5, 1), 28) >= 0.5
    assert at_boundary.any() and not at_boundary.all()
    torch.testing.assert_close(merge_masks(coarse, fine), torch.where(at_boundary, fine, slow_resize(coarse, 28)))


# ---- Losses -------------------------------------------------------------------------------------------------------


def compute_losses(head: ClassMaskHead, regions: Regions) -> Mapping[str, Tensor]:
    torch.manual_seed(7)  # PointRend draws points
    return head.losses(make_pyramid(2), CANVAS, regions, make_targets())


@torch.no_grad()
def test_mask_rcnn_loss() -> None:
    head, regions = make_head(MaskRCNNHead), make_regions()
    targets = slow_targets(regions, make_targets(), 28)
    expected = cross_entropy(head.logits(make_pyramid(2), regions), targets).sum() / 784
    torch.testing.assert_close(compute_losses(head, regions)["loss_mask"], expected)


@torch.no_grad()
def test_pointrend_losses() -> None:
    head, pyramid = make_head(PointRendHead, num_points=20), make_pyramid(2)
    regions, targets = make_regions(), make_targets()
    losses = compute_losses(head, regions)
    coarse = head.coarse_layers(head.fused_features(pyramid, regions))[torch.arange(3), regions.labels]
    expected = cross_entropy(coarse, slow_targets(regions, targets, 28)).sum() / 784
    torch.testing.assert_close(losses["loss_mask"], expected)

    torch.manual_seed(7)
    shares = head.draw_points(coarse, torch.rand(3, 60 + 5, 2, dtype=torch.float64))
    logits = slow_points(head, pyramid, regions, shares)[torch.arange(3), regions.labels]
    points = regions.boxes[:, None, :2] + shares * (regions.boxes[:, None, 2:] - regions.boxes[:, None, :2]) - 0.5
    wanted = [
        slow_read(targets.masks[image][index, None].double(), *point.tolist())
        for image, index, row in zip(regions.images, targets.index, points)
        for point in row
    ]
    expected = cross_entropy(logits, torch.stack(wanted).view(3, 20)).sum() / 20
    torch.testing.assert_close(losses["loss_point"], expected)


@torch.no_grad()
def test_refine_mask_loss() -> None:
    """Later stages count where the mask so far, or that of the target, has its boundary."""
    head, regions = make_head(RefineMaskHead), make_regions()
    stages = head.predict_stages(make_pyramid(2), regions)
    targets = [slow_targets(regions, make_targets(), size) for size in (14, 28, 56, 112)]
    values = [cross_entropy(logits, target) for logits, target in zip(stages, targets)]
    expected = 0.5 * values[0].mean() + 0.75 * values[1].mean()
    merged = stages[1].sigmoid() >= 0.5
    for number, weight in ((2, 0.75), (3, 1.0)):
        size = stages[number].shape[1]
        region = slow_boundary(merged, 2) | slow_boundary(targets[number - 1], 2)
        region = slow_resize(region, size) >= 0.5
        assert region.any() and not region.all()
        expected += weight * values[number][region].mean()
        replaced = slow_resize(slow_boundary(merged, 1), size) >= 0.5
        merged = torch.where(replaced, stages[number].sigmoid() >= 0.5, slow_resize(merged, size) >= 0.5)
    torch.testing.assert_close(compute_losses(head, regions)["loss_mask"], 3 * expected)


@ALL_HEADS
def test_gradients(head_class: type[ClassMaskHead]) -> None:
    """Along a random direction of all parameters and the queries, as finite differences; boxes get none."""
    head, regions = make_head(head_class), make_regions()
    boxes, queries = regions.boxes.requires_grad_(), regions.queries.requires_grad_()
    leaves = [*head.parameters(), queries]
    sum(compute_losses(head, regions).values()).backward()
    assert boxes.grad is None
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    slope = sum((leaf.grad * direction).sum() for leaf, direction in zip(leaves, directions))
    totals, step = [], 1e-8  # so small that hardly any ReLU switches
    with torch.no_grad():
        for move in (-step, 2 * step):
            for leaf, direction in zip(leaves, directions):
                leaf += move * direction
            totals.append(sum(compute_losses(head, regions).values()))
    torch.testing.assert_close(slope, (totals[1] - totals[0]) / (2 * step), rtol=1e-4, atol=1e-6)


# ---- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head_class, settings, message",
    [
        (PointRendHead, {"num_points": 0}, r"num_points \(0\)"),
        (PointRendHead, {"subdivisions": -1}, r"subdivisions \(-1\)"),
        (PointRendHead, {"oversampling": 0.5}, "oversampling must be 1 or more, got 0.5"),
        (PointRendHead, {"importance": 2}, "importance must be from 0 to 1, got 2"),
        (RefineMaskHead, {"num_stages": 0}, "num_stages must be positive"),
        (RefineMaskHead, {"num_stages": 4}, "multiple of 2"),
        (RefineMaskHead, {"loss_weights": (1.0,)}, "loss_weights must have 4 entries"),
    ],
)
def test_settings_out_of_range(head_class: type[ClassMaskHead], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(head_class, **settings)
