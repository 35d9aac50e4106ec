from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import load_document
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, NoOpTransform
from PIL import Image

from querymask import get_cfg
from querymask.common.data.augmentation import (
    RESIZE_RULES,
    CropOrPad,
    RandomCropOfRange,
    Resize,
    ResizeShortestSide,
    ResizeToScale,
    build_augmentations,
    resized_size,
)

RESIZE_EXAMPLES = load_document("solq")["resize_examples"]["rows"]


@pytest.mark.parametrize("row", RESIZE_EXAMPLES, ids=lambda row: "-".join(map(str, row)))
def test_sizes_of_the_release(row):
    width, height, shorter, longest, *expected = row
    assert list(resized_size(width, height, shorter, longest)) == expected
    transform = ResizeShortestSide([shorter], longest).get_transform(np.zeros((height, width, 3), np.uint8))
    if (width, height) == tuple(expected):
        assert isinstance(transform, NoOpTransform)
    else:
        assert [transform.new_w, transform.new_h] == expected


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_extreme_shapes_keep_a_pixel(rule):
    for width, height in ((3000, 1), (1, 4000)):
        size = resized_size(width, height, 600, 1333, rule)
        assert min(size) == 1
        # Of DETR's rule, the longer side is beyond its limit then
        assert max(size) == (max(width, height) if rule == "detr" else 1333)


def random_sizes():
    """(width, height, shorter, longest) as of photographs."""
    rng = np.random.default_rng(0)
    sides = rng.integers(200, 900, (2000, 2)).tolist()
    return [(*side, int(rng.choice([480, 608, 800])), int(rng.choice([1000, 1333]))) for side in sides]


def test_sizes_of_detectron2():
    for width, height, shorter, longest in random_sizes():
        image = np.zeros((height, width, 1), np.uint8)
        # Both of 0.5 and of main say a size, or that nothing is to be done
        transform = T.ResizeShortestEdge(shorter, longest, "choice").get_transform(image)
        expected = (width, height) if isinstance(transform, NoOpTransform) else (transform.new_w, transform.new_h)
        assert resized_size(width, height, shorter, longest, "detectron2") == expected


@pytest.mark.parametrize(("rule", "part"), [("mmdetection", Fraction(1, 2)), ("effseg", Fraction(0))])
def test_sizes_by_exact_fractions(rule, part):
    """Nearest integers, or integer parts, of one exact scale."""
    limited = 0
    for width, height, shorter, longest in random_sizes():
        scale = min(Fraction(shorter, min(width, height)), Fraction(longest, max(width, height)))
        exact = [side * scale + part for side in (width, height)]
        if rule == "mmdetection" and any(side.denominator == 1 for side in exact):
            continue  # a half, whose rounding is that of the scale in floating point
        assert resized_size(width, height, shorter, longest, rule) == tuple(map(int, exact))
        limited += scale * max(width, height) == longest
    assert limited > 100


def test_resize_without_antialiasing():
    """Of each shrunken cell, the four pixels around its centre count."""
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    result = ResizeShortestSide([16], rule="mmdetection").get_transform(image).apply_image(image)
    expected = sum(image[1 + i :: 4, 1 + j :: 4].astype(float) for i in (0, 1) for j in (0, 1)) / 4
    np.testing.assert_allclose(result, expected, atol=0.75)
    gray = ResizeShortestSide([16], rule="mmdetection").get_transform(image).apply_image(image[:, :, :1])
    np.testing.assert_array_equal(gray, result[:, :, :1])


def test_rule_that_is_not_known():
    with pytest.raises(ValueError, match=r"RESIZE_RULE must be one of detr, detectron2, mmdetection, effseg, not 'no'"):
        ResizeShortestSide([16], rule="no")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ("solq/configs/solq_r50.yaml", "detr"),
        ("isda/configs/isda_r50.yaml", "mmdetection"),
        ("istr/configs/istr_v2_smt_swin_l_1088.yaml", "detectron2"),
        ("effseg/configs/effseg_r50.yaml", "effseg"),
    ],
)
@pytest.mark.parametrize("is_train", [False, True])
def test_configs_follow_their_release(config, rule, is_train):
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(__file__).parents[2] / "projects" / config))
    cfg.INPUT.LSJ.ENABLED = False
    found = build_augmentations(cfg, is_train)
    resizes = [augmentation for augmentation in found if isinstance(augmentation, ResizeShortestSide)]
    assert resizes
    assert all(augmentation.rule == rule for augmentation in resizes)


