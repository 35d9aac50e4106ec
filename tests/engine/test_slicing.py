"""Images in slices: masks as run lengths, objects that borders cut, AP of a whole evaluation, what is refused."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from querymask.common.data.shape_drawing import draw_scene
from querymask.common.engine import Trainer
from querymask.common.evaluation import build_evaluator
from querymask.common.run_length_masks import RunLengthMasks
from querymask.common.slicing import SlicedModel, merge, place, resize, slice_boxes


@pytest.fixture
def sahi() -> None:
    pytest.importorskip("sahi")


def test_run_lengths_are_those_of_the_whole_image() -> None:
    """Wherever the part lies, with empty masks, full columns and masks at the borders of the image."""
    rng = np.random.default_rng(0)
    height, width = 23, 31
    for x, y, h, w in ((0, 0, 23, 31), (0, 5, 9, 31), (20, 0, 23, 11), (7, 13, 10, 4), (30, 22, 1, 1)):
        parts = torch.from_numpy(rng.random((5, h, w)) < np.array([0.0, 0.05, 0.5, 0.95, 1.0])[:, None, None])
        whole = np.zeros((5, height, width), bool)
        whole[:, y : y + h, x : x + w] = parts.numpy()
        masks = RunLengthMasks.place(parts, x, y, (height, width))
        assert np.array_equal([masks.decode(i) for i in range(5)], whole)
        for mask, (x0, y0, x1, y1) in zip(whole, masks.boxes().astype(int), strict=True):
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
            assert [x0, y0, x1, y1] == expected
    assert np.array_equal(masks[torch.tensor([False, True, True, False, False])].decode(1), masks.decode(2))
    assert np.array_equal(masks[torch.tensor([4, 1])].decode(0), masks.decode(4)) and len(masks[3:]) == 2
    assert len(masks[torch.zeros(0, dtype=torch.int64)]) == 0 and masks[:0].boxes().shape == (0, 4)


def test_reduced_masks() -> None:
    mask = np.zeros((40, 60), bool)
    mask[8:24, 12:36] = True
    mask[8:12, 12:16] = False
    thin = np.zeros((40, 60), bool)
    thin[37, 59] = True
    masks = RunLengthMasks.place(torch.from_numpy(np.stack([mask, thin, thin & False])), 0, 0, (40, 60))
    reduced = masks.resize(10, 15)
    assert np.array_equal(reduced.decode(0), mask.reshape(10, 4, 15, 4).mean(axis=(1, 3)) >= 0.5)
    assert reduced.decode(1).sum() == 1 and reduced.decode(1)[9, 14] and not reduced.decode(2).any()


def drawn_image(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (n, H, W) and classes of scenes side by side; parts of objects are hidden by others."""
    rng = np.random.default_rng(3)
    side = 256
    masks, classes = [], []
    for row in range(rows):
        for column in range(columns):
            for thing in draw_scene(rng)[1]:
                mask = np.zeros((rows * side, columns * side), bool)
                h, w = thing.mask.shape
                mask[row * side : row * side + h, column * side : column * side + w] = thing.mask
                if not thing.is_crowd:
                    masks.append(mask)
                    classes.append(thing.class_index)
    return np.array(masks), np.array(classes)


def extents(masks: np.ndarray) -> torch.Tensor:
    boxes = [cv2.boundingRect(mask.astype(np.uint8)) for mask in masks]
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)


def seen(masks: np.ndarray, classes: np.ndarray, box: tuple[int, ...], kind: str = "both") -> Instances:
    """What a perfect detector finds in a slice; scores are those of the objects, less in every further slice."""
    x0, y0, x1, y1 = box
    parts = masks[:, y0:y1, x0:x1]
    inside = parts.any(axis=(1, 2)).nonzero()[0]
    found = Instances((y1 - y0, x1 - x0))
    found.scores = torch.from_numpy(0.9 - 0.001 * inside - 1e-8 * (x0 + y0))
    found.pred_classes = torch.from_numpy(classes[inside])
    if kind != "masks":
        found.pred_boxes = Boxes(extents(parts[inside]))
    if kind != "boxes":
        found.pred_masks = torch.from_numpy(parts[inside])
    return found


