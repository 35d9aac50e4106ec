"""The ISDA model: its forms, batches, targets, detections, memory, and the errors of its config."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from scipy.special import expit
from torch import nn

from querymask.isda import masks as isda_masks
from querymask.isda.detector import BoxFreePredictions
from querymask.isda.mask_features import MaskFeatureHead, append_coordinates, coordinate_channels
from querymask.isda.masks import maskness, reduce_masks, resize_probabilities

MakeCfg = Callable[..., CfgNode]
MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

FORMS = {
    "release": {},
    "paper": {
        "KERNEL_POSITIONS": "point",
        "KERNEL_LOSS": "iou",
        "KERNEL_MASKNESS": False,
        "CLASS_COST": "probability",
        "CLASS_WEIGHT": 1.0,
    },
    "no positions": {"KERNEL_POSITIONS": "none", "KERNEL_MASK_POSITIONS": False},
    "stride 8": {"KERNEL_MASK_STRIDE": 8},
    "stride 2": {"KERNEL_MASK_STRIDE": 2},
}


@pytest.mark.parametrize("counts", [[0], [0, 3], [3, 0], [9, 1]])
@pytest.mark.parametrize("form", FORMS)
def test_training(make_model: MakeModel, make_batch: MakeBatch, form: str, counts: list[int]) -> None:
    """Every trained parameter gets a finite gradient, also without instances and with more instances than queries."""
    model = make_model(**FORMS[form])
    losses = model(make_batch(counts, [(64, 96), (56, 80)][: len(counts)]))
    sum(losses.values()).backward()
    assert set(losses) == {"loss_cls", "loss_mask", "loss_cls_0", "loss_mask_0"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    if not sum(counts):
        assert losses["loss_mask"] == losses["loss_mask_0"] == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        else:
            assert form == "stride 8" and name.startswith("detector.fine_proj."), f"{name} is not trained"


def test_forms(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch([1], [(60, 90)])  # padded to 64 x 96
    for form, overrides in FORMS.items():
        model = make_model(**overrides)
        with torch.no_grad():
            found, made = model.predict(model.preprocess(batch))
        stride = model.mask_branch.mask_stride
        assert made.features.shape == (1, 64, 64 // stride, 96 // stride), form
        assert made.features.min() >= 0
        assert found.logits.shape == (2, 1, 6, 5) and made.kernels.shape == (2, 1, 6, 64)
        assert found.memory.shape[1] == 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
        assert model.mask_branch.kernel_embed.layers[-1].out_features == (64 if form == "no positions" else 62)
        points = found.references
        assert points.shape == (1, 6, 2) and points.min() > 0 and points.max() < 1
        tail = made.kernels[..., 62:]
        if form == "paper":
            assert torch.equal(tail, points.expand(2, -1, -1, -1))
        elif form != "no positions":
            assert torch.allclose(tail, points.logit().expand(2, -1, -1, -1), atol=1e-5)


def test_reference_points_learn_through_the_kernels(make_model: MakeModel) -> None:
    """Nothing is detached: a kernel's last two entries have a gradient to the reference point's layer."""
    model = make_model()
    query = model.detector.query_embed.weight[:, :64]
    references = model.detector.transformer.reference_points(query).sigmoid()[None]
    found = BoxFreePredictions(references, references, references=references)
    kernels = model.mask_branch.make_kernels(references.new_zeros(2, 1, 6, 64), found.positions())
    kernels[..., -2:].sum().backward()
    assert model.detector.transformer.reference_points.weight.grad.any()
    assert (
        model.detector.query_embed.weight.grad[:, :64].any()
        and not model.detector.query_embed.weight.grad[:, 64:].any()
    )


def test_coordinates(make_model: MakeModel) -> None:
    like = torch.zeros(2, 3, 4, 5)
    grid = coordinate_channels(like)
    assert grid.shape == (2, 2, 4, 5)
    assert grid[1, 0, 2].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert grid[0, 1, :, 3].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    last = append_coordinates(like.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, append_coordinates(like))


def test_mask_feature_head_against_a_plain_one() -> None:
    """Units, their order, upsampling and the place of the coordinates, written out for strides 4, 8 and 16 to 4."""
    torch.manual_seed(0)
    head = MaskFeatureHead(32, [4, 8, 16], 4, width=32, out_channels=64).double()
    levels = [torch.randn(2, 32, 8 // 2**i, 12 // 2**i, dtype=torch.float64) for i in range(3)]

    def up(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    b = head.branches
    coarse = torch.cat((levels[2], coordinate_channels(levels[2])), 1)
    total = b[0][0](levels[0]) + up(b[1][0](levels[1])) + up(b[2][1](up(b[2][0](coarse))))
    assert torch.allclose(head(levels), head.output(total), rtol=0, atol=1e-12)
    assert [len(branch) for branch in b] == [1, 1, 2]


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_targets_are_bilinear_reductions(stride: int) -> None:
    """As torch's interpolation of the zero-padded mask gives them, without antialiasing."""
    torch.manual_seed(stride)
    masks = torch.rand(3, 27, 30) < 0.5
    size = (32 // stride, 40 // stride)
    padded = nn.functional.pad(masks.double(), (0, 10, 0, 5))
    expected = nn.functional.interpolate(padded[None], scale_factor=1 / stride, mode="bilinear", align_corners=False)[0]
    assert torch.equal(reduce_masks(masks, stride, size, torch.float64), expected)
    assert reduce_masks(masks[:0], stride, size, torch.float32).shape == (0, *size)


def test_maskness() -> None:
    maps = torch.tensor([[[0.9, 0.7], [0.4, 0.0]], [[0.1, 0.2], [0.3, 0.5]]], dtype=torch.float64)
    assert maskness(maps, 0.5).tolist() == pytest.approx([1.6 / (2 + 1e-5), 0])
    assert maskness(maps, 1e-6).tolist() == pytest.approx([2.0 / (3 + 1e-5), 1.1 / (4 + 1e-5)])


def test_resizing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    maps = torch.rand(7, 8, 12)
    arguments = (maps, 4, (30, 45), (57, 91), 0.5)
    whole = resize_probabilities(*arguments)
    monkeypatch.setattr(isda_masks, "CHUNK_ELEMENTS", 1)
    assert torch.equal(resize_probabilities(*arguments), whole)
    assert 0.2 < whole.float().mean() < 0.8
    assert resize_probabilities(maps[:0], *arguments[1:]).shape == (0, 57, 91)


def test_resizing_holds_few_maps_at_once() -> None:
    """No intermediate map of all detections at full size: 100 of them on a canvas of 1344 x 800."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    with Watch():
        masks = resize_probabilities(torch.rand(100, 200, 336), 4, (800, 1333), (480, 800), 0.5)
    assert masks.shape == (100, 480, 800)
    assert 0 < largest <= isda_masks.CHUNK_ELEMENTS


@pytest.mark.parametrize("with_maskness", [True, False])
def test_detections(make_model: MakeModel, make_batch: MakeBatch, with_maskness: bool) -> None:
    """The best pairs of query and class; masks, scores and order by a second implementation in numpy."""
    model = make_model(KERNEL_MASKNESS=with_maskness).eval()
    batch = make_batch([0, 0], [(64, 96), (60, 70)])
    batch[0].update(height=50, width=120)
    with torch.no_grad():
        found = [result["instances"].to("cpu") for result in model(batch)]
        predictions, made = model.predict(model.preprocess(batch))
    for b, (size, shape) in enumerate([((64, 96), (50, 120)), ((60, 70), (60, 70))]):
        instances = found[b]
        assert instances.image_size == shape and len(instances) == 9 and not instances.has("pred_boxes")
        scores = expit(predictions.logits[-1, b].cpu().numpy())
        ranking = sorted(np.ndindex(scores.shape), key=lambda pair: -scores[pair])[:9]
        for i, (query, label) in enumerate(ranking):
            assert (instances.pred_queries[i].item(), instances.pred_classes[i].item()) == (query, label)
            kernel, features = made.kernels[-1, b, query].cpu().numpy(), made.features[b].cpu().numpy()
            map_ = expit(np.einsum("c,chw->hw", kernel, features))
            above = map_ > 0.5
            expected = scores[query, label]
            if with_maskness:
                expected *= (map_ * above).sum() / (above.sum() + 1e-5)
            assert instances.scores[i].item() == pytest.approx(expected, abs=1e-5)
            image = bilinear(map_, (64, 96))[: size[0], : size[1]]
            mask = bilinear(image, shape) > 0.5
            assert (instances.pred_masks[i].numpy() != mask).mean() < 1e-3
    assert 0 < torch.cat([f.pred_masks.flatten() for f in found]).float().mean() < 1


def bilinear(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with half-pixel centres and repeated borders."""
    for axis, new in enumerate(size):
        old = map_.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape((-1, 1) if axis == 0 else (1, -1))
        map_ = map_.take(low, axis) * (1 - share) + map_.take(high, axis) * share
    return map_


def test_an_image_gets_in_a_batch_what_it_gets_alone(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """On the same padded canvas: 64 x 96 for both of these sizes."""
    model = make_model().double().eval()
    batch = make_batch([0, 0], [(64, 96), (40, 66)])
    with torch.no_grad():
        together = [result["instances"] for result in model(batch)]
        alone = [model([item])[0]["instances"] for item in batch]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a.scores, b.scores, rtol=0, atol=1e-12)
        assert torch.equal(a.pred_queries, b.pred_queries) and torch.equal(a.pred_masks, b.pred_masks)


def test_a_larger_canvas_is_the_one_exception(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Coordinate channels and group norms see the padding, so another canvas gives slightly other masks."""
    model = make_model().double().eval()
    batch = make_batch([0, 0], [(64, 96), (32, 32)])
    with torch.no_grad():
        small = model.predict(model.preprocess(batch))[1].features[1, :, :8, :8]
        alone = model.predict(model.preprocess(batch[1:]))[1].features[0]
    assert not torch.allclose(small, alone, atol=1e-6)


def test_no_image_side_below_the_coarsest_stride(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    with torch.no_grad():
        (result,) = model(make_batch([0], [(5, 9)]))
    assert result["instances"].pred_masks.shape == (9, 5, 9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"KERNEL_POSITIONS": "logits"}, "MODEL.MASK_BRANCH.KERNEL.POSITIONS is 'logits': choose one of"),
        ({"KERNEL_MASK_STRIDE": 3}, "MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE is 3: choose one of (2, 4, 8)"),
        ({"CLASS_COST": "dice"}, "MODEL.ISDA.CLASS_COST is 'dice': choose one of focal, probability"),
        ({"KERNEL_LOSS": "bce"}, "MODEL.MASK_BRANCH.KERNEL.LOSS is 'bce': choose one of ('dice', 'iou')"),
        ({"KERNEL_MASK_FEATURE_DIM": 48}, "MASK_FEATURE_DIM is 48; it must be a multiple of 32"),
        ({"IN_FEATURES": ["res2", "p3"]}, "IN_FEATURES names ['p3'], but the backbone gives ['res2', 'res3'"),
    ],
)
def test_bad_settings(make_cfg: MakeCfg, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(make_cfg(**overrides))


def test_masks_are_needed(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch([2])
    batch[0]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="no gt_masks"):
        make_model()(batch)


def test_bf16_autocast(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Costs and losses stay in float32 and near those of full precision."""
    model, batch = make_model(), make_batch([3, 1])
    exact = model(batch)
    with torch.autocast(model.device.type, torch.bfloat16):
        losses = model(batch)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.05), name


class Network(nn.Module):
    """Normalised images (B, 3, H, W) of one size -> logits, kernels and mask features of the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found, made = self.model.predict(ImageList(images, [tuple(images.shape[-2:])] * len(images)))
        return found.logits[-1], made.kernels[-1], made.features


def test_export(make_model: MakeModel) -> None:
    """The exported program gives what eager execution gives, also on other pixels."""
    network = Network(make_model(ENC_LAYERS=1, DEC_LAYERS=1).eval())
    generator = torch.Generator().manual_seed(0)
    example, image = torch.randn(2, 1, 3, 64, 96, generator=generator).to(network.model.device)
    program = torch.export.export(network, (example,)).module()
    with torch.no_grad():
        outputs = program(image)
        for actual, expected in zip(outputs, network(image), strict=True):
            assert actual.shape == expected.shape
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[2], program(example)[2])


def test_checkpoints_without_parts_load(make_model: MakeModel) -> None:
    """Names from before there was a detector and a mask branch."""
    model, other = make_model(), make_model()
    state = model.state_dict()
    old = {name.removeprefix("detector.").removeprefix("mask_branch."): value + 1 for name, value in state.items()}
    other.load_state_dict(old, strict=True)
    assert all(torch.equal(value, state[name] + 1) for name, value in other.state_dict().items())
