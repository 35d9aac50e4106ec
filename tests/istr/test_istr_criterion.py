"""Costs and losses of a tiny output against loops over pairs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from querymask.common.images import Canvas
from querymask.common.mask_coding import DCTMaskCoding, MaskCoding, PCABasis, PCAMaskCoding
from querymask.common.mask_coding.targets import CodedTargets
from querymask.common.masks import crop_masks
from querymask.common.predictions import Assignment, LossTerm, Targets, unweighted
from querymask.common.set_criterion import SetDetector
from querymask.istr.codes import CodeBranch
from querymask.istr.criterion import RecurrentCriterion
from querymask.istr.mask_head import MaskCode
from querymask.istr.predictions import RecurrentPredictions

N, B, Q, K, SIZE, LENGTH = 2, 2, 5, 4, 8, 12
COUNTS = [2, 1]
SIZES = [(32, 40), (36, 30)]
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 3.0}
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 3.0}


@dataclass
class Case:
    """What a model would have found and made, its parts, and the targets."""

    detector: SetDetector
    branch: CodeBranch
    found: RecurrentPredictions
    made: list[MaskCode]
    targets: Targets

    @property
    def truth(self) -> CodedTargets:
        return self.branch.encode(self.targets, self.found)

    def terms(self) -> list[LossTerm]:
        truth = self.truth
        assignment = self.match(truth)
        normalizers = self.detector.normalizers(self.targets, assignment)
        terms = self.detector.losses(self.found, self.targets, assignment, normalizers)
        return terms + self.branch.losses(self.found, self.made, truth, self.targets, assignment, normalizers)

    def costs(self, truth: CodedTargets) -> dict[str, torch.Tensor]:
        own = self.detector.criterion.cost_terms(self.found, self.targets)
        return {**own, **self.branch.costs(self.found, self.made, truth, self.targets)}

    @torch.no_grad()
    def match(self, truth: CodedTargets) -> Assignment:
        return self.detector.match(
            self.found, self.targets, self.branch.costs(self.found, self.made, truth, self.targets)
        )


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_boxes(*shape: int) -> torch.Tensor:
    low = torch.rand(*shape, 2) * 20
    return torch.cat((low, low + 2 + torch.rand(*shape, 2) * 20), dim=-1)


def make_case(coding: MaskCoding, soft: str = "", counts: Sequence[int] = COUNTS, **options: Any) -> Case:
    """``options`` are those of the branch; ``soft``: the loss of a softmax classifier, "" for a sigmoid one."""
    torch.manual_seed(0)
    sides = torch.tensor([[width, height] * 2 for height, width in SIZES], dtype=torch.float64)
    found = RecurrentPredictions(
        logits=torch.randn(N, B, Q, K + bool(soft), requires_grad=True),
        hidden=torch.zeros(N, B, Q, 1),
        canvas=Canvas((36, 40), torch.zeros(B, 36, 40, dtype=torch.bool), sides, True),
        image_sizes=SIZES,
        boxes=random_boxes(N, B, Q),
    )
    made = [MaskCode(torch.randn(B * Q, coding.length, requires_grad=True)) for _ in range(N)]
    boxes = torch.cat([random_boxes(count) for count in counts])
    masks = [torch.rand(count, *size) < 0.6 for count, size in zip(counts, SIZES, strict=True)]
    labels = torch.tensor([1, 3, 0] * sum(counts))[: sum(counts)]
    kinds = {"classifier": "softmax", "softmax_loss": soft} if soft else {}
    criterion = RecurrentCriterion(COSTS, WEIGHTS, **kinds)
    branch = CodeBranch([], coding, cost=1.5, weights={"loss_vector": 0.5, "loss_dice": 4.0}, **options)
    return Case(SetDetector(criterion), branch, found, made, Targets(counts, labels, boxes, SIZES, masks))


def slow_cost(case: Case, truth: CodedTargets, n: int, b: int, q: int, t: int) -> float:
    """Section 9's formulas for one pair; t counts over the batch."""
    logits, label = case.found.logits[n, b, q].detach(), case.targets.labels[t]
    if case.detector.criterion.classifier == "softmax":
        cost = -2.0 * logits.softmax(0)[label]
    else:
        p = logits.sigmoid()[label]
        positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
        cost = 2.0 * (positive - 0.75 * p**2 * -math.log(1 - p + 1e-8))
    box, wanted = case.found.boxes[n, b, q], case.targets.boxes[t]
    cost = cost + 5.0 * ((box - wanted).abs() / case.found.canvas.sides[b]).sum()
    cost = cost - 3.0 * generalized_box_iou(box[None], wanted[None])[0, 0]
    vector = case.made[n].vectors[b * Q + q].detach()
    other, crop = truth.vectors[t], truth.crops[t]
    kind = case.branch.mask_cost
    if kind == "cosine":
        cost = cost - 1.5 * (F.cosine_similarity(vector, other, dim=0) + 1) / 2
    elif kind == "l1":
        cost = cost + 1.5 * (vector - other).abs().mean()
    elif kind == "dice":
        cost = cost + 1.5 * slow_dice(case.branch.coding.decode(vector[None])[0], crop)
    return float(cost)