@pytest.mark.parametrize("kind", ["both", "masks"])
@pytest.mark.parametrize(("size", "overlap"), [(100, 0.2), (160, 0.1), (90, 0.5)])
def test_objects_that_borders_cut_are_one_again(sahi: None, size: int, overlap: float, kind: str) -> None:
    """Also those larger than a slice, and those before others of their class: masks are as before the cuts."""
    masks, classes = drawn_image(2, 3)
    slices = slice_boxes(*masks.shape[1:], size, overlap)
    found = [place(seen(masks, classes, box, kind), box[0], box[1], masks.shape[1:]) for box in slices]
    assert sum(map(len, found)) > 2 * len(masks)
    merged = merge(slices, found)
    order = np.array([np.argmin(np.abs(0.9 - 0.001 * np.arange(len(masks)) - s)) for s in merged.scores.numpy()])
    assert len(merged) == len(masks) and np.array_equal(order, np.arange(len(masks)))
    assert np.array_equal(merged.pred_classes, classes)
    for number, mask in enumerate(masks):
        assert np.array_equal(merged.pred_masks.decode(number), mask)
    if kind == "both":
        assert torch.equal(merged.pred_boxes.tensor, extents(masks))
    reduced = resize(merged, 256, 384)
    assert reduced.image_size == reduced.pred_masks.size == (256, 384)


def test_boxes_alone(sahi: None) -> None:
    masks = np.zeros((4, 120, 200), bool)
    masks[0, 10:60, 20:190], masks[1, 70:110, 40:70], masks[2, 70:100, 90:130], masks[3, 75:95, 95:120] = [True] * 4
    classes = np.array([0, 0, 1, 0])
    slices = slice_boxes(120, 200, 64, 0.25)
    merged = merge(slices, [place(seen(masks, classes, box, "boxes"), *box[:2], (120, 200)) for box in slices])
    assert torch.equal(merged.pred_boxes.tensor, extents(masks)) and not merged.has("pred_masks")


def test_large_images_in_little_memory(sahi: None) -> None:
    """800 detections in 48 megapixels, of which arrays would take 38 GB."""
    size = (6000, 8000)
    disk = np.hypot(*np.mgrid[-30:31, -30:31]) < 30
    slices = slice_boxes(*size, 1000, 0.2)
    tracemalloc.start()
    found = []
    for x0, y0, x1, y1 in slices:
        part = Instances((y1 - y0, x1 - x0), scores=torch.rand(10), pred_classes=torch.zeros(10, dtype=torch.int64))
        part.pred_masks = torch.zeros(10, *part.image_size, dtype=torch.bool)
        for k in range(10):
            part.pred_masks[k, 400 : 400 + 61, 80 * k : 80 * k + 61] = torch.from_numpy(disk)
        found.append(place(part, x0, y0, size))
    merged = merge(slices, found)
    resize(merged, 960, 1280)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(slices) == 80 and len(merged) == 800 and peak < 50e6


