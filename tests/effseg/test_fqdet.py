"""FQDet without its reference cases: anchors, matching, losses, detections."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from querymask.common.predictions import Targets, weighted
from querymask.effseg.fqdet import FQDet, criterion
from querymask.effseg.fqdet.anchors import apply_deltas, encode_deltas, make_anchors
from querymask.effseg.fqdet.criterion import FQDetCriterion, extended_iou_loss, match_queries, rank_anchors
from querymask.effseg.fqdet.suppression import detect, nms_within_classes

VERSIONS = pytest.mark.parametrize("version", [1, 2])


def make_detector(version: int, **settings: int) -> FQDet:
    torch.manual_seed(0)
    sizes = {"width": 32, "levels": (3, 4), "num_queries": 12, "num_classes": 5, "num_layers": 2, "ffn_dim": 16}
    parts = {"in_features": (), "neck": nn.Identity(), "criterion": FQDetCriterion(version)}
    return FQDet(**{**parts, **sizes, "num_heads": 4, "version": version, **settings}).double()


def make_maps(batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 32, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (2, 3))]


def make_targets(boxes: list[Tensor], label: int = 0) -> Targets:
    """Targets of a class, from the boxes (T, 4) of every image."""
    counts = [len(b) for b in boxes]
    return Targets(counts, torch.full((sum(counts),), label), torch.cat(boxes), [(32, 40)] * len(boxes))


def test_anchors():
    """Their order, centres and sizes."""
    anchors = make_anchors(((2, 3), (1, 2)), [3, 4], torch.zeros(0, dtype=torch.float64))
    assert anchors.shape == (9 * 8, 4)
    assert anchors[::9, :2].tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    width, height = anchors[:9, 2], anchors[:9, 3]
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2] * 3, dtype=torch.float64))
    sides = torch.tensor([32 * 2 ** (s / 3) for s in (0, 0, 0, 1, 1, 1, 2, 2, 2)], dtype=torch.float64)
    torch.testing.assert_close((width * height).sqrt(), sides)
    torch.testing.assert_close(anchors[54:63, 2:], 2 * anchors[:9, 2:])


def test_deltas():
    anchors = torch.tensor([[10.0, 20, 4, 8]])
    moved = apply_deltas(anchors, torch.tensor([[0.5, -0.25, math.log(2), 0]]))
    torch.testing.assert_close(moved, torch.tensor([[8.0, 14, 16, 22]]))
    torch.testing.assert_close(
        encode_deltas(anchors, box_convert(moved, "xyxy", "cxcywh")), torch.tensor([[0.5, -0.25, math.log(2), 0]])
    )
    assert apply_deltas(anchors, torch.full((1, 4), 1e9)).isfinite().all()


def test_ranks():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    anchors = box_convert(
        torch.tensor([[20.0, 20, 30, 41], [0, 0, 10, 11], [0, 0, 10, 10], [20, 21, 30, 30]]), "xyxy", "cxcywh"
    )
    assert rank_anchors(anchors, boxes, 2).tolist() == [[2, 0], [1, 3]]
    assert rank_anchors(anchors, boxes, 9).shape == (4, 2)
    assert rank_anchors(anchors, boxes[:0]).shape == (4, 0)


def test_ranks_of_some_anchors_at_a_time(monkeypatch):
    """The overlaps are those of all pairs, sorted; no tensor is much larger than the pairs taken at once."""
    anchors = make_anchors(((13, 17), (7, 9)), [3, 4], torch.zeros(0, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(30, 2, generator=generator, dtype=torch.float64) * 100
    boxes = torch.cat([low, low + 5 + torch.rand(30, 2, generator=generator, dtype=torch.float64) * 60], 1)
    overlaps = box_iou(boxes, box_convert(anchors, "cxcywh", "xyxy"))
    sizes: list[int] = []
    monkeypatch.setattr(criterion, "box_iou", lambda a, b: (sizes.append(len(a) * len(b)), box_iou(a, b))[1])
    for pairs in (1, 3000, 10**9):
        sizes.clear()
        monkeypatch.setattr(criterion, "PAIRS_AT_ONCE", pairs)
        ranked = rank_anchors(anchors, boxes)
        assert torch.equal(overlaps.gather(1, ranked.t()), overlaps.sort(dim=1, descending=True).values[:, :15])
        assert all(len(set(numbers)) == 15 for numbers in ranked.t().tolist())
        assert max(sizes) <= max(pairs, 15 * len(boxes))


def test_a_query_that_two_targets_claim():
    """The better rank wins; at equal ranks the first target."""
    ranked = torch.tensor([[7, 3, 5], [3, 9, 9]])
    assert match_queries(ranked, torch.tensor([1, 3, 5, 9]), 10).tolist() == [-1, 1, 2, 1]
    assert match_queries(ranked[:, :0], torch.tensor([1, 3]), 10).tolist() == [-1, -1]


def test_extended_iou():
    """1 - IoU where boxes overlap, smooth below 0.1; more than 1 where they are apart, and more so the farther."""
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 4, dtype=torch.float64)
    targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 9.6], [20, 0, 30, 10], [40, 0, 50, 10]], dtype=torch.float64)
    losses = extended_iou_loss(boxes, targets).tolist()
    assert losses[0] == pytest.approx(0.5 - 0.05)
    assert losses[1] == pytest.approx(0.04**2 / 0.2)
    assert 1 - 0.05 < losses[2] < losses[3]


def test_detections():
    """Pairs of query and class; NMS within a class; boxes without a size are left out, or not."""
    logits = torch.tensor([[3.0, 1, 9], [2, -1, 9], [4, 0, 9]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [5, 5, 5, 9]])
    found = detect(logits, boxes, 0.5)
    assert list(zip(found.queries.tolist(), found.labels.tolist())) == [(0, 0), (0, 1)]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1]).sigmoid())
    assert torch.equal(found.boxes, boxes[[0, 0]])
    found = detect(logits, boxes, 0.95, max_detections=4, drop_empty=False)
    assert list(zip(found.queries.tolist(), found.labels.tolist())) == [(2, 0), (0, 0), (1, 0), (0, 1)]


def nms_by_definition(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    """Each box in turn, by descending score, unless it overlaps a kept one of its class."""
    overlaps = box_iou(boxes, boxes)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if not any(labels[i] == labels[j] and overlaps[i, j] > threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize(
    "stray",
    [
        [0, 0, 1e8, 1e8],
        [-1e30, -1e30, 1e30, 1e30],
        [0, 0, float("inf"), 10],
        [float("nan")] * 4,
        [-900, -900, -200, -200],
        [-1e8, 0, -1e8 + 1, 10],
    ],
)
def test_a_stray_box_spoils_no_other_class(stray):
    """Huge ones, such as exp() of a wild delta gives, boxes at negative places, and boxes that are not finite."""
    generator = torch.Generator().manual_seed(0)
    low = (torch.rand(60, 2, generator=generator) * 60).double()
    boxes = torch.cat([low, low + 20 + torch.rand(60, 2, generator=generator).double() * 40], 1)
    boxes = torch.cat([boxes, boxes + 0.25])  # every box has a near double, of another class or of the same
    boxes = torch.cat([boxes, torch.tensor([stray, stray], dtype=torch.float64)])
    labels = torch.randint(5, (len(boxes),), generator=generator)
    scores = torch.rand(len(boxes), generator=generator).double()
    kept = nms_within_classes(boxes, scores, labels, 0.5).tolist()
    assert kept == nms_by_definition(boxes, scores, labels, 0.5)
    assert 5 < len(kept) < len(boxes)


def test_places_do_not_decide_between_classes():
    """A class whose boxes lie left of the image is not compared with the right edge of the class before it."""
    boxes = torch.tensor([[-1001.0, -1001, -1, -1], [0, 0, 1000, 1000]], dtype=torch.float64)
    scores, labels = torch.tensor([0.5, 0.9], dtype=torch.float64), torch.tensor([1, 0])
    assert nms_within_classes(boxes, scores, labels, 0.5).tolist() == [1, 0]
    assert nms_within_classes(boxes[:0], scores[:0], labels[:0], 0.5).tolist() == []


@VERSIONS
def test_images_do_not_meet(version):
    """An image has the same output in any batch."""
    detector, maps = make_detector(version), make_maps(3)
    together = detector.decode(maps, (32, 40))
    alone = detector.decode([feature[1:2] for feature in maps], (32, 40))
    assert torch.equal(together.selected[1], alone.selected[0])
    for name in ("selection_logits", "deltas", "boxes"):
        torch.testing.assert_close(getattr(together, name)[1], getattr(alone, name)[0])
    for name in ("hidden", "logits"):
        torch.testing.assert_close(getattr(together, name)[:, 1], getattr(alone, name)[:, 0])


@VERSIONS
def test_training_step(version):
    """Every parameter has a gradient, without a target too; targets that no query is near train the selector alone."""
    detector = make_detector(version)
    found = detector.decode(make_maps(), (32, 40))
    box = box_convert(found.query_anchors[0, 3], "cxcywh", "xyxy").detach() + 1
    for boxes in ([box[None], box.new_zeros(0, 4)], [box.new_zeros(0, 4)] * 2):
        targets = make_targets(boxes)
        assignment = detector.match(found, targets, {})
        losses = weighted(detector.losses(found, targets, assignment, detector.normalizers(targets, assignment)))
        assert set(losses) == {"loss_selection", "loss_class", "loss_box"}
        assert (losses["loss_box"] > 0) == (len(assignment.query) > 0) == (len(boxes[0]) > 0)
        grads = torch.autograd.grad(
            sum(losses.values()), list(detector.parameters()), retain_graph=True, allow_unused=True
        )
        unused = [name for (name, _), grad in zip(detector.named_parameters(), grads) if grad is None]
        assert not unused
        assert all(grad.isfinite().all() for grad in grads)


def test_no_second_loss_where_the_first_is_right():
    """Confident and right: the losses vanish."""
    detector = make_detector(2)
    found = detector.decode(make_maps(1), (32, 40))
    box = box_convert(found.query_anchors[0, 3], "cxcywh", "xyxy").detach()
    targets = make_targets([box[None]], label=4)
    query = detector.match(found, targets, {}).query
    logits = torch.full_like(found.logits, -30)
    logits[..., -1] = 30
    logits[0, 0, query, -1], logits[0, 0, query, 4] = -30, 30
    boxes = found.boxes.detach().clone()
    boxes[0, query] = box
    selection = torch.full_like(found.selection_logits, -30)
    selection[0, rank_anchors(found.anchors, box[None])[:5, 0]] = 30
    perfect = replace(found, selection_logits=selection, logits=logits, deltas=torch.zeros_like(boxes), boxes=boxes)
    assignment = detector.match(perfect, targets, {})
    losses = detector.losses(perfect, targets, assignment, detector.normalizers(targets, assignment))
    assert len(query) > 0 and len(losses) == 3
    assert all(term.value.item() == pytest.approx(0, abs=1e-6) for term in losses)


def test_errors():
    with pytest.raises(ValueError, match="versions 1 and 2, not 3"):
        FQDet(in_features=(), neck=nn.Identity(), criterion=FQDetCriterion(1), version=3)
    with pytest.raises(ValueError, match="versions 1 and 2, not 0"):
        FQDetCriterion(0)
    with pytest.raises(ValueError, match=r"built for the levels \(3, 4\), got 1 maps"):
        make_detector(1).decode(make_maps()[:1], (32, 40))
    with pytest.raises(ValueError, match="an image of 32 x 40 has 234 anchors, fewer than the 300 queries"):
        make_detector(1, num_queries=300).decode(make_maps(), (32, 40))