def slow_dice(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 1 - 2 * (p * t).sum() / ((p**2).sum() + t.sum() + 1e-5)


@pytest.mark.parametrize("kind", ["cosine", "l1", "dice", "none"])
@pytest.mark.parametrize("soft", ["", "cross_entropy"])
def test_costs(kind: str, soft: str) -> None:
    case = make_case(DCTMaskCoding(SIZE, LENGTH), soft, mask_cost=kind)
    truth = case.truth
    cost = sum(case.costs(truth).values()).detach()
    assert cost.shape == (N, B, Q, max(COUNTS))
    for n, b, q in itertools.product(range(N), range(B), range(Q)):
        for t in range(COUNTS[b]):
            expected = slow_cost(case, truth, n, b, q, sum(COUNTS[:b]) + t)
            assert float(cost[n, b, q, t]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("soft", ["", "cross_entropy", "focal"])
@pytest.mark.parametrize("distance", ["l2", "smooth_l1"])
@pytest.mark.parametrize("at", ["ground_truth", "predicted"])
def test_losses(soft: str, distance: str, at: str) -> None:
    coding = DCTMaskCoding(SIZE, LENGTH)
    case = make_case(coding, soft, vector_loss=distance, mask_target=at)
    found, targets, truth = case.found, case.targets, case.truth
    assignment = case.match(truth)
    terms = case.terms()
    losses = unweighted(terms)
    count = sum(COUNTS)
    for n in range(N):
        expected = dict.fromkeys(("loss_bbox", "loss_giou", "loss_vector", "loss_dice"), 0.0)
        labels = torch.full((B, Q), K)
        pairs = list(zip(assignment.layer, assignment.image, assignment.query, assignment.target))
        for _, b, q, t in (pair for pair in pairs if pair[0] == n):
            labels[b, q] = targets.labels[t]
            box, wanted = found.boxes[n, b, q], targets.boxes[t]
            expected["loss_bbox"] += ((box - wanted).abs() / found.canvas.sides[b]).sum() / count
            expected["loss_giou"] += (1 - generalized_box_iou(box[None], wanted[None])[0, 0]) / count
            vector = case.made[n].vectors[b * Q + q]
            if at == "predicted":
                height, width = SIZES[b]
                clamped = torch.stack((box[0::2].clamp(0, width), box[1::2].clamp(0, height)), dim=1).flatten()
                mask = targets.masks[b][t - sum(COUNTS[:b])]
                crop = crop_masks(mask[None], clamped[None], SIZE)[0]
            else:
                crop = truth.crops[t]
            difference = vector - coding.encode(crop[None])[0]
            if distance == "l2":
                value = (difference**2).sum()
            else:
                small = difference.abs() < 1
                value = torch.where(small, 0.5 * difference**2, difference.abs() - 0.5).sum()
            expected["loss_vector"] += value / count / LENGTH
            expected["loss_dice"] += slow_dice(coding.decode(vector[None])[0], crop) / count
        logits = found.logits[n]
        if soft == "focal":
            value = 0.0
            for b, q in itertools.product(range(B), range(Q)):
                p = logits[b, q, labels[b, q]].exp() / logits[b, q].exp().sum()
                value -= (0.75 if labels[b, q] == K else 0.25) * (1 - p) ** 2 * torch.log(p)
            expected["loss_ce"] = value / count
        elif soft:
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
    assert {term.name: term.weight for term in terms} == {**WEIGHTS, "loss_vector": 0.5, "loss_dice": 4.0}


def test_noise_is_drawn_anew_for_every_stage_and_use() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = []

    def noise(pixels: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(pixels.shape, generator=rng, dtype=pixels.dtype))
        return drawn[-1]

    basis = PCABasis(torch.eye(SIZE**2)[:LENGTH].numpy(), *(torch.ones(n).numpy() for n in (SIZE**2, LENGTH, LENGTH)))
    make_case(PCAMaskCoding(SIZE, LENGTH, basis, noise)).terms()
    variates = torch.cat(drawn)
    assert len(variates) == 2 * N * sum(COUNTS), "matching and loss of every stage"
    assert len(torch.unique(variates, dim=0)) == len(variates)


def test_last_stage_alone() -> None:
    case = make_case(DCTMaskCoding(SIZE, LENGTH))
    everything = unweighted(case.terms())
    last = unweighted(replace(case, found=case.found.last(), made=case.made[-1:]).terms())
    assert set(last) == {*WEIGHTS, "loss_vector", "loss_dice"}
    assert all(torch.equal(value, everything[name]) for name, value in last.items())


def test_predicted_boxes_outside_of_the_image_have_empty_targets() -> None:
    case = make_case(DCTMaskCoding(SIZE, LENGTH), mask_target="predicted")
    case.found.boxes = case.found.boxes + 1000
    truth = case.truth
    crops = case.branch.target_crops(case.found, truth, case.targets, case.match(truth))
    assert crops.shape == (N * sum(COUNTS), SIZE, SIZE) and not crops.any()
    assert all(torch.isfinite(term.value) for term in case.terms())


def test_more_targets_than_queries() -> None:
    """As many as there are queries are matched, and every crop is of its own mask and box."""
    case = make_case(DCTMaskCoding(SIZE, LENGTH), counts=[Q + 2, 1], mask_target="predicted")
    truth = case.truth
    assignment = case.match(truth)
    assert assignment.pairs_per_layer() == Q + 1
    crops = case.branch.target_crops(case.found, truth, case.targets, assignment)
    masks = [mask for image in case.targets.masks for mask in image]
    for crop, n, b, q, t in zip(crops, assignment.layer, assignment.image, assignment.query, assignment.target):
        height, width = SIZES[b]
        x0, y0, x1, y1 = case.found.boxes[n, b, q].tolist()
        box = torch.tensor([[min(x0, width), min(y0, height), min(x1, width), min(y1, height)]])
        assert torch.equal(crop, crop_masks(masks[t][None], box, SIZE)[0])
    assert all(torch.isfinite(term.value) for term in case.terms())
