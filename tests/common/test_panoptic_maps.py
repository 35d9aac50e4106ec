"""The merge of queries to a panoptic map against loops over pixels; what Python code and files get of it."""

import dataclasses
import math
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from querymask.common import masks as masks_module
from querymask.common import panoptic
from querymask.common.detections import PanopticDetections
from querymask.common.masks import paste_probabilities, pasted_bands
from querymask.common.ops.exporting import exporting
from querymask.common.panoptic import VOID, PanopticRule, Segments, merge, panoptic_output, segment_ids

RULE = PanopticRule(num_things=2, score=0.3, mask=0.5, nms=0.6, pixel=0.35, agreement=0.4, area=7)


def slow_iou(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else math.nan


def slow_merge(
    labels: list[int], scores: list[float], masks: np.ndarray, rule: PanopticRule
) -> tuple[np.ndarray, list[int], list[float]]:
    """The steps, a pixel and a query at a time."""
    height, width = masks.shape[1:]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    own = [{place for place in pixels if mask[place] > rule.mask} for mask in masks]
    left = [i for i in range(len(scores)) if scores[i] > rule.score]
    unlike = [all(slow_iou(own[i], own[j]) < rule.nms for j in left if j < i) for i in left]
    left = [i for i, stays in zip(left, unlike, strict=True) if stays and own[i]]
    got: dict[int, set] = {i: set() for i in left}
    for place in pixels:
        winner = None
        for i in left:
            if winner is None or scores[i] * masks[i][place] > scores[winner] * masks[winner][place]:
                winner = i
        if winner is not None and masks[winner][place] > rule.pixel:
            got[winner].add(place)
    left = [i for i in left if slow_iou(own[i], got[i]) > rule.agreement and len(got[i]) > rule.area]
    groups = [[i] for i in left if labels[i] < rule.num_things]
    groups += [[i for i in left if labels[i] == k] for k in sorted({labels[i] for i in left}) if k >= rule.num_things]
    numbers = np.full((height, width), VOID)
    for number, members in enumerate(groups):
        for place in set().union(*(got[i] for i in members)):
            numbers[place] = number
    means = [sum(scores[i] for i in members) / len(members) for members in groups]
    return numbers, [labels[members[0]] for members in groups], means


def blobs(count: int, seed: int, canvas: tuple[int, int] = (9, 11)) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, descending scores and masks; some are empty, copies of others, or no better than them."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in canvas), indexing="ij")
    centres = torch.rand(count, 2, 1, 1, generator=generator, dtype=torch.float64) * 10
    sides = 1 + 5 * torch.rand(count, 2, 1, 1, generator=generator, dtype=torch.float64)
    distance = ((y - centres[:, 0]) / sides[:, 0]) ** 2 + ((x - centres[:, 1]) / sides[:, 1]) ** 2
    masks = (2 * (1 - distance)).sigmoid()
    masks[torch.rand(count, generator=generator) < 0.15] *= 0.4
    for i in range(1, count):
        if torch.rand((), generator=generator) < 0.2:
            masks[i] = masks[i - 1]
    scores = torch.randint(4, 20, (count,), generator=generator).sort(descending=True).values.double() / 20
    return torch.randint(4, (count,), generator=generator), scores, masks


def bands_of(masks: Tensor) -> masks_module.Bands:
    return lambda numbers, top, bottom: masks[numbers, top:bottom]


@given(count=st.integers(0, 12), seed=st.integers(0, 10**6), pixels=st.sampled_from([1, 150, 10**6]))
def test_merge(count: int, seed: int, pixels: int) -> None:
    """Whatever the size of the bands."""
    labels, scores, masks = blobs(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panoptic, "PIXELS_AT_ONCE", pixels)
        segments = merge(labels, scores, bands_of(masks), masks.shape[1:], RULE)
    numbers, expected_labels, expected_scores = slow_merge(labels.tolist(), scores.tolist(), masks.numpy(), RULE)
    assert np.array_equal(segments.numbers.numpy(), numbers)
    assert segments.labels == expected_labels and segments.scores == pytest.approx(expected_scores)


@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    missing=st.integers(0, 3),
    rule=st.builds(
        PanopticRule,
        num_things=st.integers(0, 4),
        score=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        mask=st.sampled_from([0.0, 0.5]),
        nms=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        pixel=st.sampled_from([0.0, 0.35, 0.6]),
        agreement=st.sampled_from([0.0, 0.4, 0.8]),
        area=st.sampled_from([0, 7, 30]),
    ),
)
@example(count=9, seed=7, missing=2, rule=RULE)
def test_merge_in_the_form_for_export(count: int, seed: int, missing: int, rule: PanopticRule) -> None:
    """With any thresholds, and rows that fill the number up."""
    labels, scores, masks = blobs(count, seed)
    expected = merge(labels, scores, bands_of(masks), masks.shape[1:], rule)
    labels, scores = (torch.cat((x, x.new_full((missing,), -1))) for x in (labels, scores))
    masks = torch.cat((masks, torch.ones(missing, *masks.shape[1:])))
    with exporting():
        segments = merge(labels, scores, bands_of(masks), masks.shape[1:], rule)
    number = len(expected.labels)
    assert torch.equal(segments.numbers, expected.numbers)
    assert segments.labels[:number].tolist() == expected.labels
    assert segments.scores[:number].tolist() == pytest.approx(expected.scores)
    assert len(segments.scores) == count + missing and (segments.scores[number:] == -1).all()


