"""Costs and losses of a tiny output against loops over pairs."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from querymask.common.mask_coding import DCTMaskCoding, MaskCoding, PCABasis, PCAMaskCoding
from querymask.common.masks import crop_masks
from querymask.istr.criterion import ISTRCriterion, ISTROutput, ISTRTargets
from querymask.istr.mask_head import MaskCode

N, B, Q, K, SIZE, LENGTH = 2, 2, 5, 4, 8, 12
COUNTS = [2, 1]
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 3.0, "mask": 1.5}
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 3.0, "loss_vector": 0.5, "loss_dice": 4.0}


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_boxes(*shape: int) -> torch.Tensor:
    low = torch.rand(*shape, 2) * 20
    return torch.cat((low, low + 2 + torch.rand(*shape, 2) * 20), dim=-1)


def make_case(coding: MaskCoding, classes: int = K, counts: Sequence[int] = COUNTS) -> tuple[ISTROutput, ISTRTargets]:
    torch.manual_seed(0)
    scale = torch.tensor([[40.0, 32, 40, 32], [30, 36, 30, 36]])
    outputs = ISTROutput(
        logits=torch.randn(N, B, Q, classes, requires_grad=True),
        boxes=random_boxes(N, B, Q),
        features=torch.zeros(N, B, Q, 1),
        scale=scale,
        pyramid=None,
        codes=[MaskCode(torch.randn(B * Q, coding.length, requires_grad=True)) for _ in range(N)],
        coding=coding,
    )
    boxes = [random_boxes(count) for count in counts]
    masks = [torch.rand(count, int(s[1]), int(s[0])) < 0.6 for count, s in zip(counts, scale, strict=True)]
    crops = torch.cat([crop_masks(m, b, SIZE) for m, b in zip(masks, boxes, strict=True)])
    fields = {"boxes": torch.cat([b / s for b, s in zip(boxes, scale, strict=True)]), "crops": crops}
    if not coding.is_random:
        fields["vectors"] = coding.encode(crops)
    return outputs, ISTRTargets(counts, torch.tensor([1, 3, 0] * sum(counts))[: sum(counts)], fields, masks=masks)


def slow_cost(
    outputs: ISTROutput, targets: ISTRTargets, n: int, b: int, q: int, t: int, kind: str, soft: bool
) -> float:
    """Section 9's formulas for one pair; t counts over the batch."""
    logits, label = outputs.logits[n, b, q].detach(), targets.labels[t]
    if soft:
        cost = -2.0 * logits.softmax(0)[label]
    else:
        p = logits.sigmoid()[label]
        positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
        cost = 2.0 * (positive - 0.75 * p**2 * -math.log(1 - p + 1e-8))
    box, truth = outputs.boxes[n, b, q], targets.fields["boxes"][t] * outputs.scale[b]
    cost = cost + 5.0 * ((box - truth).abs() / outputs.scale[b]).sum()
    cost = cost - 3.0 * generalized_box_iou(box[None], truth[None])[0, 0]
    vector = outputs.codes[n].vectors[b * Q + q].detach()
    other, crop = targets.fields["vectors"][t], targets.fields["crops"][t]
    if kind == "cosine":
        cost = cost - 1.5 * (F.cosine_similarity(vector, other, dim=0) + 1) / 2
    elif kind == "l1":
        cost = cost + 1.5 * (vector - other).abs().mean()
    elif kind == "dice":
        cost = cost + 1.5 * slow_dice(outputs.coding.decode(vector[None])[0], crop)
    return float(cost)


