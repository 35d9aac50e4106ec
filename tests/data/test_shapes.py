import json
import multiprocessing
import shutil
from collections import Counter

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from querymask.common.data import shapes
from querymask.common.data.shape_drawing import CLASS_NAMES, MIN_VISIBLE, SIDE_RANGE, _Canvas, draw_scene
from querymask.common.data.shapes import make_shapes
from querymask.common.data.stuff_drawing import STUFF_NAMES, draw_panoptic_scene

NUM_IMAGES = 80


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small data set, made once and only read."""
    root = tmp_path_factory.mktemp("datasets")
    make_shapes(root, "train", NUM_IMAGES)
    return root


@pytest.fixture(scope="module")
def coco(root):
    return COCO(str(shapes.shapes_folder(root) / "train.json"))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jpg", ".json")}


def test_json_describes_the_images(root, coco):
    folder = shapes.shapes_folder(root) / "train"
    assert coco.getImgIds() == list(range(1, NUM_IMAGES + 1))
    assert coco.dataset["info"]["version"] == str(shapes.VERSION)
    for entry in coco.imgs.values():
        with Image.open(folder / entry["file_name"]) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert image.size == (entry["width"], entry["height"])
            assert all(SIDE_RANGE[0] <= side <= SIDE_RANGE[1] for side in image.size)
    assert len({(e["width"], e["height"]) for e in coco.imgs.values()}) > NUM_IMAGES / 2
    assert not list(folder.parent.rglob("*.tmp")) and not list(folder.parent.glob("*.parts"))


def test_annotations_agree_with_themselves(coco):
    kinds = Counter()
    for annotation in coco.anns.values():
        entry = coco.imgs[annotation["image_id"]]
        mask = coco.annToMask(annotation).astype(bool)
        assert mask.shape == (entry["height"], entry["width"])
        assert mask.any() and annotation["area"] == mask.sum()
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        extent = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        # A pixel is set where the polygon covers its centre, so the mask ends short of a sharp corner
        tolerance = 3 if isinstance(annotation["segmentation"], list) else 0
        np.testing.assert_allclose((x, y, x + w, y + h), extent, atol=tolerance)
        assert x >= 0 and y >= 0 and x + w <= entry["width"] and y + h <= entry["height"]
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            kinds["polygon"] += 1
        else:
            kinds["uncompressed" if isinstance(segmentation["counts"], list) else "compressed"] += 1
        assert annotation["iscrowd"] == (isinstance(segmentation, dict) and isinstance(segmentation["counts"], list))
    assert min(kinds.values()) >= 1 and len(kinds) == 3, kinds


def test_visible_masks_do_not_overlap(coco):
    shared = total = 0
    for image_id in coco.imgs:
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
        if masks:
            count = np.sum(masks, axis=0)
            shared += (count > 1).sum()
            total += (count > 0).sum()
    assert shared < 0.01 * total  # polygons and pixels differ a little along outlines


def test_polygons_are_the_drawn_masks():
    compared = 0
    for index in range(20):
        image, objects = draw_scene(np.random.default_rng(index))
        for item in objects:
            if item.outline is None:
                continue
            rle = mask_util.merge(mask_util.frPyObjects([item.outline.reshape(-1).tolist()], *image.shape[:2]))
            mask = mask_util.decode(rle).astype(bool)
            assert (mask & item.mask).sum() > 0.9 * (mask | item.mask).sum()
            compared += 1
    assert compared > 10


def test_masks_are_where_the_picture_changes(monkeypatch):
    """Outside of all masks (and of the shadows) the picture is the background, inside it is not."""
    from querymask.common.data import shape_drawing

    monkeypatch.setattr(shape_drawing, "_pattern", lambda rng, height, width: np.zeros((height, width), np.float32))
    monkeypatch.setattr(shape_drawing, "EMPTY_PROBABILITY", 0.0)
    monkeypatch.setattr(shape_drawing._Canvas, "finish", lambda canvas: canvas.image)
    for seed in range(10):
        image, objects = draw_scene(np.random.default_rng(seed))
        covered = np.any([item.mask for item in objects], axis=0)
        background = np.median(image[~covered], axis=0)
        different = np.abs(image - background).max(axis=-1) > 1e-3
        assert different[covered].mean() > 0.98  # rounding of outlines apart
        hue = image / np.maximum(image.max(axis=-1, keepdims=True), 1e-6)  # a shadow leaves it as it is
        other_hue = np.abs(hue - background / background.max()).max(axis=-1) > 0.02
        assert other_hue[~covered].mean() < 0.05


def test_variety():
    scenes = [draw_scene(np.random.default_rng([7, i])) for i in range(600)]
    counts = np.array([len(objects) for _, objects in scenes])
    assert 0.01 <= np.mean(counts == 0) <= 0.06
    assert counts.max() >= 7 and 3 < counts.mean() < 5
    objects = [(image.shape, item) for image, items in scenes for item in items]
    assert 0.02 < np.mean([any(item.is_crowd for item in items) for _, items in scenes]) < 0.09
    plain = [(shape, item) for shape, item in objects if not item.is_crowd]
    shares = np.bincount([item.class_index for _, item in plain], minlength=len(CLASS_NAMES)) / len(plain)
    assert len(CLASS_NAMES) >= 6 and shares.min() > 0.13 and shares.max() < 0.2
    sides = np.array([np.ptp(np.nonzero(item.mask), axis=1).max() + 1 for _, item in plain])
    assert np.mean((sides >= 16) & (sides <= 80)) > 0.75
    assert np.mean(sides < 20) > 0.05 and np.mean(sides > 80) > 0.05
    borders = [m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any() for m in (item.mask for _, item in plain)]
    assert 0.15 < np.mean(borders) < 0.5
    assert min(item.mask.sum() for _, item in plain) >= 25  # nothing nearly hidden
    assert 0.2 < np.mean([item.outline is not None for _, item in plain]) < 0.6


def test_objects_that_would_be_hardly_seen_are_not_painted():
    canvas = _Canvas(np.random.default_rng(0))
    colours = [np.ones(3, np.float32), np.zeros(3, np.float32)]
    before = canvas.image.copy()
    for name in CLASS_NAMES:  # centred on a corner of the image, which leaves a quarter of it inside
        assert not canvas.place(name, 40, colours, (0, 0, 0, 0), label=1)
    assert (canvas.image == before).all() and not canvas.labels.any()
    middle = (canvas.width / 2, canvas.height / 2) * 2
    assert canvas.place("circle", 30, colours, middle, label=1)
    painted = canvas.image.copy()
    assert not canvas.place("square", 60, colours, middle, label=2)  # would hide the circle
    assert (canvas.image == painted).all() and canvas.visible == canvas.painted
    assert canvas.place("circle", 15, colours, middle, label=2)
    assert MIN_VISIBLE * canvas.painted[1] <= canvas.visible[1] < canvas.painted[1]
    assert [canvas.visible[label] for label in (1, 2)] == np.bincount(canvas.labels.ravel())[1:].tolist()


def test_colour_does_not_tell_the_class(coco, root):
    folder = shapes.shapes_folder(root) / "train"
    colours = {}
    for annotation in coco.anns.values():
        image = np.asarray(Image.open(folder / coco.imgs[annotation["image_id"]]["file_name"]))
        mean = image[coco.annToMask(annotation).astype(bool)].mean(axis=0)
        colours.setdefault(annotation["category_id"], []).append(mean)
    centres = np.array([np.mean(c, axis=0) for c in colours.values()])
    spread = np.mean([np.std(c, axis=0).mean() for c in colours.values()])
    assert np.ptp(centres, axis=0).max() < spread


def test_an_image_depends_on_its_index_alone(root, tmp_path):
    make_shapes(tmp_path, "train", 10)
    small, large = contents(shapes.shapes_folder(tmp_path) / "train"), contents(shapes.shapes_folder(root) / "train")
    assert len(small) == 10 and all(large[name] == data for name, data in small.items())
    make_shapes(tmp_path, "val", 10)
    assert not set(small.values()) & set(contents(shapes.shapes_folder(tmp_path) / "val").values())


def test_another_version_is_another_data_set(tmp_path, monkeypatch):
    make_shapes(tmp_path, "val", 5)
    before = contents(tmp_path)
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    json_file = make_shapes(tmp_path, "val", 5)
    after = {path: data for path, data in contents(tmp_path).items() if path not in before}
    assert len(after) == len(before) == 6 and not set(after.values()) & set(before.values())
    assert json.loads(json_file.read_bytes())["info"]["version"] == str(shapes.VERSION)


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_PART_SIZE", 10)
    make_image, drawn = shapes._make_image, []

    def interrupted(split, index, folder):
        drawn.append(index)
        if len(drawn) == 24:
            raise KeyboardInterrupt
        return make_image(split, index, folder)

    monkeypatch.setattr(shapes, "_make_image", interrupted)
    folder = shapes.shapes_folder(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "resumed", "train", 35)
    assert not (folder / "train.json").exists()
    assert drawn == list(range(24))

    drawn.clear()
    drawn.extend([-1] * 100)  # no further interruption
    make_shapes(tmp_path / "resumed", "train", 35)
    assert drawn[100:] == list(range(20, 35))
    make_shapes(tmp_path / "whole", "train", 35)
    assert contents(folder) == contents(shapes.shapes_folder(tmp_path / "whole"))


def test_nothing_is_made_twice(root, monkeypatch):
    monkeypatch.setattr(shapes, "_generate", None)
    assert make_shapes(root, "train", NUM_IMAGES).exists()


def test_lost_images_are_made_again(tmp_path):
    folder = shapes.shapes_folder(tmp_path)
    make_shapes(tmp_path, "val", 8)
    before = contents(folder)
    (folder / "val" / "000003.jpg").unlink()
    make_shapes(tmp_path, "val", 8)
    assert contents(folder) == before
    shutil.rmtree(folder / "val")
    make_shapes(tmp_path, "val", 8)
    assert contents(folder) == before


def _make_and_report(root, barrier, log):
    generate = shapes._generate

    def reported(*args):
        with open(log, "a") as file:
            file.write("generated\n")
        generate(*args)

    shapes._generate = reported
    barrier.wait()
    make_shapes(root, "train", NUM_IMAGES)
    json.loads((shapes.shapes_folder(root) / "train.json").read_bytes())


def test_processes_that_start_together_make_it_once(root, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log"
    processes = [context.Process(target=_make_and_report, args=(tmp_path, barrier, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "generated\n"
    assert contents(shapes.shapes_folder(tmp_path)) == contents(shapes.shapes_folder(root))


@pytest.mark.parametrize("fill", ["random", "zeros", "ones", "first"])
def test_uncompressed_run_lengths(fill):
    mask = np.random.default_rng(0).random((7, 5)) < 0.5
    if fill != "random":
        mask[:] = fill == "ones"
        mask[0, 0] = fill != "zeros"
    rle = mask_util.frPyObjects({"size": [7, 5], "counts": shapes._run_lengths(mask)}, 7, 5)
    np.testing.assert_array_equal(mask_util.decode(rle).astype(bool), mask)


def test_panoptic_form(tmp_path):
    """Segments are where the picture shows them, cover it but for scraps, and are what the JSON says."""
    json_file = make_shapes(tmp_path, "train", 60, panoptic=True)
    assert json_file == tmp_path / "shapes_panoptic" / "v1" / "train.json"
    document = json.loads(json_file.read_bytes())
    names = {category["id"]: category["name"] for category in document["categories"]}
    stuff = {category["id"] for category in document["categories"] if not category["isthing"]}
    assert [names[i] for i in sorted(set(names) - stuff)] == list(CLASS_NAMES)
    seen, parts, bands = Counter(), Counter(), Counter()
    for image, annotation in zip(document["images"], document["annotations"], strict=True):
        assert annotation["image_id"] == image["id"]
        with Image.open(json_file.parent / "panoptic_train" / annotation["file_name"]) as file:
            assert file.mode == "RGB"
            ids = np.asarray(file).astype(int) @ [1, 256, 65536]
        assert ids.shape == (image["height"], image["width"]) and (ids == 0).mean() < 0.05
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            ys, xs = np.nonzero(ids == segment["id"])
            assert segment["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert segment["area"] == len(xs)
            seen[names[segment["category_id"]]] += 1
            if segment["category_id"] in stuff:
                count, _ = cv2.connectedComponents((ids == segment["id"]).astype(np.uint8))
                parts["several" if count > 2 else "one"] += 1
        shown = [s["category_id"] for s in annotation["segments_info"] if s["category_id"] in stuff]
        assert len(set(shown)) == len(shown)
        bands[len(shown)] += 1
    assert set(seen) == set(names.values()) and min(parts.values()) > 5 and len(bands) >= 3


def test_stuff_is_told_by_its_colour():
    """The mean colours of the classes of stuff are apart, whatever the light: a network can learn them."""
    colours = {}
    for seed in range(40):
        image, _, stuff = draw_panoptic_scene(np.random.default_rng(seed))
        for index in np.unique(stuff[stuff >= 0]):
            colours.setdefault(index, []).append(image[stuff == index].mean(axis=0))
    means = np.array([np.mean(colours[index], axis=0) for index in range(len(STUFF_NAMES))])
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert distances[~np.eye(len(means), dtype=bool)].min() > 40


def test_lost_panoptic_files_are_made_again(tmp_path):
    json_file = make_shapes(tmp_path, "val", 8, panoptic=True)
    path = json_file.parent / "panoptic_val" / "000003.png"
    before = path.read_bytes()
    path.unlink()
    make_shapes(tmp_path, "val", 8, panoptic=True)
    assert path.read_bytes() == before