@given(
    old=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    new=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_map_of_another_size_in_the_form_for_export(old: tuple[int, int], new: tuple[int, int]) -> None:
    """The same pixels, also where rounding decides."""
    numbers = torch.arange(old[0] * old[1]).view(old)
    expected = segment_ids(Segments(numbers, [], []), old, new)
    with exporting():
        assert torch.equal(segment_ids(Segments(numbers, [], []), old, new), expected)


def test_blobs_reach_every_step() -> None:
    """What the property is tried on: without any of the steps, there are other maps; stuff is united."""
    off = {"score": 0.0, "nms": 1.0, "pixel": 0.0, "agreement": 0.0, "area": 0, "num_things": 4}
    changes = dict.fromkeys(off, 0)
    for seed in range(40):
        labels, scores, masks = blobs(10, seed)
        whole = merge(labels, scores, bands_of(masks), masks.shape[1:], RULE)
        for name, value in off.items():
            rule = dataclasses.replace(RULE, **{name: value})
            other = merge(labels, scores, bands_of(masks), masks.shape[1:], rule)
            changes[name] += not torch.equal(other.numbers, whole.numbers)
    assert all(count > 2 for count in changes.values()), changes


def test_no_segment_is_a_void_map() -> None:
    """Where no query is likely enough, and where there is none."""
    labels, scores, masks = blobs(5, 0)
    for count in (5, 0):
        chosen = slice(count)
        segments = merge(labels[chosen], 0.1 * scores[chosen], bands_of(masks), (9, 11), RULE)
        ids, found = panoptic_output(segments, (9, 10), (18, 20), 2)
        assert found == [] and ids.shape == (18, 20) and ids.dtype == torch.int32 and not ids.any()


@pytest.mark.parametrize("sizes", [((7, 10), (13, 25)), ((8, 9), (5, 4)), ((9, 11), (9, 11))])
def test_output(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Padding is cut off; a pixel is that at floor(i * in / out); a segment without a pixel is left out."""
    (height, width), (new_height, new_width) = sizes
    numbers = torch.randint(-1, 5, (9, 11), generator=torch.Generator().manual_seed(3))
    numbers[numbers == 2] = 3
    numbers[8, 10] = numbers[0, 1] = 2  # there, or lost with the padding or the size
    segments = Segments(numbers, [0, 1, 1, 2, 4], [0.9, 0.8, 0.7, 0.6, 0.5])
    ids, found = panoptic_output(segments, *sizes, 2)
    for y in range(new_height):
        for x in range(new_width):
            assert ids[y, x] == 1 + numbers[y * height // new_height, x * width // new_width]
    seen = sorted(set(ids.unique().tolist()) - {0})
    assert found == [
        {"id": n, "category_id": segments.labels[n - 1], "isthing": n <= 3, "score": segments.scores[n - 1]}
        for n in seen
    ]


@pytest.mark.parametrize("windows", [True, False])
def test_bands_of_pasted_masks(monkeypatch: pytest.MonkeyPatch, windows: bool) -> None:
    """As the whole canvas at once, of boxes anywhere; by windows, as on a CPU, and without, as on a GPU."""
    monkeypatch.setattr(masks_module, "uses_windows", lambda device: windows)
    maps = torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[1.5, 2, 9, 7], [-4, -3, 30, 20], [20, 1, 25, 4], [5, 4, 5, 8], [3, math.nan, 6, 9]])
    whole = paste_probabilities(maps, boxes, (0, 10), (0, 14))
    band = pasted_bands(maps, boxes, 14)
    everything = torch.arange(5)
    torch.testing.assert_close(torch.cat([band(everything, y, min(y + 3, 10)) for y in range(0, 10, 3)], 1), whole)
    torch.testing.assert_close(band(torch.tensor([3, 1]), 4, 9), whole[[3, 1], 4:9])
    assert whole[:2].flatten(1).any(1).all() and not whole[2:].any()


# ---- What Python code gets ----------------------------------------------------------------------------------------


def output_of_model() -> tuple[Tensor, list[dict[str, Any]]]:
    """A thing of score 0.6, one of 0.9, stuff of 0.8, and void."""
    ids = torch.tensor([[1, 1, 0, 3], [2, 2, 3, 3]], dtype=torch.int32)
    return ids, [
        {"id": 1, "category_id": 1, "isthing": True, "score": 0.6},
        {"id": 2, "category_id": 0, "isthing": True, "score": 0.9},
        {"id": 3, "category_id": 2, "isthing": False, "score": 0.8},
    ]


def test_detections() -> None:
    """The highest score first, as of instances; those below a score are void."""
    found = PanopticDetections.from_output(output_of_model(), ["ant", "bee"])
    assert found.ids.tolist() == [[3, 3, 0, 2], [1, 1, 2, 2]] and found.size == (2, 4)
    assert found.names == ["ant", "class 2", "bee"] and found.labels.tolist() == [0, 2, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.6]) and found.things.tolist() == [True, False, True]
    assert found.boxes is None and found.masks.dtype == bool
    for number, mask in enumerate(found.masks, start=1):
        assert np.array_equal(mask, found.ids == number)
    few = PanopticDetections.from_output(output_of_model(), [], 0.7)
    assert few.ids.tolist() == [[0, 0, 0, 2], [1, 1, 2, 2]] and len(few) == 2
    none = PanopticDetections.from_output(output_of_model(), [], 1.0)
    assert len(none) == 0 and none.masks.shape == (0, 2, 4) and not none.ids.any()
    assert len(none.to_instances()) == 0 and none.to_coco(1) == []


def test_detections_at_another_size() -> None:
    """Segments stay disjoint, in label images and as run lengths."""
    found = PanopticDetections.from_output(output_of_model(), [])
    labels = found.label_image((4, 8))
    assert labels.dtype == np.uint16 and np.array_equal(labels, found.ids.repeat(2, 0).repeat(2, 1))
    results = found.to_coco(7, [10, 20, 30], (4, 8))
    assert [result["category_id"] for result in results] == [10, 30, 20]
    masks = [mask_util.decode(result["segmentation"]) for result in results]
    for number, mask in enumerate(masks, start=1):
        assert np.array_equal(mask.astype(bool), labels == number)