def test_resize_is_antialiased_pil_bilinear():
    image = np.random.default_rng(0).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    result = ResizeShortestSide([20]).get_transform(image).apply_image(image)
    expected = np.asarray(Image.fromarray(image).resize((20, int(20 * 90 / 61)), Image.BILINEAR))
    np.testing.assert_array_equal(result, expected)


def test_sampling_of_sizes():
    image = np.zeros((50, 100, 3), np.uint8)
    np.random.seed(0)
    choice, interval = ResizeShortestSide([10, 14, 20]), ResizeShortestSide([10, 13], sampling="range")
    assert {choice.get_transform(image).new_h for _ in range(60)} == {10, 14, 20}
    assert {interval.get_transform(image).new_h for _ in range(60)} == {10, 11, 12, 13}
    assert isinstance(ResizeShortestSide([0]).get_transform(image), NoOpTransform)
    with pytest.raises(ValueError, match="'choice' or 'range'"):
        ResizeShortestSide([10], sampling="all")
    with pytest.raises(ValueError, match="does not go with"):
        ResizeShortestSide([10, 11, 12], sampling="range")


def test_crop_has_every_size_and_position_of_its_range():
    image = np.zeros((6, 4, 3), np.uint8)  # the width is below the greatest crop, the height is not
    np.random.seed(0)
    crops = [RandomCropOfRange(3, 5).get_transform(image) for _ in range(500)]
    assert {crop.w for crop in crops} == {3, 4}
    assert {crop.h for crop in crops} == {3, 4, 5}
    assert {(crop.h, crop.y0) for crop in crops} == {(h, y) for h in (3, 4, 5) for y in range(6 - h + 1)}
    assert {(crop.w, crop.x0) for crop in crops} == {(w, x) for w in (3, 4) for x in range(4 - w + 1)}
    tiny = RandomCropOfRange(3, 5).get_transform(np.zeros((2, 9, 3), np.uint8))
    assert tiny.h == 2 and tiny.y0 == 0
    with pytest.raises(ValueError, match="0 < least <= greatest"):
        RandomCropOfRange(5, 3)


def train_cfg(**detr_crop):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (480, 512, 544)
    cfg.INPUT.MAX_SIZE_TRAIN = 800
    for key, value in detr_crop.items():
        cfg.INPUT.DETR_CROP[key] = value
    return cfg


def steps(cfg, image):
    """The geometric steps that an image goes through, without flips and steps that do nothing."""
    transforms = T.AugmentationList(build_augmentations(cfg, is_train=True))(T.AugInput(image))
    kept = (T.ResizeTransform, CropTransform)
    return [t for t in transforms.transforms if isinstance(t, kept)]


@pytest.mark.parametrize("resize_first", [False, True])
def test_branches_of_the_recipe(resize_first):
    image = np.zeros((301, 399, 3), np.uint8)
    plain = train_cfg(ENABLED=True, PROBABILITY=0.0, RESIZE_FIRST=resize_first)
    cropped = train_cfg(ENABLED=True, PROBABILITY=1.0, RESIZE_FIRST=resize_first)
    np.random.seed(0)
    for _ in range(10):
        sequence = steps(plain, image)
        assert all(isinstance(t, T.ResizeTransform) for t in sequence)
        # With RESIZE_FIRST the second resize does nothing when it draws the same size again
        assert len(sequence) in ((1, 2) if resize_first else (1,))
        assert {min(t.new_h, t.new_w) for t in sequence} <= {480, 512, 544}

        *first, before, crop, last = steps(cropped, image)
        assert len(first) == int(resize_first)
        assert min(before.new_h, before.new_w) in (400, 500, 600)
        assert isinstance(crop, CropTransform)
        assert 384 <= crop.w <= min(600, before.new_w) and 384 <= crop.h <= min(600, before.new_h)
        assert min(last.new_h, last.new_w) in (480, 512, 544) or max(last.new_h, last.new_w) <= 800


def test_crop_of_a_part_of_the_image():
    """ISTR's: 0.7 of height and of width, anywhere."""
    image = np.zeros((300, 400, 3), np.uint8)
    np.random.seed(0)
    cfg = train_cfg(ENABLED=True, PROBABILITY=1.0, RELATIVE_SIZE=[0.7, 0.5])
    corners = set()
    for _ in range(20):
        before, crop, last = steps(cfg, image)
        assert (crop.h, crop.w) == (int(before.new_h * 0.7 + 0.5), int(before.new_w * 0.5 + 0.5))
        corners.add((crop.x0 / before.new_w, crop.y0 / before.new_h))
    assert len(corners) > 15 and max(corners)[0] > 0.3 and max(y for _, y in corners) > 0.2
    with pytest.raises(ValueError, match=r"RELATIVE_SIZE is \[0\.7\]: give parts of height and width"):
        build_augmentations(train_cfg(ENABLED=True, RELATIVE_SIZE=[0.7]), is_train=True)


