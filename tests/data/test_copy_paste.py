"""Rotation by right angles, jitter of colours, flips both ways, and pasting of instances."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances

from querymask import get_cfg
from querymask.common.data.augmentation import QuarterTurns, RandomQuarterTurns, build_augmentations, color_jitter
from querymask.common.data.copy_paste import CopyPasteMapper, copy_paste


@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_keep_objects_where_their_pixels_are(turns: int) -> None:
    image = np.random.default_rng(turns).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    turn = QuarterTurns(turns, 5, 9)
    turned = turn.apply_image(image)
    np.testing.assert_array_equal(turned, np.rot90(image, turns))
    mask = np.ascontiguousarray(image[:, :, 0])
    for part in (mask, mask[::-1], np.asfortranarray(mask), mask > 99):
        np.testing.assert_array_equal(turn.apply_segmentation(part), np.rot90(part, turns))
    for x in range(9):
        for y in range(5):
            x0, y0, x1, y1 = turn.apply_box(np.array([[x, y, x + 1, y + 1.0]]))[0].astype(int)
            assert (x1 - x0, y1 - y0) == (1, 1)
            np.testing.assert_array_equal(turned[y0, x0], image[y, x])
    np.testing.assert_array_equal(turn.inverse().apply_image(turned), image)
    points = np.random.default_rng(0).random((7, 2)) * [9, 5]
    np.testing.assert_allclose(turn.inverse().apply_coords(turn.apply_coords(points)), points)


def test_all_turns_come() -> None:
    np.random.seed(0)
    assert {RandomQuarterTurns().get_transform(np.zeros((4, 6, 3))).turns for _ in range(50)} == {0, 1, 2, 3}


def test_keys_of_flips_turns_and_colours() -> None:
    cfg = get_cfg()
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.ROTATE_90, cfg.INPUT.COLOR_JITTER = "both", True, 0.4
    kinds = [type(augmentation) for augmentation in build_augmentations(cfg, is_train=True)]
    assert kinds[:3] == [T.RandomFlip, T.RandomFlip, RandomQuarterTurns]
    assert kinds[3:6] == [T.RandomBrightness, T.RandomContrast, T.RandomSaturation]
    assert len(build_augmentations(cfg, is_train=False)) == 1
    image = np.full((20, 30, 3), 100, np.uint8)
    image[:, :, 0] = np.arange(30)
    shapes, values = set(), set()
    np.random.seed(1)
    for _ in range(40):
        shown = T.AugInput(image)
        T.AugmentationList(build_augmentations(cfg, is_train=True)[:6])(shown)
        shapes.add(shown.image.shape)
        values.add(int(shown.image.max()))
    assert shapes == {(20, 30, 3), (30, 20, 3)} and len(values) > 10
    for strength in (-0.1, 1.0):
        with pytest.raises(ValueError, match="INPUT.COLOR_JITTER"):
            color_jitter(strength)
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError, match="'both' or 'none', not 'diagonal'"):
        build_augmentations(cfg, is_train=True)


def item(value: int, size: tuple[int, int], rectangles: list[tuple[int, int, int, int]]) -> dict:
    """An output of the mapper: an even image with rectangles x0, y0, x1, y1, of classes 0, 1, ..."""
    masks = torch.zeros((len(rectangles), *size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles):
        mask[y0:y1, x0:x1] = True
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(rectangles, dtype=torch.float32).view(-1, 4))
    instances.gt_classes = torch.arange(len(rectangles))
    instances.gt_masks = BitMasks(masks)
    return {"image": torch.full((3, *size), value, dtype=torch.uint8), "instances": instances, "height": 1}


@pytest.fixture
def paste_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "rand", lambda *shape: np.zeros(shape) if shape else 0.0)


@pytest.mark.usefixtures("paste_all")
def test_pasting_covers_what_lies_below() -> None:
    below = item(10, (20, 30), [(0, 0, 10, 10), (20, 10, 30, 20), (4, 4, 6, 6)])
    before = below["image"].clone()
    result = copy_paste(below, item(99, (20, 30), [(5, 0, 15, 10)]))
    image, instances = result["image"], result["instances"]
    assert torch.equal(below["image"], before) and len(below["instances"]) == 3
    assert (image[:, 0:10, 5:15] == 99).all() and (image == 99).sum() == 3 * 100
    # The first is cut in half, the second untouched, the third keeps its uncovered column
    assert instances.gt_classes.tolist() == [0, 1, 2, 0]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 5, 10], [20, 10, 30, 20], [4, 4, 5, 6], [5, 0, 15, 10]]
    masks = instances.gt_masks.tensor
    assert [int(mask.sum()) for mask in masks] == [50, 100, 2, 100]
    assert not (masks[:3] & masks[3]).any()
    # Nearly covered objects go
    assert copy_paste(below, item(99, (20, 30), [(4, 4, 6, 6)]))["instances"].gt_classes.tolist() == [0, 1, 0]


@pytest.mark.usefixtures("paste_all")
@pytest.mark.parametrize("size", [(10, 50), (40, 12), (20, 30)])
def test_sources_of_another_size_are_cut(size: tuple[int, int]) -> None:
    source = item(99, size, [(8, 6, size[1], size[0])])
    result = copy_paste(item(10, (20, 30), []), source)
    rows, columns = min(20, size[0]), min(30, size[1])
    assert result["instances"].gt_boxes.tensor.tolist() == [[8, 6, columns, rows]]
    assert torch.equal(result["image"][0] == 99, result["instances"].gt_masks.tensor[0])
    unseen = item(99, (60, 60), [(30, 0, 60, 60)])
    assert len(copy_paste(item(10, (20, 30), []), unseen)["instances"]) == 0


class Mapper:
    """Gives an item by its number; those below 0 are skipped."""

    use_masks = True
    max_instances = 0

    def __call__(self, number: int) -> dict | None:
        return item(number, (20, 30), [(number, 0, number + 2, 2)] * (number % 4)) if number >= 0 else None


def test_mapper_pastes_as_often_as_asked() -> None:
    np.random.seed(0)
    changed = {}
    for probability in (0.0, 0.5, 1.0):
        mapper = CopyPasteMapper(Mapper(), [3, 7], probability)
        changed[probability] = sum(len(mapper(8)["instances"]) > 0 for _ in range(200))
    assert changed[0.0] == 0
    assert 60 < changed[0.5] < 115  # 7/8 of a half
    assert 155 < changed[1.0] < 195
    assert CopyPasteMapper(Mapper(), [3], 1.0)(-1) is None
    assert len(CopyPasteMapper(Mapper(), [-1], 1.0)(7)["instances"]) == 3
    limited = Mapper()
    limited.max_instances = 4
    assert max(len(CopyPasteMapper(limited, [15], 1.0)(7)["instances"]) for _ in range(20)) == 4


@pytest.mark.parametrize("make", [lambda m: CopyPasteMapper(m, [], 1.5), lambda m: CopyPasteMapper(m, [], -1)])
def test_wrong_probability(make: Callable) -> None:
    with pytest.raises(ValueError, match="INPUT.COPY_PASTE is a probability"):
        make(Mapper())


def test_pasting_needs_masks() -> None:
    mapper = Mapper()
    mapper.use_masks = False
    with pytest.raises(ValueError, match="needs masks"):
        CopyPasteMapper(mapper, [], 0.5)