def slow_dice(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 1 - 2 * (p * t).sum() / ((p**2).sum() + t.sum() + 1e-5)


@pytest.mark.parametrize("kind", ["cosine", "l1", "dice", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_costs(kind: str, soft: bool) -> None:
    outputs, targets = make_case(DCTMaskCoding(SIZE, LENGTH), K + soft)
    criterion = ISTRCriterion(COSTS, WEIGHTS, mask_cost=kind, classifier="softmax" if soft else "sigmoid")
    cost = sum(criterion.cost_terms(outputs, targets).values()).detach()
    assert cost.shape == (N, B, Q, max(COUNTS))
    for n, b, q in itertools.product(range(N), range(B), range(Q)):
        for t in range(COUNTS[b]):
            expected = slow_cost(outputs, targets, n, b, q, sum(COUNTS[:b]) + t, kind, soft)
            assert float(cost[n, b, q, t]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", ["l2", "smooth_l1"])
@pytest.mark.parametrize("at", ["ground_truth", "predicted"])
def test_losses(soft: bool, distance: str, at: str) -> None:
    coding = DCTMaskCoding(SIZE, LENGTH)
    outputs, targets = make_case(coding, K + soft)
    criterion = ISTRCriterion(
        COSTS, WEIGHTS, classifier="softmax" if soft else "sigmoid", vector_loss=distance, mask_target=at
    )
    assignment = criterion.match(outputs, targets)
    losses = criterion(outputs, targets)
    count = sum(COUNTS)
    for n in range(N):
        expected = dict.fromkeys(("loss_bbox", "loss_giou", "loss_vector", "loss_dice"), 0.0)
        labels = torch.full((B, Q), K)
        pairs = list(zip(assignment.layer, assignment.image, assignment.query, assignment.target))
        for _, b, q, t in (pair for pair in pairs if pair[0] == n):
            labels[b, q] = targets.labels[t]
            box, truth = outputs.boxes[n, b, q], targets.fields["boxes"][t] * outputs.scale[b]
            expected["loss_bbox"] += ((box - truth).abs() / outputs.scale[b]).sum() / count
            expected["loss_giou"] += (1 - generalized_box_iou(box[None], truth[None])[0, 0]) / count
            vector = outputs.codes[n].vectors[b * Q + q]
            if at == "predicted":
                width, height = outputs.scale[b, :2]
                clamped = torch.stack((box[0::2].clamp(0, width), box[1::2].clamp(0, height)), dim=1).flatten()
                mask = targets.masks[b][t - sum(COUNTS[:b])]
                crop = crop_masks(mask[None], clamped[None], SIZE)[0]
            else:
                crop = targets.fields["crops"][t]
            difference = vector - coding.encode(crop[None])[0]
            if distance == "l2":
                value = (difference**2).sum()
            else:
                small = difference.abs() < 1
                value = torch.where(small, 0.5 * difference**2, difference.abs() - 0.5).sum()
            expected["loss_vector"] += value / count / LENGTH
            expected["loss_dice"] += slow_dice(coding.decode(vector[None])[0], crop) / count
        logits = outputs.logits[n]
        if soft:
            weight = torch.tensor([1.0] * K + [0.1])
            expected["loss_ce"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)
        else:
            value = 0.0
            for b, q, c in itertools.product(range(B), range(Q), range(K)):
                p = logits[b, q, c].sigmoid()
                if labels[b, q] == c:
                    value += -0.25 * (1 - p) ** 2 * torch.log(p)
                else:
                    value += -0.75 * p**2 * torch.log(1 - p)
            expected["loss_ce"] = value / count
        for name, value in expected.items():
            actual = losses[name if n == N - 1 else f"{name}_{n}"].detach()
            assert float(actual) == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-9), name
    weighted = criterion.weigh(losses)
    assert weighted["loss_dice_0"] == 4.0 * losses["loss_dice_0"]


def test_noise_is_drawn_anew_for_every_stage_and_use() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = []

    def noise(pixels: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(pixels.shape, generator=rng, dtype=pixels.dtype))
        return drawn[-1]

    basis = PCABasis(torch.eye(SIZE**2)[:LENGTH].numpy(), *(torch.ones(n).numpy() for n in (SIZE**2, LENGTH, LENGTH)))
    outputs, targets = make_case(PCAMaskCoding(SIZE, LENGTH, basis, noise))
    ISTRCriterion(COSTS, WEIGHTS)(outputs, targets)
    variates = torch.cat(drawn)
    assert len(variates) == 2 * N * sum(COUNTS), "matching and loss of every stage"
    assert len(torch.unique(variates, dim=0)) == len(variates)


def test_last_stage_alone() -> None:
    outputs, targets = make_case(DCTMaskCoding(SIZE, LENGTH))
    everything = ISTRCriterion(COSTS, WEIGHTS)(outputs, targets)
    last = ISTRCriterion(COSTS, WEIGHTS, deep_supervision=False)(outputs, targets)
    assert set(last) == set(WEIGHTS)
    assert all(torch.equal(value, everything[name]) for name, value in last.items())


def test_predicted_boxes_outside_of_the_image_have_empty_targets() -> None:
    outputs, targets = make_case(DCTMaskCoding(SIZE, LENGTH))
    outputs.boxes = outputs.boxes + 1000
    criterion = ISTRCriterion(COSTS, WEIGHTS, mask_target="predicted")
    crops = criterion.target_crops(outputs, targets, criterion.match(outputs, targets), SIZE)
    assert crops.shape == (N * sum(COUNTS), SIZE, SIZE) and not crops.any()
    assert all(torch.isfinite(value) for value in criterion(outputs, targets).values())


def test_more_targets_than_queries() -> None:
    """As many as there are queries are matched, and every crop is of its own mask and box."""
    outputs, targets = make_case(DCTMaskCoding(SIZE, LENGTH), counts=[Q + 2, 1])
    criterion = ISTRCriterion(COSTS, WEIGHTS, mask_target="predicted")
    assignment = criterion.match(outputs, targets)
    assert assignment.pairs_per_layer() == Q + 1
    crops = criterion.target_crops(outputs, targets, assignment, SIZE)
    masks = [mask for image in targets.masks for mask in image]
    for crop, n, b, q, t in zip(crops, assignment.layer, assignment.image, assignment.query, assignment.target):
        width, height = outputs.scale[b, :2].tolist()
        x0, y0, x1, y1 = outputs.boxes[n, b, q].tolist()
        box = torch.tensor([[min(x0, width), min(y0, height), min(x1, width), min(y1, height)]])
        assert torch.equal(crop, crop_masks(masks[t][None], box, SIZE)[0])
    assert all(torch.isfinite(value) for value in criterion(outputs, targets).values())
