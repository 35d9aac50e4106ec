"""The SQR baseline: attention maps, mask head, losses and detections, against slow formulas."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from scipy.special import expit
from torch import nn
from training_steps import training_step

from querymask.common.masks import pad_masks
from querymask.solq.sqr import AttentionMaps, MaskHead, inside_boxes

MakeCfg = Callable[..., CfgNode]
MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

SQR = {"BRANCH": "SQRBranch", "HIDDEN_DIM": 128, "NUM_HEADS": 8}


@pytest.fixture
def make_sqr(make_model: MakeModel) -> MakeModel:
    """Function (keys as in `tiny_cfg`) that gives a baseline whose masks are neither empty nor full."""

    def make(**overrides: Any) -> nn.Module:
        model = make_model(**{**SQR, **overrides})
        with torch.no_grad():
            model.mask_branch.head.output.weight.mul_(20)
            model.detector.bbox_embed[-1].layers[-1].bias[2:] = 1  # large boxes
        return model

    return make


def test_attention_maps() -> None:
    """One softmax over heads and positions together, padding left out."""
    torch.manual_seed(0)
    attention = AttentionMaps(8, 2).double()
    nn.init.normal_(attention.query.bias)
    nn.init.normal_(attention.key.bias)
    queries, memory = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        maps = attention(queries, attention.key(memory), padding)
        q, k = attention.query(queries).tolist(), attention.key(memory).tolist()
    for n in range(3):
        weights = {}
        for head in range(2):
            for s in range(5):
                score = sum(q[n][c] * k[n][s][c] for c in range(4 * head, 4 * head + 4)) / math.sqrt(4)
                weights[head, s] = 0.0 if padding[n, s] else math.exp(score)
        total = sum(weights.values())
        for (head, s), weight in weights.items():
            assert maps[n, head, s].item() == pytest.approx(weight / total, abs=1e-12)


def test_mask_head() -> None:
    """Each query by itself, with the first convolution on features and maps put together."""
    torch.manual_seed(0)
    head = MaskHead(128, 8, [10, 6, 4]).double()
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    features, image = torch.randn(2, 128, 2, 3, dtype=torch.float64), torch.tensor([1, 0, 1])
    sizes = [(2, 3), (3, 5), (6, 10)]
    skips = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip((10, 6, 4), sizes, strict=True)]
    maps = torch.rand(3, 8, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        logits = head(maps, *head.prepare(features, skips), image)
        assert logits.shape == (3, 6, 10)
        for n, b in enumerate(image.tolist()):
            x = torch.cat((features[b], maps[n]))[None]
            for index, block in enumerate(head.blocks):
                if index >= 2:
                    skip = skips[index - 2][b : b + 1]
                    rows = torch.arange(skip.shape[2]) * x.shape[2] // skip.shape[2]
                    columns = torch.arange(skip.shape[3]) * x.shape[3] // skip.shape[3]
                    x = head.adapters[index - 2](skip) + x[:, :, rows][..., columns]
                x = block(x)
            assert torch.allclose(logits[n], head.output(x)[0, 0], rtol=0, atol=1e-10)
    assert [block[0].out_channels for block in head.blocks] == [136, 64, 32, 16, 8]


def test_losses(make_sqr: MakeModel, make_batch: MakeBatch) -> None:
    """Focal and dice loss of the last layer's matches, over all pixels of the padded batch."""
    model = make_sqr(SQR_MASK_WEIGHT=3.0, SQR_DICE_WEIGHT=0.5).double()
    batch = make_batch([2, 1], [(64, 96), (80, 72)])
    with torch.no_grad():
        losses = model(batch)
        step = training_step(model, batch)
        assignment = step.assignment
        focal = dice = 0.0
        for pair in range(3, 6):
            image, query = assignment.image[pair : pair + 1], assignment.query[pair : pair + 1]
            small = model.mask_branch.coarse_logits(step.found.hidden[-1, image, query], step.made, image)
            large = F.interpolate(small[None], (80, 96), mode="bilinear", align_corners=False)
            x = large[0, 0].cpu().numpy()
            p, miss, hit = expit(x), np.logaddexp(0, -x), np.logaddexp(0, x)  # -log(p) and -log(1 - p)
            own = batch[image]["instances"].gt_masks.tensor[assignment.target[pair] - (2 if image else 0)]
            t = np.zeros((80, 96))
            t[: own.shape[0], : own.shape[1]] = own
            focal += np.where(t == 1, 0.25 * (1 - p) ** 2 * miss, 0.75 * p**2 * hit).mean() / 3
            dice += (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) / 3
    assert losses["loss_mask"].item() == pytest.approx(3 * focal, rel=1e-6)
    assert losses["loss_dice"].item() == pytest.approx(0.5 * dice, rel=1e-6)
    assert not {"loss_mask_0", "loss_dice_0", "loss_vector"} & set(losses)


