"""EffSeg's refinement head without its reference case: sampling, processing, refinement, masks, losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from querymask.common.flops import flop_handles
from querymask.common.pyramid import FeaturePyramid
from querymask.common.sps import SparseMap
from querymask.effseg.heads.effseg import ChildFeatures, EffSegHead, assemble_masks, encode_cells, sample_cells
from querymask.effseg.heads.effseg_losses import is_border
from querymask.effseg.heads.processing import PROCESSING
from querymask.effseg.regions import LEVEL_RULE, STRIDES, Regions, RegionTargets, target_coverage

IMAGE_SIZE = (60, 76)  # no multiple of the strides
WIDTH = 16
ALL_PROCESSING = pytest.mark.parametrize("processing", PROCESSING)


def make_head(**settings) -> EffSegHead:
    torch.manual_seed(0)
    return EffSegHead(**{"width": WIDTH, "refinements": 40, **settings}).double()


def make_pyramid(batch: int = 2) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(1)
    sizes = [[-(-side // 2**level) for side in IMAGE_SIZE] for level in range(2, 6)]
    maps = [torch.randn(batch, WIDTH, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return FeaturePyramid(maps, STRIDES)


def make_regions(images: tuple[int, ...] = (0, 1, 1)) -> Regions:
    """Small ones, and from the second on one that is read from a coarser map and leaves the image."""
    generator = torch.Generator().manual_seed(2)
    boxes = torch.tensor([[3.2, 5.1, 40.7, 31.9], [-70.3, -60.4, 80.6, 90.2], [20.4, 10.3, 60.8, 50.5]])
    boxes = boxes.double()[: len(images)].requires_grad_()
    queries = torch.randn(len(images), WIDTH, generator=generator, dtype=torch.float64)
    return Regions(boxes, torch.tensor(images, dtype=torch.long), queries, torch.zeros(len(images), dtype=torch.long))


def make_targets(regions: Regions, batch: int = 2) -> RegionTargets:
    """Two masks for each image, a disc and a rectangle."""
    y, x = (torch.arange(size) + 0.5 for size in IMAGE_SIZE)
    disc = (x - 30) ** 2 + (y[:, None] - 20) ** 2 < 15**2
    rectangle = ((x > 24) & (x < 70)) & ((y > 9) & (y < 44))[:, None]
    return RegionTargets([torch.stack([disc, rectangle])] * batch, torch.arange(len(regions)) % 2)


def test_cells_read_one_map_finer_at_every_stage():
    maps = [torch.full_like(feature, level) for level, feature in enumerate(make_pyramid().maps)]
    pyramid = FeaturePyramid(maps, STRIDES)
    regions = make_regions()
    assert pyramid.level_of(regions.boxes, LEVEL_RULE).tolist() == [0, 1, 0]
    big = Regions(torch.tensor([[-400.0, -400, 500, 500]]), torch.tensor([0]), torch.zeros(1, WIDTH), torch.tensor([0]))
    levels = pyramid.level_of(big.boxes, LEVEL_RULE)
    assert levels.tolist() == [3]
    sparse = SparseMap.from_dense(torch.zeros(1, WIDTH, 41, 41))
    centre = 20 * 41 + 20  # the pixel (50, 50)
    sampled = [sample_cells(pyramid, IMAGE_SIZE, big, levels, number, sparse)[centre, 0] for number in (1, 2, 3)]
    assert [value.item() for value in sampled] == pytest.approx([2, 1, 0])


def test_position_encoding():
    """The formula, entry by entry."""
    encoding = encode_cells(16, 5, torch.float64, torch.device("cpu"))
    for channel in range(16):
        kind, k = divmod(channel, 4)
        for y in range(5):
            for x in range(5):
                angle = 2 * math.pi * ((x if kind < 2 else y) + 0.5) / 5 / 10000 ** (4 * k / 16)
                wanted = math.cos(angle) if kind % 2 else math.sin(angle)
                assert encoding[channel, y, x].item() == pytest.approx(wanted)


def make_sparse(width: int) -> SparseMap:
    """Two regions of 6 x 6 cells, half of them active."""
    generator = torch.Generator().manual_seed(3)
    sparse = SparseMap.from_dense(torch.randn(2, width, 6, 6, generator=generator, dtype=torch.float64))
    return sparse.split(torch.rand(72, generator=generator) < 0.5)


def dense_processing(module: torch.nn.Module, processing: str, sparse: SparseMap) -> Tensor:
    """The same by dense convolutions of the whole map."""
    if processing == "mlp":
        return module.layers(sparse.active)
    core, x = module.core, sparse.replace_active(module.before(sparse.active)).dense()
    if processing == "conv":
        x = F.conv2d(x, core.conv.weight, core.conv.bias, padding=1).relu()
    elif processing == "deform_conv":
        offsets = F.conv2d(x, core.offset.weight, core.offset.bias, padding=1)
        offsets = offsets.unflatten(1, (9, 2)).flip(2).flatten(1, 2)  # torchvision has y first
        x = deform_conv2d(x, offsets, core.conv.weight, core.conv.bias, padding=1).relu()
    else:
        x = sum(F.conv2d(x, b.weight, b.bias, padding=b.dilation, dilation=b.dilation).relu() for b in core.branches)
    region, y, column = sparse.cells.long().unbind(1)
    return module.after(x[region, :, y, column])


@ALL_PROCESSING
def test_processing(processing):
    """Active cells see active and passive neighbours as a dense convolution does."""
    torch.manual_seed(4)
    module, sparse = PROCESSING[processing](8, (1, 2)).double(), make_sparse(8)
    if processing == "deform_conv":
        assert not module.core.offset.weight.any() and not module.core.offset.bias.any()
        torch.nn.init.normal_(module.core.offset.weight, std=0.1)
    output = module(sparse)
    assert output.shape == (len(sparse.active), 8) and output.std() > 1e-3
    torch.testing.assert_close(output, dense_processing(module, processing, sparse))


@ALL_PROCESSING
def test_all_cells_active_equals_a_dense_network(processing):
    """With room for every cell, the head is a convolution network on upsampled maps."""
    head = make_head(processing=processing, refinements=10**6, num_stages=2, seg_weights=[1] * 3, ref_weights=[1] * 3)
    pyramid, regions = make_pyramid(), make_regions()
    levels = pyramid.level_of(regions.boxes, LEVEL_RULE)
    stages = head.refine(pyramid, IMAGE_SIZE, regions)
    features = stages[0].features.dense()
    for number, stage in enumerate(head.stages, 1):
        parents = features.permute(0, 2, 3, 1)
        children = stage.child_features.shared(stage.child_features.expand(parents).relu().unflatten(3, (2, 2, -1)))
        children = (parents[:, :, :, None, None] + children).permute(0, 1, 3, 2, 4, 5)  # n, y, dy, x, dx, F
        children = children.flatten(3, 4).flatten(1, 2)
        size = children.shape[1]
        steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        sampled = []
        for box, image, level in zip(regions.boxes, regions.images, levels):
            x = 2 * (box[0] + steps * (box[2] - box[0])) / IMAGE_SIZE[1] - 1
            y = 2 * (box[1] + steps * (box[3] - box[1])) / IMAGE_SIZE[0] - 1
            grid = torch.stack([x.expand(size, -1), y[:, None].expand(-1, size)], -1)
            feature = pyramid.maps[max(int(level) - number, 0)][image]
            sampled.append(F.grid_sample(feature[None], grid[None], align_corners=False)[0].permute(1, 2, 0))
        children = children + stage.fusion.layers(torch.cat([children, torch.stack(sampled)], -1))
        dense = SparseMap.from_dense(stage.transition(children).permute(0, 3, 1, 2))
        features = dense_processing(stage.processing, processing, dense).view(*children.shape[:3], -1)
        logits = head.segmentation[number](features).squeeze(-1)
        features = features.permute(0, 3, 1, 2)
        torch.testing.assert_close(stages[number].features.dense(), features)
        torch.testing.assert_close(assemble_masks(stages)[number], logits)


def test_dense_sfm_has_the_weights_of_sfm():
    dense, sparse = make_head(processing="dense_sfm"), make_head(processing="sfm", refinements=10**6)
    dense.load_state_dict(sparse.state_dict())
    pyramid, regions = make_pyramid(1), make_regions((0, 0, 0))
    torch.testing.assert_close(dense(pyramid, IMAGE_SIZE, regions), sparse(pyramid, IMAGE_SIZE, regions))


def test_refinement():
    """Each stage keeps the cells of highest refinement logit, of all regions together; masks keep what was left."""
    head, pyramid, regions = make_head(), make_pyramid(), make_regions()
    stages = head.refine(pyramid, IMAGE_SIZE, regions)
    assert [len(stage.segmentation) for stage in stages] == [3 * 196, 160, 160, 160]
    for coarse, fine in zip(stages, stages[1:]):
        assert fine.features.active.shape[1] * 2 == coarse.features.active.shape[1]
        order = coarse.refinement.argsort(descending=True)[:40]
        wanted = {tuple(cell) for cell in coarse.features.cells[order].tolist()}
        assert {(r, y // 2, x // 2) for r, y, x in fine.features.cells.tolist()} == wanted
    masks = assemble_masks(stages)
    assert [mask.shape[1] for mask in masks] == [14, 28, 56, 112]
    active = torch.zeros_like(masks[3], dtype=torch.bool)
    active[stages[3].features.cells.long().unbind(1)] = True
    interpolated = F.interpolate(masks[2][:, None], scale_factor=2, mode="bilinear")[:, 0]
    assert torch.equal(masks[3][~active], interpolated[~active])
    assert torch.equal(masks[3][stages[3].features.cells.long().unbind(1)], stages[3].segmentation)


def test_the_image_of_a_batch():
    """The regions of an image have the same masks whatever other images there are."""
    head, pyramid = make_head(), make_pyramid()
    regions = make_regions((1, 1, 1))
    first = Regions(regions.boxes, torch.zeros(3, dtype=torch.long), regions.queries, regions.labels)
    together = head(pyramid, IMAGE_SIZE, regions)
    assert together.shape == (3, 112, 112) and 0 < together.min() and together.max() < 1
    torch.testing.assert_close(together, head(pyramid.of_image(1), IMAGE_SIZE, first))
    assert not torch.allclose(together, head(pyramid, IMAGE_SIZE, first))


@ALL_PROCESSING
def test_losses_have_the_right_gradients(processing):
    """Against differences, along a random direction: of parameters, maps, queries, and the boxes beyond RoIAlign."""
    head, pyramid, regions = make_head(processing=processing), make_pyramid(), make_regions()
    if processing == "dense_sfm":  # cells enough for a test
        head = make_head(processing=processing, num_stages=1, seg_weights=[1, 1], ref_weights=[1, 1])
    for stage in head.stages:
        if processing == "deform_conv":
            torch.nn.init.normal_(stage.processing.core.offset.weight, std=0.1)
    targets = make_targets(regions)
    leaves = [*head.parameters(), *pyramid.maps[:2], regions.queries]
    for leaf in leaves:
        leaf.requires_grad_()

    def total() -> Tensor:
        losses = head.losses(FeaturePyramid(pyramid.maps, STRIDES), IMAGE_SIZE, regions, targets)
        assert set(losses) == {"loss_segmentation", "loss_refinement"}
        return losses["loss_segmentation"] + 2 * losses["loss_refinement"]

    grads = torch.autograd.grad(total(), [*leaves, regions.boxes])
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[-1].any()  # through the centres of child cells
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    slope = sum((grad * direction).sum() for grad, direction in zip(grads, directions)).item()
    step, values = 1e-8, []
    with torch.no_grad():
        for sign in (1, -1):
            for leaf, direction in zip(leaves, directions):
                leaf += sign * step * direction
            values.append(total().item())
            for leaf, direction in zip(leaves, directions):
                leaf -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_no_region():
    """No masks; losses of zero that reach every parameter."""
    head, pyramid, regions = make_head(), make_pyramid(), make_regions(())
    assert head(pyramid, IMAGE_SIZE, regions).shape == (0, 112, 112)
    losses = head.losses(pyramid, IMAGE_SIZE, regions, make_targets(regions))
    grads = torch.autograd.grad(sum(losses.values()), list(head.parameters()))
    assert sum(losses.values()) == 0 and not any(grad.any() for grad in grads)


def labels_by_loops(regions: Regions, targets: RegionTargets, size: int) -> list[list[list[tuple[bool, bool]]]]:
    """Of every cell: its centre is in the mask; the centres of the cells in it, 224 a side of the region, differ."""
    boxes = regions.boxes.tolist()

    def look_up(region: int, y: float, x: float) -> bool:
        x0, y0, x1, y1 = boxes[region]
        row, column = math.floor(y0 + y * (y1 - y0)), math.floor(x0 + x * (x1 - x0))
        mask = targets.masks[int(regions.images[region])][int(targets.index[region])]
        return 0 <= row < len(mask) and 0 <= column < len(mask[0]) and bool(mask[row, column])

    fine, per = [(i + 0.5) / 224 for i in range(224)], 224 // size
    result = []
    for region in range(len(boxes)):
        samples = [[look_up(region, y, x) for x in fine] for y in fine]
        cells = [
            [{samples[per * y + j][per * x + i] for j in range(per) for i in range(per)} for x in range(size)]
            for y in range(size)
        ]
        result.append(
            [
                [(look_up(region, (y + 0.5) / size, (x + 0.5) / size), len(cells[y][x]) > 1) for x in range(size)]
                for y in range(size)
            ]
        )
    return result


@pytest.mark.parametrize(
    "settings", [{}, {"choose_by": "uncertainty"}, {"choose_by": "boundary"}, {"targets": "centre"}], ids=str
)
def test_losses_by_their_formula(settings):
    """Cell by cell: stage weight times number of regions times the mean over active cells."""
    head, pyramid, regions = make_head(**settings), make_pyramid(), make_regions()
    targets = make_targets(regions)
    losses = head.losses(pyramid, IMAGE_SIZE, regions, targets)
    stages = head.refine(pyramid, IMAGE_SIZE, regions)
    shares = target_coverage(regions, targets, [14, 28, 56, 112])
    segmentation = refinement = 0.0
    for stage, share, seg_weight in zip(stages, shares, (0.25, 0.375, 0.375, 0.5)):
        labels = labels_by_loops(regions, targets, share.shape[1]) if "targets" in settings else None
        for name in ("segmentation", "refinement"):
            terms = []
            for (region, y, x), logit in zip(stage.features.cells.tolist(), getattr(stage, name).tolist()):
                value = share[region, y, x].item()
                if labels:
                    wanted = labels[region][y][x][name == "refinement"]
                else:
                    wanted = value > 0.5 if name == "segmentation" else 1e-6 < value < 1 - 1e-6
                terms.append(math.log1p(math.exp(-logit if wanted else logit)))
            mean = sum(terms) / len(terms)
            if name == "segmentation":
                segmentation += 3 * seg_weight * mean
            else:
                refinement += 3 * 0.25 * mean
    assert losses["loss_segmentation"].item() == pytest.approx(segmentation)
    assert losses["loss_refinement"].item() == pytest.approx(refinement)


def on_boundary(mask: list[list[float]], y: int, x: int) -> bool:
    """One of the eight neighbours is on the other side; beyond the region is background."""
    near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    inside = [0 <= j < len(mask) and 0 <= i < len(mask) and mask[j][i] >= 0 for j, i in near]
    return any(value != (mask[y][x] >= 0) for value in inside)


@pytest.mark.parametrize("choose_by", ["uncertainty", "boundary"])
@pytest.mark.parametrize("refinements", [40, 400])
def test_choices_of_cells(choose_by, refinements):
    """Cell by cell; the boundary is of more cells than are taken, or of less."""
    head = make_head(choose_by=choose_by, refinements=refinements)
    pyramid, regions = make_pyramid(), make_regions()
    stages = head.refine(pyramid, IMAGE_SIZE, regions)
    numbers = []
    for number, (coarse, fine) in enumerate(zip(stages, stages[1:])):
        mask = assemble_masks(stages)[number].tolist()
        ranked = [
            (choose_by == "boundary" and not on_boundary(mask[region], y, x), abs(logit), (region, y, x))
            for (region, y, x), logit in zip(coarse.features.cells.tolist(), coarse.segmentation.tolist())
        ]
        numbers.append(sum(not beyond for beyond, *_ in ranked))
        wanted = {cell for *_, cell in sorted(ranked)[:refinements]}
        assert {(r, y // 2, x // 2) for r, y, x in fine.features.cells.tolist()} == wanted
    if choose_by == "boundary":
        assert 40 < numbers[0] < 400


def test_separate_children():
    """Each child by its own two layers; three times the parameters of the layer that they share otherwise."""
    torch.manual_seed(0)
    module, parents = ChildFeatures(8, separate=True), torch.randn(5, 8)
    children = module(parents)
    for row, parent in enumerate(parents):
        for child in range(4):
            first = module.expand.weight[8 * child : 8 * child + 8] @ parent + module.expand.bias[8 * child :][:8]
            wanted = module.own[child].weight @ first.relu() + module.own[child].bias
            torch.testing.assert_close(children[4 * row + child], wanted)
    shared = ChildFeatures(8, separate=False)
    shared.expand.load_state_dict(module.expand.state_dict())
    for layer in module.own:
        layer.load_state_dict(shared.shared.state_dict())
    torch.testing.assert_close(module(parents), shared(parents))
    added = [sum(p.numel() for p in EffSegHead(separate_children=own).parameters()) for own in (True, False)]
    assert added[0] - added[1] == sum(3 * (width**2 + width) for width in (256, 128, 64))


def test_coverage():
    """The mean of the mask in each cell; a full cell is no border although its mean may not be 1."""
    mask = torch.zeros(1, 56, 56, dtype=torch.bool)
    mask[0, :28, :40] = True
    mask[0, 30, 50] = True
    boxes = torch.tensor([[0.0, 0, 56, 56], [2.0, 2, 58, 58]])
    regions = Regions(boxes, torch.zeros(2, dtype=torch.long), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    (share,) = target_coverage(regions, RegionTargets([mask], torch.zeros(2, dtype=torch.long)), [14])
    # Samples of RoIAlign lie on the pixels' centres here
    torch.testing.assert_close(share[0], F.avg_pool2d(mask.float(), 4)[0])
    assert is_border(share[0]).nonzero().tolist() == [[7, 12]]
    rows = is_border(share[1]).nonzero()
    assert (rows[:, 0] == 6).any() and (rows[:, 1] == 9).any()  # cells that the edges cut in half
    almost = torch.tensor([0, 1e-7, 1e-5, 0.5, 1 - 1e-5, 1 - 1e-7, 1 + 1e-7], dtype=torch.float64)
    assert is_border(almost).tolist() == [False, False, True, True, True, False, False]


PARAMETERS = {"sfm": 4_208_872, "dense_sfm": 4_208_872, "conv": 4_208_872 - 387_520, "mlp": 4_208_872 - 451_584}


@pytest.mark.parametrize("processing", PARAMETERS)
def test_number_of_parameters(processing):
    """That of the release; less for the modules whose models are published as 38.42M (conv) and 38.36M (MLP)."""
    head = EffSegHead(processing=processing)
    assert sum(parameter.numel() for parameter in head.parameters()) == PARAMETERS[processing]


def test_cost():
    """Multiply-adds of 100 regions at 800 x 1088: those of the release, without their pasting."""
    from fvcore.nn import FlopCountAnalysis

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = EffSegHead()

        def forward(self, *maps: Tensor) -> Tensor:
            return self.head(FeaturePyramid(maps, STRIDES), (800, 1088), regions)

    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 256, -(-800 // s), 1088 // s, generator=generator) for s in (4, 8, 16, 32)]
    corners = torch.rand(100, 2, generator=generator) * 500
    boxes = torch.cat([corners, corners + 20 + torch.rand(100, 2, generator=generator) * 300], 1)
    images = torch.zeros(100, dtype=torch.long)
    regions = Regions(boxes, images, torch.randn(100, 256, generator=generator), images)
    with torch.no_grad():
        counts = FlopCountAnalysis(Traced().eval(), tuple(maps)).set_op_handle(**flop_handles())
        counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        assert counts.total() == pytest.approx(101.2e9, rel=0.01)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="processing must be one of mlp, .*, not 'attention'"):
        EffSegHead(processing="attention")
    with pytest.raises(ValueError, match="choose_by must be one of refinement, .*, not 'chance'"):
        EffSegHead(choose_by="chance")
    with pytest.raises(ValueError, match="dense_sfm keeps all cells active: leave choose_by 'boundary' out"):
        EffSegHead(processing="dense_sfm", choose_by="boundary")
    with pytest.raises(ValueError, match="targets must be one of coverage, centre, not 'corner'"):
        EffSegHead(targets="corner")
    with pytest.raises(ValueError, match="width must be a multiple of 4 and of 2 .* 8, not 20"):
        EffSegHead(width=20)
    with pytest.raises(ValueError, match="refinements must be positive, not 0"):
        EffSegHead(refinements=0)
    with pytest.raises(ValueError, match="seg_weights must have 4 entries"):
        EffSegHead(seg_weights=(1, 1))
    with pytest.raises(ValueError, match=r"reads maps of the strides \[4, 8, 16, 32\], got \[4, 8, 16\]"):
        make_head().refine(make_pyramid()[:3], IMAGE_SIZE, make_regions())