def test_the_branch_with_the_crop_has_no_limit_on_the_longer_side():
    image = np.zeros((30, 150, 3), np.uint8)
    np.random.seed(0)
    before, crop, last = steps(train_cfg(ENABLED=True, PROBABILITY=1.0), image)
    assert before.new_w == 5 * before.new_h >= 2000
    assert max(last.new_h, last.new_w) <= 800


def test_share_of_the_branch_with_the_crop():
    image = np.zeros((40, 40, 3), np.uint8)
    cfg = train_cfg(ENABLED=True, MIN_SIZES=[50], CROP_RANGE=[30, 40])
    cfg.INPUT.MIN_SIZE_TRAIN = (45,)
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
    kinds = [[type(t) for t in augmentations(T.AugInput(image)).transforms] for _ in range(400)]
    assert 0.42 < np.mean([CropTransform in kind for kind in kinds]) < 0.58
    assert 0.42 < np.mean([T.HFlipTransform in kind for kind in kinds]) < 0.58


def test_test_time_only_resizes():
    cfg = train_cfg(ENABLED=True)
    (resize,) = build_augmentations(cfg, is_train=False)
    transform = resize.get_transform(np.zeros((480, 640, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (800, 1066)


def test_keys_without_effect_are_refused():
    cfg = train_cfg()
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(ValueError, match="DETR_CROP"):
        build_augmentations(cfg, is_train=True)
    cfg = train_cfg()
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError, match="RANDOM_FLIP"):
        build_augmentations(cfg, is_train=True)


@pytest.mark.parametrize("flip, kinds", [("none", set()), ("vertical", {T.VFlipTransform})])
def test_other_flips(flip, kinds):
    cfg = train_cfg()
    cfg.INPUT.RANDOM_FLIP = flip
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
    seen = {type(t) for _ in range(20) for t in augmentations(T.AugInput(np.zeros((480, 480, 3), np.uint8))).transforms}
    assert seen & {T.HFlipTransform, T.VFlipTransform} == kinds


@pytest.mark.parametrize("old, new", [((37, 53), (90, 129)), ((480, 640), (600, 800)), ((90, 129), (37, 53))])
def test_masks_are_resized_as_the_release_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 2, old).astype(np.uint8)
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=new)[0, 0].numpy()
    assert np.array_equal(Resize(*old, *new).apply_segmentation(mask), expected)


@pytest.mark.parametrize("rule", ["nearest", "linear"])
@pytest.mark.parametrize("old, new", [((64, 80), (112, 140)), ((64, 80), (96, 120)), ((128, 160), (40, 50))])
def test_masks_lie_where_the_image_does(old: tuple[int, int], new: tuple[int, int], rule: str) -> None:
    """The centre and area of discs, of masks and as Pillow resizes their pictures."""
    rows, columns = np.mgrid[: old[0], : old[1]]
    found = []
    for seed in range(20):
        y, x = np.random.default_rng(seed).uniform(0.4, 0.6, 2) * old
        disc = (np.hypot(rows - y, columns - x) < 0.3 * min(old)).astype(np.uint8)
        resize = Resize(*old, *new, Image.BILINEAR, rule)
        picture, mask = resize.apply_image(255 * disc).astype(float), resize.apply_segmentation(disc)
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        assert abs(mask.sum() - picture.sum() / 255) < 0.03 * mask.sum()
        positions = np.mgrid[: new[0], : new[1]]
        found.append([(positions * part).sum((1, 2)) / part.sum() for part in (mask, picture)])
    mask, picture = np.mean(found, 0)
    if rule == "linear":
        assert np.allclose(mask, picture, atol=0.02)
    else:  # the corner of a cell instead of its centre, at the centre of the pixel that it lies in
        size = old[0] / new[0]
        corners = np.arange(new[0]) * size
        assert np.allclose(mask - picture, (size / 2 + (corners - np.floor(corners)).mean() - 0.5) / size, atol=0.03)


