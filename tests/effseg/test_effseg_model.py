"""The tiny model with every head: training, detections, empty images, regions, scores, errors."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import Tensor, nn

from querymask.common.masks import instance_masks
from querymask.common.predictions import Assignment
from querymask.common.processes import Processes
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.pasting import paste_and_resize
from querymask.effseg.region_branch import limit_pairs
from querymask.effseg.regions import Regions, RegionTargets, SegmentationHead, pool_regions

MakeCfg = Callable[..., CfgNode]
MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

DETECTOR_LOSSES = {"loss_selection", "loss_class", "loss_box"}
FORMS = {
    "paper": {"BRANCH": "EffSegBranch"},
    "release": {"BRANCH": "EffSegBranch", "VERSION": 2},
    "deformable encoder": {"BRANCH": "EffSegBranch", "NECK": "deform_encoder"},
    "Mask R-CNN": {"BRANCH": "MaskRCNNBranch"},
    "PointRend": {"BRANCH": "PointRendBranch", "VERSION": 2},
    "RefineMask": {"BRANCH": "RefineMaskBranch"},
    "no masks": {},
    "no masks, release": {"VERSION": 2},
    "coarse levels": {"IN_FEATURES": ["res3", "res4", "res5"], "LEVELS": [3, 4, 5, 6, 7], "NUM_QUERIES": 200},
    "coarse levels, Mask R-CNN": {
        "IN_FEATURES": ["res3", "res4", "res5"],
        "LEVELS": [3, 4, 5],
        "NUM_QUERIES": 200,
        "BRANCH": "MaskRCNNBranch",
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", [[3, 0], [0, 0]])
def test_training_step(make_model: MakeModel, make_batch: MakeBatch, form: str, counts: list[int]) -> None:
    """Every parameter gets a gradient, also where no image has an instance."""
    model = make_model(**FORMS[form])
    losses = model(make_batch(counts, [(64, 96), (80, 50)]))
    assert DETECTOR_LOSSES <= set(losses)
    assert (set(losses) == DETECTOR_LOSSES) == (model.mask_branch is None)
    assert all(torch.isfinite(value) for value in losses.values())
    for name, value in losses.items():
        assert (value == 0) == (sum(counts) == 0 and name not in ("loss_selection", "loss_class")), name
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_inference(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    model = make_model(**FORMS[form]).eval()
    batch = make_batch([0, 0], [(64, 96), (80, 50)])
    batch[0].update(height=32, width=48)
    with torch.no_grad():
        found = [output["instances"] for output in model(batch)]
    for instances, size in zip(found, [(32, 48), (80, 50)], strict=True):
        assert instances.image_size == size and 0 < len(instances) <= 9
        boxes = instances.pred_boxes.tensor
        assert boxes.min() >= 0 and (boxes[:, 2:] <= boxes.new_tensor([size[1], size[0]])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (instances.scores.diff() <= 0).all() and instances.pred_classes.max() < 5
        assert instances.has("pred_masks") == (model.mask_branch is not None)
        if instances.has("pred_masks"):
            assert instances.pred_masks.shape == (len(instances), *size) and instances.pred_masks.dtype == torch.bool
            assert instances.pred_masks.flatten(1).any(1).all()


@pytest.mark.parametrize("form", ["paper", "release", "Mask R-CNN", "PointRend", "RefineMask", "deformable encoder"])
def test_autocast(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    """Losses in bfloat16 are near those in float32, and detection works."""
    results = []
    for enabled in (False, True):
        model, batch = make_model(**FORMS[form]), make_batch([3, 2])
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses = model(batch)
            with torch.no_grad():
                found = model.eval()(batch)
        total = sum(losses.values())
        assert total.dtype == torch.float32 and found[0]["instances"].pred_boxes.tensor.dtype == torch.float32
        total.backward()
        results.append(float(total.detach()))
    assert results[1] == pytest.approx(results[0], rel=0.1)


@pytest.mark.parametrize("form", ["paper", "Mask R-CNN"])
def test_images_of_a_batch_do_not_meet(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    """Detections in an image depend on the padded size, not on what else is in the batch."""
    model = make_model(**FORMS[form]).eval()
    batch = make_batch([0, 0, 0], [(64, 96), (50, 96), (64, 96)])
    with torch.no_grad():
        together = model(batch)
        for pair, members in (([0, 1], (0, 1)), ([1, 2], (1, 2)), ([0], (0,))):
            for output, number in zip(model([batch[i] for i in pair]), members, strict=True):
                alone, expected = output["instances"], together[number]["instances"]
                assert torch.equal(alone.pred_queries, expected.pred_queries)
                torch.testing.assert_close(alone.scores, expected.scores)
                torch.testing.assert_close(alone.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
                assert (alone.pred_masks != expected.pred_masks).float().mean() < 1e-3


# ---- What a head gets ---------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A normalised image (1, 3, H, W) of one size -> logits, boxes and states of the queries, maps of the pyramid."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found, made = self.model.predict(ImageList(image, [tuple(image.shape[-2:])]))
        return found.logits, found.boxes, found.hidden, *made.maps


class Head(nn.Module):
    """What a network gives -> masks of the first six queries."""

    def __init__(self, model: nn.Module, strides: list[int]) -> None:
        super().__init__()
        self.head, self.strides = model.mask_branch.head, strides

    def forward(self, logits: Tensor, boxes: Tensor, hidden: Tensor, *maps: Tensor) -> Tensor:
        zeros = torch.zeros(6, dtype=torch.long, device=boxes.device)
        regions = Regions(boxes[0, :6], zeros, hidden[0, 0, :6], zeros)
        return self.head(FeaturePyramid(maps, self.strides), (64, 96), regions)


class Whole(nn.Module):
    """A normalised image -> what the network gives, and masks."""

    def __init__(self, network: Network, head: Head) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.network(image)
        return *found, self.head(*found)


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("release", "whole"),
        ("coarse levels, Mask R-CNN", "whole"),
        # Each network and each head once; tests/common/test_grid.py has the paper's network
        ("deformable encoder", "network"),
        ("PointRend", "head"),
        ("RefineMask", "head"),
    ],
)
def test_export(make_model: MakeModel, form: str, part: str) -> None:
    """The exported program gives what eager execution gives, also on other pixels."""
    model = make_model(**FORMS[form]).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 3, 64, 96, generator=generator).to(model.device)
    network = Network(model)
    with torch.no_grad():
        _, made = model.predict(ImageList(images[0], [(64, 96)]))
        head = Head(model, made.strides)
        example, inputs = [network(image) if part == "head" else (image,) for image in images]
        module = {"network": network, "head": head, "whole": Whole(network, head)}[part]
    program = torch.export.export(module, example).module()
    with torch.no_grad():
        outputs, expected, first = (
            [x] if torch.is_tensor(x) else x for x in (program(*inputs), module(*inputs), program(*example))
        )
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs[0], first[0])


class Recorder(SegmentationHead):
    """A head whose probabilities say which query and label they are of; keeps what it was given."""

    def __init__(self, per_class: bool) -> None:
        super().__init__()
        self.per_class = per_class
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions) -> Tensor:
        self.calls.append((pyramid, image_size, regions))
        certain = 0.6 + 0.03 * torch.arange(len(regions), dtype=regions.queries.dtype, device=regions.queries.device)
        return certain[:, None, None].expand(-1, 4, 4)

    def losses(
        self, pyramid: FeaturePyramid, image_size: tuple[int, int], regions: Regions, targets: RegionTargets
    ) -> Mapping[str, Tensor]:
        self.calls.append((pyramid, image_size, regions, targets))
        return {"loss_recorded": regions.boxes.sum() + pool_regions(pyramid, regions).sum()}


def make_recording(make_model: MakeModel, per_class: bool, **overrides: Any) -> tuple[nn.Module, Recorder]:
    """A model with a recorder as its head."""
    model = make_model(BRANCH="EffSegBranch", **overrides)
    model.mask_branch.head = head = Recorder(per_class)
    return model, head


@pytest.mark.parametrize("per_class", [False, True])
def test_regions_at_inference(make_model: MakeModel, make_batch: MakeBatch, per_class: bool) -> None:
    """One call an image, over the queries of its detections in ascending order, or over all pairs."""
    model, head = make_recording(make_model, per_class, NMS_THRESHOLD=0.9)
    model.eval()
    last = model.detector.class_head[-1]
    last.weight.data[1] = last.weight.data[0]  # a query that has the one class has the other
    last.bias.data[:2] = 3.0
    model.detector.detections_per_image = 30
    images = model.preprocess(make_batch([0, 0], [(64, 96), (80, 50)]))
    with torch.no_grad():
        found, made = model.predict(images)
        detections = model.detect(found, made, [(64, 96), (40, 25)])
    assert len(head.calls) == 2
    for number, (given, canvas, regions) in enumerate(head.calls):
        selected = model.detector.select(found, number, images.image_sizes[number])
        queries = selected.pred_queries if per_class else selected.pred_queries.unique()
        assert len(selected) == 30 and (per_class or len(queries) < 30)
        assert canvas == (80, 96) and not regions.images.any()
        assert all(torch.equal(one[0], all_of[number]) and len(one) == 1 for one, all_of in zip(given.maps, made.maps))
        assert torch.equal(regions.boxes, found.boxes[number, queries])
        assert torch.equal(regions.queries, found.hidden[0, number, queries])
        assert not per_class or torch.equal(regions.labels.cpu(), selected.pred_classes.cpu())
        # The score is that of the pair times the certainty of its own region
        size = detections[number].image_size
        certain = 0.6 + 0.03 * torch.arange(len(queries), device=regions.boxes.device)
        probabilities = certain[:, None, None].expand(-1, 4, 4)
        masks, certainty = paste_and_resize(probabilities, regions.boxes, canvas, images.image_sizes[number], size)
        expected = {}
        for pair, query in enumerate(selected.pred_queries.tolist()):
            region = pair if per_class else queries.tolist().index(query)
            if masks[region].any():
                key = (query, int(selected.pred_classes[pair]))
                expected[key] = (float(selected.scores[pair] * certainty[region]), masks[region])
        instances = detections[number]
        assert 0 < len(instances) == len(expected)
        for query, label, score, mask in zip(
            instances.pred_queries, instances.pred_classes, instances.scores, instances.pred_masks
        ):
            wanted = expected[int(query), int(label)]
            assert float(score) == pytest.approx(wanted[0], rel=1e-5) and torch.equal(mask, wanted[1])


def test_regions_in_training(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Matched queries with their predicted boxes, which get no gradient, and masks on the canvas."""
    model, head = make_recording(make_model, per_class=False)
    batch = make_batch([3, 0, 2], [(64, 96), (50, 50), (80, 50)])
    loss = model(batch)["loss_recorded"]
    _, canvas, regions, targets = head.calls[0]
    assert regions.queries.requires_grad and not regions.boxes.requires_grad
    assert canvas == (80, 96) and [len(m) for m in targets.masks] == [3, 0, 2]
    assert set(regions.images.tolist()) == {0, 2} and len(regions) == len(targets.index)
    for image, index, label in zip(regions.images.tolist(), targets.index.tolist(), regions.labels.tolist()):
        assert label == batch[image]["instances"].gt_classes[index]
    for item, masks in zip(batch, targets.masks):
        height, width = item["instances"].image_size
        assert masks.shape[1:] == (80, 96) and masks.dtype == torch.bool
        assert torch.equal(masks[:, :height, :width].cpu(), instance_masks(item["instances"]))
        assert not masks[:, height:].any() and not masks[:, :, width:].any()
    loss.backward()
    assert model.detector.layers[-1].ffn.layer[3].weight.grad is None  # the recorded loss is of boxes and maps
    assert model.detector.box_head[-1].weight.grad is None
    assert model.detector.neck.outputs[0].weight.grad.abs().sum() > 0


