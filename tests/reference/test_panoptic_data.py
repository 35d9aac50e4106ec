"""Targets from panoptic annotations, and panoptic quality, against the official implementations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_close, load_arrays, load_cases, load_document
from detectron2.data import transforms as T
from PIL import Image

from querymask.common.data.annotations import clean_panoptic, number_classes, panoptic_entries
from querymask.common.data.augmentation import ResizeShortestSide
from querymask.common.data.mapper import InstanceMapper
from querymask.common.data.segment_maps import encode_segment_map
from querymask.common.evaluation.panoptic_quality import FN, FP, IOU, TP, compare_segments, quality

TARGETS = load_cases("panoptic", "panoptic targets")
QUALITY = load_cases("panoptic", "panoptic quality")
SETTINGS_OF_TARGETS = {"kind", "file", "seed", "original_size", "steps", "output_size", "arrays"}
SETTINGS_OF_QUALITY = {"kind", "file", "seed", "merge_case", "result", "arrays"}
GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}
METRICS = {"segm": False, "boundary": True}
NUM_THINGS = 80


def check(case: Mapping[str, Any], known: set[str]) -> None:
    """A setting without counterpart is an error."""
    assert not (unknown := set(case) - known), f"the case has settings that the project does not know: {unknown}"


def augmentation(step: list[Any]) -> T.Augmentation | T.Transform:
    """A step of a case."""
    name, *values = step
    if name == "hflip":
        return T.RandomFlip(1.0)
    if name == "resize":
        shorter, longest = values
        return ResizeShortestSide([shorter], longest, rule="effseg")
    if name == "crop":
        x0, y0, x1, y1 = values[0]
        return T.CropTransform(x0, y0, x1 - x0, y1 - y0)
    raise AssertionError(f"unknown step {name!r}")


@pytest.mark.parametrize("name", TARGETS)
def test_panoptic_targets(name: str, tmp_path: Path) -> None:
    """Through files in COCO's panoptic format, their reader, and the mapper."""
    case, arrays = TARGETS[name], load_arrays("panoptic", TARGETS[name])
    check(case, SETTINGS_OF_TARGETS)
    height, width = case["original_size"]
    categories = load_document("panoptic")["general"]["category_ids"]
    keys = ("id", "category_id", "iscrowd", "area")
    segments = [dict(zip(keys, map(int, row[:4]))) | {"bbox": row[4:].tolist()} for row in arrays["gt_segments"]]
    content = {
        "images": [{"id": 7, "file_name": "7.png", "height": height, "width": width}],
        "annotations": [{"image_id": 7, "file_name": "ids.png", "segments_info": segments}],
        "categories": [{"id": i, "name": str(i), "isthing": int(k < NUM_THINGS)} for k, i in enumerate(categories)],
    }
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "7.png")
    (tmp_path / "ids.png").write_bytes(encode_segment_map(arrays["gt_map"]))
    content = clean_panoptic(content, "case")
    (entry,) = panoptic_entries(content, "case", str(tmp_path), str(tmp_path), number_classes(content["categories"]))
    mapper = InstanceMapper(True, augmentations=[augmentation(step) for step in case["steps"]], num_classes=133)
    instances = mapper(entry)["instances"]
    assert list(instances.image_size) == case["output_size"]
    assert_close(instances.gt_classes, arrays["labels"], "labels", 0)
    assert_close(instances.gt_boxes.tensor, arrays["boxes"], "boxes")
    masks = instances.gt_masks.tensor.numpy()
    assert_close(np.packbits(masks, axis=-1), arrays["masks_packed"], "masks_packed", 0)
    assert_close(masks.sum((1, 2)), arrays["mask_area"], "mask_area", 0)
    known = {"gt_map", "gt_segments", "labels", "boxes", "masks_packed", "mask_area"}
    assert not (left := set(arrays) - known), f"the case has arrays that nothing is compared to: {left}"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", QUALITY)
def test_panoptic_quality(name: str, metric: str) -> None:
    case, arrays = QUALITY[name], load_arrays("panoptic", QUALITY[name])
    check(case, SETTINGS_OF_QUALITY)
    assert not (unknown := set(case["result"]) - set(METRICS)), f"unknown metrics: {unknown}"
    found = load_arrays("panoptic", load_cases("panoptic", "panoptic merge")[case["merge_case"]])
    categories = load_document("panoptic")["general"]["category_ids"]
    labels = {category: label for label, category in enumerate(categories)}
    total, images, used = np.zeros((133, 4)), 0, {"per_category"}
    while f"img{images}_gt_map" in arrays:
        prefix = f"img{images}_"
        truth = [
            {"id": int(key), "category_id": labels[int(category)], "iscrowd": int(crowd)}
            for key, category, crowd, _ in arrays[f"{prefix}gt_segments"]
        ]
        ids = found[f"{prefix}original_map"].astype(np.int32) + 1
        present = [{"id": k + 1, "category_id": int(c)} for k, c in enumerate(found[f"{prefix}labels"])]
        present = [segment for segment in present if (ids == segment["id"]).any()]
        total += compare_segments(arrays[f"{prefix}gt_map"], truth, ids, present, 133, METRICS[metric])
        used |= {f"{prefix}gt_map", f"{prefix}gt_segments"}
        images += 1
    assert not (left := set(arrays) - used), f"the case has arrays that nothing is compared to: {left}"
    scores = quality(total, list(map(str, categories)), NUM_THINGS)
    for group, expected in case["result"][metric].items():
        for key, value in expected.items():
            if key != "n":
                assert scores[key.upper() + GROUPS[group]] == pytest.approx(100 * value, abs=1e-12, rel=1e-12)
    chosen = {"All": slice(None), "Things": slice(NUM_THINGS), "Stuff": slice(NUM_THINGS, None)}
    for group, rows in chosen.items():
        assert (total[rows, : FN + 1].sum(1) > 0).sum() == case["result"][metric][group]["n"]
    if metric == "segm":
        rows = [[categories[k], total[k, TP], total[k, FP], total[k, FN], total[k, IOU]] for k in range(133)]
        expected = [row for row in rows if any(row[1:4])]
        assert_close(expected, arrays["per_category"], "per_category", 1e-12)


def test_settings_that_are_not_known() -> None:
    """They fail by name."""
    if not TARGETS or not QUALITY:
        pytest.skip("the folder has no cases of panoptic targets or quality")
    for cases, known in ((TARGETS, SETTINGS_OF_TARGETS), (QUALITY, SETTINGS_OF_QUALITY)):
        with pytest.raises(AssertionError, match="does not know: {'stride'}"):
            check(next(iter(cases.values())) | {"stride": 2}, known)
    with pytest.raises(AssertionError, match="unknown step 'vflip'"):
        augmentation(["vflip"])


def test_every_case_is_run() -> None:
    """There is a test for each kind, here or in test_panoptic_model.py."""
    kinds = {case["kind"] for case in load_cases("panoptic").values()}
    known = {"panoptic merge", "EffSeg head, panoptic", "panoptic targets", "panoptic quality"}
    assert not (unknown := kinds - known), f"cases of kinds that nothing runs: {unknown}"