def test_resize_of_masks_comes_from_the_config() -> None:
    cfg = train_cfg()
    for jitter in (False, True):
        cfg.INPUT.LSJ.ENABLED, cfg.INPUT.DETR_CROP.ENABLED = jitter, not jitter
        cfg.INPUT.MASK_RESIZE_RULE = "cubic"
        with pytest.raises(ValueError, match=r"INPUT\.MASK_RESIZE_RULE must be one of nearest, linear, not 'cubic'"):
            build_augmentations(cfg, is_train=True)
        cfg.INPUT.MASK_RESIZE_RULE = "linear"
        augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
        seen = augmentations(T.AugInput(np.zeros((640, 470, 3), np.uint8))).transforms
        assert {t.masks for t in seen if isinstance(t, Resize)} == {"linear"}


def test_every_resize_of_training_images_is_the_releases() -> None:
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(train_cfg(), is_train=True))
    image = np.zeros((640, 470, 3), np.uint8)
    seen = {type(t) for _ in range(20) for t in augmentations(T.AugInput(image)).transforms}
    assert {t for t in seen if issubclass(t, T.ResizeTransform)} == {Resize}


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (64, 64), (200, 90)])
def test_large_scale_jitter_is_detectron2s(size: tuple[int, int]) -> None:
    """Same draws, same image and boxes as ResizeScale and FixedSizeCrop, for scales that pad and scales that crop."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    box = np.array([[3.0, 4.0, 20.0, 25.0]])
    ours = T.AugmentationList([ResizeToScale(64, 0.1, 2.0), CropOrPad(64, 128.0)])
    theirs = T.AugmentationList([T.ResizeScale(0.1, 2.0, 64, 64), T.FixedSizeCrop((64, 64), pad_value=128.0)])
    kinds = set()
    for seed in range(12):
        results = []
        for augmentations in (ours, theirs):
            np.random.seed(seed)
            inputs = T.AugInput(image)
            transforms = augmentations(inputs)
            results.append((inputs.image, transforms.apply_box(box)))
        assert results[0][0].shape == (64, 64, 3)
        assert np.array_equal(results[0][0], results[1][0])
        assert np.allclose(results[0][1], results[1][1])
        kinds.add(bool((results[0][0][-1] == 128).all() or (results[0][0][:, -1] == 128).all()))
    narrow = max(size) >= 2 * min(size)  # padded even at scale 2
    assert kinds == ({True} if narrow else {True, False})


def test_padding_of_the_jitter_belongs_to_no_mask() -> None:
    transform = CropOrPad(8, 128.0).get_transform(np.zeros((5, 20, 3), np.uint8))
    assert (transform.apply_image(np.zeros((5, 20, 3), np.uint8))[5:] == 128).all()
    mask = transform.apply_segmentation(np.ones((5, 20), np.uint8))
    assert mask.shape == (8, 8) and mask[:5].all() and not mask[5:].any()


def test_jitter_of_the_config() -> None:
    cfg = get_cfg()
    cfg.INPUT.LSJ.ENABLED = True
    cfg.INPUT.LSJ.SIZE = 96
    image = np.zeros((40, 60, 3), np.uint8)
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
    widths = []
    for _ in range(30):
        inputs = T.AugInput(image)
        transforms = augmentations(inputs)
        assert inputs.image.shape == (96, 96, 3)
        widths += [t.new_w for t in transforms.transforms if isinstance(t, T.ResizeTransform)]
    assert 9 <= min(widths) < 40 and 150 < max(widths) <= 192
    (resize,) = build_augmentations(cfg, is_train=False)
    assert isinstance(resize, ResizeShortestSide)


@pytest.mark.parametrize(
    "keys, message",
    [
        (["INPUT.DETR_CROP.ENABLED", True], "LSJ.ENABLED and INPUT.DETR_CROP.ENABLED exclude each other"),
        (["INPUT.LSJ.SCALE", [1.0]], r"LSJ.SCALE is \[1.0\]: give the least and the greatest"),
        (["INPUT.LSJ.SCALE", [2.0, 0.1]], "0 < least <= greatest"),
        (["INPUT.LSJ.SIZE", 0], "LSJ.SIZE of at least 1"),
    ],
)
def test_jitter_that_makes_no_sense(keys: list, message: str) -> None:
    cfg = get_cfg()
    cfg.INPUT.LSJ.ENABLED = True
    cfg.merge_from_list(keys)
    with pytest.raises(ValueError, match=message):
        build_augmentations(cfg, is_train=True)