def test_nothing_is_found(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Boxes beyond the image give no detections; a head is given no regions, or makes empty masks."""
    for settings in FORMS.values():
        model = make_model(**settings).eval()
        nn.init.constant_(model.detector.box_head[-1].bias, -50.0)  # far to the left, and of no size
        with torch.no_grad():
            for output in model(make_batch([0, 0])):
                instances = output["instances"]
                assert len(instances) == 0 and instances.pred_boxes.tensor.shape == (0, 4)
                if model.mask_branch is not None:
                    assert instances.pred_masks.shape == (0, 64, 96)


def test_no_regions(make_model: MakeModel, make_batch: MakeBatch) -> None:
    for settings in FORMS.values():
        model = make_model(**settings).eval()
        model.detector.detections_per_image = 0
        with torch.no_grad():
            assert len(model(make_batch([0, 0]))[0]["instances"]) == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"NECK": "tpn"}, "NECK is 'tpn': choose 'fpn' or 'deform_encoder'"),
        ({"BRANCH": "sparse"}, "NAME is 'sparse': choose one of CodeBranch, EffSegBranch"),
        ({"LEVELS": [3, 4, 5, 6]}, r"LEVELS is \[3, 4, 5, 6\], but the backbone's maps .* are of the levels \[2, 3, 4"),
        ({"LEVELS": [2, 3, 4]}, "the pyramid has these and the ones that follow them"),
        ({"IN_FEATURES": []}, "the pyramid has these and the ones that follow them"),
        ({"IN_FEATURES": ["res2", "res6"]}, r"names \['res6'\], but the backbone gives"),
        ({"VERSION": 3}, "versions 1 and 2, not 3"),
        ({"LOSS_REDUCTION": "mean"}, "LOSS_REDUCTION is 'mean': choose one of global, local"),
        (
            {"IN_FEATURES": ["res3", "res4"], "LEVELS": [3, 4], "BRANCH": "MaskRCNNBranch"},
            r"read maps of the strides \[4, 8, 16, 32\], the levels 2 to 5, but the pyramid has \[4, 8, 16\]: begin",
        ),
        ({"BRANCH": "EffSegBranch", "REGION_EXPORT": "all"}, "REGION.EXPORT is 'all': choose one of any, paste"),
    ],
)
def test_errors(make_cfg: MakeCfg, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(make_cfg(**overrides))


def test_no_map_for_the_finest_level(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(IN_FEATURES=["res3", "res4", "res5"], LEVELS=[3, 4, 5], BRANCH="MaskRCNNBranch")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    with pytest.raises(ValueError, match="the masks need a map of stride 4, but the detector's pyramid begins with 8"):
        build_model(cfg)


@pytest.mark.parametrize("form", ["release", "RefineMask", "no masks"])
def test_checkpoints_from_before_the_parts_had_names(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    model, other = make_model(**FORMS[form]).eval(), make_model(**FORMS[form]).eval()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    state = model.state_dict()
    for today, before in (("detector.neck.", "neck."), ("mask_branch.head.", "mask_head.")):
        for key in [key for key in state if key.startswith(today)]:
            state[before + key.removeprefix(today)] = state.pop(key)
    assert not [key for key in state if not key.startswith(("backbone.", "neck.", "detector.", "mask_head."))]
    assert any(key.startswith("mask_head.") for key in state) == (model.mask_branch is not None)
    other.load_state_dict(state)
    batch = make_batch([0, 0])
    with torch.no_grad():
        for ours, theirs in zip(model(batch), other(batch), strict=True):
            assert len(ours["instances"]) > 0
            for name, value in ours["instances"].get_fields().items():
                expected = theirs["instances"].get(name)
                assert torch.equal(getattr(value, "tensor", value), getattr(expected, "tensor", expected)), name


# ---- A bounded number of regions in training ----------------------------------------------------------------------


def test_limited_pairs() -> None:
    """A random choice, in order, each pair whole; no limit where it is 0 or not reached."""
    query = torch.arange(50)
    pairs = Assignment(torch.zeros_like(query), query // 10, query, query + 100, num_layers=1)
    for number in (0, 50, 51):
        assert torch.equal(limit_pairs(pairs, number, 5, Processes()).query, query)
    torch.manual_seed(0)
    choices = [limit_pairs(pairs, 7, 5, Processes()) for _ in range(200)]
    for kept in choices:
        assert len(kept.query) == 7 and (kept.query.diff() > 0).all()
        assert torch.equal(kept.image, kept.query // 10) and torch.equal(kept.target, kept.query + 100)
        assert kept.num_layers == 1 and not kept.layer.any()
    counts = torch.cat([kept.query for kept in choices]).bincount(minlength=50)
    assert 10 < counts.min() and counts.max() < 60  # 28 on average, with a standard deviation of 5


def test_limited_regions(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """REGION.MAX_TRAIN_REGIONS bounds what the head gets, and leaves the detector's losses as they are."""
    losses, given = [], []
    for number in (0, 2):
        model, head = make_recording(make_model, per_class=False, REGION_MAX_TRAIN_REGIONS=number)
        losses.append(model(make_batch([3, 2])))
        given.append(head.calls[0][2:])
    (every, targets), (chosen, chosen_targets) = given
    assert len(every) > len(chosen) == len(chosen_targets.index) == 2
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in DETECTOR_LOSSES)
    for box, image, index in zip(chosen.boxes, chosen.images, chosen_targets.index):
        same = (every.boxes == box).all(1) & (every.images == image) & (targets.index == index)
        assert same.any()