@pytest.mark.parametrize("crop", [False, True])
def test_detections(make_sqr: MakeModel, make_batch: MakeBatch, crop: bool) -> None:
    """Logits resized to the batch, thresholded, cut to the image, then resized by nearest neighbour."""
    model = make_sqr(SQR_CROP_MASKS=crop).eval()
    batch = make_batch([0, 0], [(64, 96), (80, 72)])
    batch[0].update(height=50, width=120)
    with torch.no_grad():
        found = [result["instances"].to("cpu") for result in model(batch)]
        predictions, context = model.predict(model.preprocess(batch))
        images = torch.tensor([0] * 6 + [1] * 6, device=model.device)
        everything = model.mask_branch.coarse_logits(predictions.hidden[-1].flatten(0, 1), context, images).cpu()
    large = F.interpolate(everything[:, None], (80, 96), mode="bilinear", align_corners=False)[:, 0].numpy()
    cut_off = 0
    for b, ((height, width), (rows, columns)) in enumerate([((50, 120), (64, 96)), ((80, 72), (80, 72))]):
        instances = found[b]
        assert instances.pred_masks.dtype == torch.bool and instances.pred_masks.shape == (9, height, width)
        for i, query in enumerate(instances.pred_queries.tolist()):
            foreground = large[6 * b + query][:rows, :columns] > 0
            y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
            expected = foreground[y][:, x]
            if crop:
                x0, y0, x1, y1 = instances.pred_boxes.tensor[i].tolist()
                inside = np.zeros_like(expected)
                for row, column in np.ndindex(height, width):
                    inside[row, column] = x0 <= column + 0.5 < x1 and y0 <= row + 0.5 < y1
                cut_off += (expected & ~inside).sum()
                expected &= inside
            assert (instances.pred_masks[i].numpy() != expected).sum() <= 1, "but for a pixel at the threshold"
        assert 0.005 < instances.pred_masks.float().mean() < 0.98
    assert cut_off or not crop


def test_masks_of_a_query_do_not_depend_on_the_others(make_sqr: MakeModel, make_batch: MakeBatch) -> None:
    model = make_sqr().eval()
    with torch.no_grad():
        predictions = model.predict(model.preprocess(make_batch([0, 0])))
        image, query = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 5, 2])
        together = model.mask_branch.logits(*predictions, image, query)
        for n in range(4):
            alone = model.mask_branch.logits(*predictions, image[n : n + 1], query[n : n + 1])[0]
            assert torch.allclose(alone, together[n], atol=1e-4)
    assert torch.allclose(together[0], together[3]) and not torch.allclose(together[1], together[2], atol=1e-2)


def test_frozen_detector(make_cfg: MakeCfg, make_batch: MakeBatch) -> None:
    """The mask branch alone is trained; the detector takes the weights of one without masks."""
    detector = build_model(make_cfg(BRANCH="none", HIDDEN_DIM=128, NUM_HEADS=8))
    model = build_model(make_cfg(**SQR, FREEZE_DETECTOR=True)).train()
    missing = model.load_state_dict(detector.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("mask_branch.") for key in missing.missing_keys)
    sum(model(make_batch([2, 1])).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == name.startswith("mask_branch."), name
    vectors = build_model(make_cfg(FREEZE_DETECTOR=True))
    assert {name.partition(".")[0] for name, p in vectors.named_parameters() if p.requires_grad} == {"mask_branch"}


def test_joint_training_reaches_the_detector(make_sqr: MakeModel, make_batch: MakeBatch) -> None:
    """The mask losses alone train backbone, encoder and queries too."""
    model = make_sqr()
    losses = model(make_batch([2, 1]))
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    for name in ("input_proj.3.0.weight", "transformer.encoder.layers.0.linear1.weight", "query_embed.weight"):
        assert model.detector.get_parameter(name).grad.any(), name
    assert next(model.backbone.parameters()).grad.any()
    assert model.detector.bbox_embed[-1].layers[-1].weight.grad is None


def test_initialisation(make_cfg: MakeCfg) -> None:
    branch = build_model(make_cfg(**SQR)).mask_branch
    for linear in (branch.attention.query, branch.attention.key):
        assert not linear.bias.any() and linear.weight.abs().max() <= math.sqrt(6 / 256)
    for conv in (branch.head.blocks[1][0], branch.head.adapters[0], branch.head.output):
        fan_in = conv.weight[0].numel()
        assert not conv.bias.any() and 0.8 < conv.weight.abs().max() / math.sqrt(3 / fan_in) <= 1.0001


def test_autocast(make_sqr: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_sqr(), make_batch([3, 0], [(64, 96), (56, 80)])
    expected = model(batch)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        losses = model(batch)
        (result, _) = model.eval()(batch)
    for name in ("loss_mask", "loss_dice"):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.1), name
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.mask_branch.parameters())
    assert result["instances"].pred_masks.dtype == torch.bool


def test_inside_boxes() -> None:
    boxes = torch.tensor([[0.5, 1.0, 2.5, 9.0], [-3.0, -3.0, 0.4, 9.0], [1.6, 0.0, 1.9, 3.0]])
    expected = np.zeros((3, 3, 4), dtype=bool)
    expected[0, 1:, :2] = True
    assert np.array_equal(inside_boxes(boxes, 3, 4), expected)
    assert inside_boxes(boxes[:0], 3, 4).shape == (0, 3, 4)


def test_pad_masks() -> None:
    padded = pad_masks(torch.ones(1, 2, 5, dtype=torch.bool), (4, 6))
    assert padded.shape == (1, 4, 6) and padded[0, :2, :5].all() and padded.sum() == 10