class BrightParts(nn.Module):
    """Every connected bright part of an image is an object: of class 1 where red, else of class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, inputs: list[dict]) -> list[dict]:
        (item,) = inputs
        assert not self.training and item["image"].shape[1:] == (item["height"], item["width"])
        self.sizes.append(tuple(item["image"].shape[1:]))
        image = item["image"].numpy()
        count, labels = cv2.connectedComponents((image.max(axis=0) > 100).astype(np.uint8))
        masks = labels == np.arange(1, count)[:, None, None]
        found = Instances(image.shape[1:], scores=torch.linspace(0.9, 0.8, count - 1, dtype=torch.float64))
        found.pred_classes = torch.tensor([int(image[0, mask].min() > image[2, mask].max()) for mask in masks])
        found.pred_boxes = Boxes(extents(masks))
        found.pred_masks = torch.from_numpy(masks.reshape(-1, *image.shape[1:]))
        return [{"instances": found}]


@pytest.fixture
def large(tmp_path: Path, cfg: CfgNode, register: Callable[..., str]) -> CfgNode:
    """Config of an evaluation on one image with 150 drawn objects, some longer than a slice, in slices of 128."""
    rng = np.random.default_rng(0)
    height, width, pitch = 500, 750, 50
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    annotations = []
    for k in range(150):
        x, y = pitch * (k % 15) + 24, pitch * (k // 15) + 24
        mask = np.zeros((height, width), np.uint8)
        if k % 15 in (3, 4, 5, 6) and k // 15 == 5:  # three of them are one
            cv2.line(mask, (pitch * 3 + 10, y), (pitch * 7 - 10, y), 1, 9)
            if k % 15 != 3:
                continue
        else:
            cv2.ellipse(mask, (x, y), (int(rng.integers(6, 22)), int(rng.integers(6, 22))), 0, 0, 360, 1, -1)
        image[mask > 0] = (250, 150, 150)[:: 1 if k % 2 else -1]
        pixels = np.asfortranarray(mask)
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], pixels.reshape(-1, order="F"), [2]])))).tolist()
        first = int(pixels.reshape(-1, order="F").argmax())
        x0, y0, w, h = cv2.boundingRect(mask)
        annotations.append(
            {
                "id": k + 1,
                "image_id": 1,
                "category_id": 70 if k % 2 else 3,
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": [x0, y0, w, h],
                "segmentation": {"size": [height, width], "counts": [first, *runs]},
            }
        )
    (tmp_path / "large").mkdir()
    Image.fromarray(image).save(tmp_path / "large" / "a.png")
    categories = [{"id": 3, "name": "wide"}, {"id": 70, "name": "tall"}]
    images = [{"id": 1, "file_name": "a.png", "height": height, "width": width}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "large.json").write_text(json.dumps(content))
    cfg.DATASETS.TEST = (register("engine_large", tmp_path / "large.json"),)
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    cfg.VIS_NUM_IMAGES = 1
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 500, 750
    return cfg


def test_ap_by_slices_is_that_of_the_whole(sahi: None, large: CfgNode) -> None:
    model = BrightParts().train()
    whole = Trainer.test(large, model.eval())
    results = Path(large.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
    assert whole["segm"]["AP"] == whole["bbox"]["AP"] == pytest.approx(100)
    assert len(json.loads(results.read_text())) == 147
    large.TEST.SLICE.SIZE, large.TEST.SLICE.OVERLAP = 128, 0.25
    large.INPUT.MIN_SIZE_TEST, large.INPUT.MAX_SIZE_TEST = 128, 128
    model.sizes.clear()
    by_slices = Trainer.test(large, model)
    assert len(json.loads(results.read_text())) == 147
    for task, scores in whole.items():
        assert by_slices[task] == pytest.approx(scores, nan_ok=True)
    assert model.sizes == [(128, 128)] * len(slice_boxes(500, 750, 128, 0.25)) and not model.training
    assert (Path(large.OUTPUT_DIR) / "predictions" / "a.png").is_file()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, large: CfgNode) -> None:
    large.TEST.SLICE.SIZE = 128
    for overlap in (0.0, 0.007, 1.0, 3.0):
        large.TEST.SLICE.OVERLAP = overlap
        with pytest.raises(ValueError, match=f"TEST.SLICE.OVERLAP is {overlap} of slices of TEST.SLICE.SIZE 128"):
            SlicedModel.from_config(large, BrightParts())
    large.TEST.SLICE.OVERLAP, large.MODEL.PANOPTIC.ENABLED = 0.2, True
    with pytest.raises(ValueError, match=r"panoptic maps of slices are not merged .* set TEST\.SLICE\.SIZE 0"):
        SlicedModel.from_config(large, BrightParts())
    large.MODEL.PANOPTIC.ENABLED = False
    monkeypatch.setitem(sys.modules, "sahi.slicing", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'querymask\[sahi\]'"):
        Trainer.test(large, BrightParts())


def test_cityscapes_has_no_slices(cfg: CfgNode) -> None:
    cfg.TEST.SLICE.SIZE = 128
    MetadataCatalog.get("engine_cityscapes").evaluator_type = "cityscapes_instance"
    with pytest.raises(ValueError, match="TEST.SLICE.SIZE is for data sets with COCO's or LVIS's evaluation"):
        build_evaluator(cfg, "engine_cityscapes")
    MetadataCatalog.remove("engine_cityscapes")
