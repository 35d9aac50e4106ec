"""Folders of data from annotations of other programs: what becomes of objects, and of what cannot be used."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_folders import restored_catalog, write_part
from PIL import Image
from tool_loader import load_tool

from querymask.common.data.conversion import find_form
from querymask.common.data.folders import DataFolder
from querymask.common.data.segmentation import decode_segmentation

tool = load_tool("make_coco")
HEIGHT, WIDTH = 40, 60
Masks = list[tuple[str, np.ndarray]]


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


FIRST, SECOND = rectangle(5, 5, 25, 25), rectangle(30, 10, 45, 30)


def photo(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), **arguments: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **arguments)
    return path


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def labels(*masks: np.ndarray, values: tuple[int, ...] = (1, 2), dtype: type = np.uint8) -> np.ndarray:
    return sum((mask * np.asarray(value) for mask, value in zip(masks, values)), np.zeros((HEIGHT, WIDTH))).astype(
        dtype
    )


def shape(label: str, points: list, **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": "polygon", "group_id": None, **more}


def box(x0: int, y0: int, x1: int, y1: int) -> list:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def labelme(path: Path, *shapes: dict[str, Any], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"imagePath": f"{path.stem}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
    path.write_text(json.dumps({"version": "5.5.0", "flags": {}, "shapes": list(shapes), **known, **more}))


def run(source: Path, output: Path, *options: str) -> tuple[int, dict[str, dict[str, Masks]]]:
    """Exit status, and the objects of each photograph by part, as class and bitmap."""
    status = tool.main([str(source), str(output), *options])
    found: dict[str, dict[str, Masks]] = {}
    with restored_catalog():
        folder = DataFolder(output)
        for part in folder.names:
            for entry in folder.entries(part):
                name = Path(entry["file_name"]).name
                with Image.open(entry["file_name"]) as image:
                    assert image.size == (entry["width"], entry["height"]) == (WIDTH, HEIGHT)
                found.setdefault(part, {})[name] = [
                    (
                        folder.classes[a["category_id"]] + " crowd" * a["iscrowd"],
                        decode_segmentation(a["segmentation"], HEIGHT, WIDTH),
                    )
                    for a in entry["annotations"]
                ]
    assert (output / "check.jpg").stat().st_size > 1000
    return status, found


def same(found: Masks, *expected: tuple[str, np.ndarray]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, mask), (_, other) in zip(found, expected):
        assert np.array_equal(mask, other)


def all_of(found: dict[str, dict[str, Masks]]) -> dict[str, Masks]:
    return {name: masks for part in found.values() for name, masks in part.items()}


def object_masks(folder: Path) -> None:
    for name in ("a", "b", "c"):
        photo(folder / name / "images" / f"{name}.png")
        save(folder / name / "masks" / "1.png", FIRST.astype(np.uint8) * 255)
        save(folder / name / "masks" / "2.png", SECOND)  # one bit


def object_masks_in_two_folders(folder: Path) -> None:
    for name in ("a", "b", "c"):
        photo(folder / "images" / f"{name}.png")
        save(folder / "masks" / name / "1.png", FIRST.astype(np.uint8))
        colours = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
        colours[..., 3], colours[SECOND, 1] = 255, 200
        save(folder / "masks" / name / "2.png", colours)


def label_images(folder: Path) -> None:
    for name in ("a", "b", "c"):
        photo(folder / "images" / f"{name}.png")
        save(folder / "masks" / f"{name}.png", labels(FIRST, SECOND, values=(300, 70), dtype=np.uint16))
    palette = Image.fromarray(labels(FIRST, SECOND, values=(2, 1))).convert("P")
    palette.putpalette([0, 0, 0, 90, 90, 90, 9, 9, 9])
    palette.putdata(labels(FIRST, SECOND, values=(2, 1)).ravel().tolist())
    palette.save(folder / "masks" / "b.png")


def instance_ids(folder: Path) -> None:
    """The order of the values is that of the classes."""
    for part, name in (("train", "ulm_0_1"), ("val", "bonn_0_2")):
        photo(folder / "leftImg8bit" / part / "city" / f"{name}_leftImg8bit.png")
        ids = labels(SECOND, FIRST, rectangle(50, 0, 60, 40), values=(24000, 26001, 26), dtype=np.int32)
        ids[35:, :20] = 7  # road
        save(folder / "gtFine" / part / "city" / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
        save(folder / "gtFine" / part / "city" / f"{name}_gtFine_labelIds.png", labels(FIRST))


def yolo(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            photo(folder / "images" / part / f"{part}_{name}.png")
        lines = []
        for kind, corners in ((1, box(5, 5, 25, 25)), (0, box(30, 10, 45, 30))):
            values = [f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in corners]
            lines.append(f"{kind} {' '.join(values)}\n")
        (folder / "labels" / part).mkdir(parents=True)
        (folder / "labels" / part / f"{part}_a.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text("train: ../images/train\nval: ../images/val\nnames: {0: cell, 1: dust}\nnc: 2\n")


@pytest.mark.parametrize(
    ("form", "make"),
    [("masks", object_masks), ("masks", object_masks_in_two_folders), ("labels", label_images)],
)
def test_masks(tmp_path: Path, form: str, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in")
    assert find_form(tmp_path / "in") == form
    status, found = run(tmp_path / "in", tmp_path / "out", "--class-name", "cell")
    assert status == 0 and set(all_of(found)) == {"a.png", "b.png", "c.png"}
    for masks in all_of(found).values():
        same(sorted(masks, key=lambda item: -item[1].sum()), ("cell", FIRST), ("cell", SECOND))
    assert "3 photographs are in" in capsys.readouterr().out


def test_label_images_in_parts(tmp_path: Path) -> None:
    for part in ("train", "val"):
        photo(tmp_path / "in" / "images" / part / "a.png")
        save(tmp_path / "in" / "masks" / part / "a.png", labels(SECOND, FIRST))
    assert find_form(tmp_path / "in") == "labels"
    _, found = run(tmp_path / "in", tmp_path / "out")
    for part in ("train", "val"):
        same(found[part]["a.png"], ("object", SECOND), ("object", FIRST))


def test_cityscapes(tmp_path: Path) -> None:
    """Objects, a group of cars as a crowd, and no road; the classes that are there; the parts of the source."""
    instance_ids(tmp_path / "in")
    assert find_form(tmp_path / "in") == "cityscapes"
    status, found = run(tmp_path / "in", tmp_path / "out")
    assert status == 0 and set(found) == {"train", "val"}
    for masks in all_of(found).values():
        same(masks, ("car crowd", rectangle(50, 0, 60, 40)), ("person", SECOND), ("car", FIRST))


def test_yolo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo(tmp_path / "in")
    assert find_form(tmp_path / "in") == "yolo"
    status, found = run(tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr()
    assert status == 0 and "2 photographs have no text file: they count as without objects" in said.err
    assert {part: set(masks) for part, masks in found.items()} == {
        part: {f"{part}_a.png", f"{part}_b.png"} for part in ("train", "val")
    }
    for part in ("train", "val"):
        same(found[part][f"{part}_a.png"], ("dust", FIRST), ("cell", SECOND))
        assert found[part][f"{part}_b.png"] == []
    assert [line.split()[1::2] for line in said.out.splitlines()[2:4]] == [
        ["train", "2", "1", "1", "1"],
        ["val", "2", "1", "1", "1"],
    ]


def test_yolo_parts(tmp_path: Path) -> None:
    """data.yaml may call the folders as it likes."""
    yolo(tmp_path / "in")
    for kind in ("images", "labels"):
        for part, name in (("train", "one"), ("val", "two")):
            (tmp_path / "in" / kind / part).rename(tmp_path / "in" / kind / name)
    text = "path: /data/cells\ntrain: /data/cells/images/one\nval: [images/two]\nnames: [cell, dust]\n"
    (tmp_path / "in" / "data.yaml").write_text(text)
    _, found = run(tmp_path / "in", tmp_path / "out")
    assert set(found["train"]) == {"train_a.png", "train_b.png"} and set(found["val"]) == {"val_a.png", "val_b.png"}
    (tmp_path / "in" / "data.yaml").unlink()  # neither names nor parts
    status, found = run(tmp_path / "in", tmp_path / "out2", "--class-name", "kind")
    assert status == 0 and {name for masks in all_of(found).values() for name, _ in masks} == {"kind 0", "kind 1"}
    assert (tmp_path / "out2" / "annotations.json").is_file()


def test_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every shape that has an area, groups as one object, an image within the JSON file, a path of Windows."""
    source = tmp_path / "in"
    photo(source / "a.png"), photo(source / "deep" / "b.png"), photo(source / "unlabelled.png")
    pixels = io.BytesIO()
    Image.fromarray(np.ones((20, 15), dtype=bool)).save(pixels, "PNG")
    mask = base64.b64encode(pixels.getvalue()).decode()
    labelme(
        source / "a.json",
        shape("dust", box(5, 5, 25, 25)),
        shape("cell", [[30, 10], [45, 30]], shape_type="rectangle"),
        shape("cell", [[30, 10], [44, 29]], shape_type="mask", mask=mask),
        shape("cell", [[30, 20], [30, 30]], shape_type="circle"),
        shape("cell", box(0, 0, 10, 10), group_id=1),
        shape("cell", box(20, 0, 30, 10), group_id=1),
    )
    labelme(source / "deep" / "json" / "b.json", shape("cell", box(5, 5, 25, 25)), imagePath="..\\b.png")
    held = base64.b64encode(photo(tmp_path / "c.jpg").read_bytes()).decode()
    labelme(source / "c.json", shape("cell", box(5, 5, 25, 25)), imagePath="/home/x/c.jpg", imageData=held)
    assert find_form(source) == "labelme"
    status, found = run(source, tmp_path / "out")
    said = capsys.readouterr().err
    masks = all_of(found)
    assert status == 0, said
    assert set(masks) == {"a.png", "b.png", "c.jpeg"}
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    circle = masks["a.png"].pop(3)
    assert np.count_nonzero(circle[1] != ((x - 30) ** 2 + (y - 20) ** 2 < 100)) < 20
    both = rectangle(0, 0, 10, 10) | rectangle(20, 0, 30, 10)
    same(masks["a.png"], ("dust", FIRST), ("cell", SECOND), ("cell", SECOND), ("cell", both))
    same(masks["b.png"], ("cell", FIRST))
    assert "1 photographs have no JSON file, the first" in said


def spoil_object_masks(folder: Path) -> list[str]:
    object_masks(folder)
    save(folder / "a" / "masks" / "3.png", np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8))
    photo(folder / "two" / "images" / "1.png"), photo(folder / "two" / "images" / "2.png")
    save(folder / "two" / "masks" / "1.png", FIRST)
    save(folder / "b" / "masks" / "3.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    return [
        "left out: .*a.png: .*3.png is 61x40, the photograph 60x40",
        "left out: .*two/masks: 2 photographs belong to these masks",
        "b/masks/3.png is empty: it is no object",
    ]


def spoil_label_images(folder: Path) -> list[str]:
    label_images(folder)
    save(folder / "masks" / "a.png", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    photo(folder / "images" / "d.png")
    (folder / "images" / "e.png").write_text("no image")
    save(folder / "masks" / "f.png", labels(FIRST))
    return [
        r"left out: .*a.png: .*masks/a.png has colours \(RGB\), not label numbers",
        "left out: .*d.png: 0 label images of its name are in .*masks",
        "left out: .*e.png: it cannot be read as an image",
        "masks/f.png has no photograph",
    ]


def spoil_instance_ids(folder: Path) -> list[str]:
    instance_ids(folder)
    ids = labels(FIRST, values=(24000,), dtype=np.uint16)
    save(folder / "gtFine" / "train" / "city" / "x_0_0_gtFine_instanceIds.png", ids)
    return ["left out: .*x_0_0_gtFine_instanceIds.png: 0 photographs are called x_0_0 or x_0_0_leftImg8bit"]


def spoil_yolo(folder: Path) -> list[str]:
    yolo(folder)
    wrong = {
        "box": ("0 0.5 0.5 0.2 0.2", "line 1: a box, not a polygon"),
        "odd": ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.4", "line 1: 7 coordinates are no polygon"),
        "pixels": ("0 1 1 20 1 20 20", "line 1: coordinates must be parts of width and height"),
        "word": ("\ncell 0.1 0.1 0.5 0.1 0.5 0.5", "line 2: 'cell 0.1 0.1 0.5 0.1 0.5 0.5' is not CLASS X1 Y1"),
        "class": ("7 0.1 0.1 0.5 0.1 0.5 0.5", "line 1: class 7 is none of the 2 in data.yaml"),
        "nan": ("1 0.1 nan 0.5 0.1 0.5 0.5", "line 1: coordinates must be parts"),
    }
    for name, (line, _) in wrong.items():
        photo(folder / "images" / "train" / f"{name}.png")
        (folder / "labels" / "train" / f"{name}.txt").write_text(line)
    (folder / "labels" / "train" / "alone.txt").write_text("")
    named = [f"left out: .*{name}.png: .*{name}.txt, {message}" for name, (_, message) in wrong.items()]
    return [*named, "alone.txt has no photograph"]


def spoil_labelme(folder: Path) -> list[str]:
    for name in ("good", "better"):
        photo(folder / f"{name}.png")
        labelme(folder / f"{name}.json", shape("cell", box(5, 5, 25, 25)))
    wrong: dict[str, tuple[Any, str]] = {
        "line": (shape("cell", [[1, 1], [5, 5]], shape_type="line"), "'cell': a line has no area"),
        "two": (shape("cell", [[1, 1], [5, 5]]), "'cell': 2 points are no polygon"),
        "mask": (shape("cell", [[50, 30], [70, 50]], shape_type="mask", mask="!"), "shapes.0., 'cell'"),
        "nameless": ({"points": box(1, 1, 5, 5)}, "shapes.0. has no label"),
        "flat": (shape("cell", [1, 2, 3]), "shapes.0., 'cell'"),
    }
    for name, (figure, _) in wrong.items():
        photo(folder / f"{name}.png")
        labelme(folder / f"{name}.json", figure)
    labelme(folder / "gone.json", shape("cell", box(5, 5, 25, 25)))
    photo(folder / "large.png")
    labelme(folder / "large.json", imageWidth=WIDTH * 2)
    labelme(folder / "second.json", imagePath="good.png")
    (folder / "other.json").write_text("{}")
    return [
        *(f"left out: .*{name}.json: .*{message}" for name, (_, message) in wrong.items()),
        "left out: .*gone.json: there is no photograph .*gone.png",
        "left out: .*large.json: it is for an image of 120x40, large.png is 60x40",
        "left out: .*second.json: its photograph is that of .*good.json, too",
        "other.json has no shapes",
    ]


@pytest.mark.parametrize(
    "spoil", [spoil_object_masks, spoil_label_images, spoil_instance_ids, spoil_yolo, spoil_labelme]
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, spoil: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are taken over, and the exit status says that not all were."""
    messages = spoil(tmp_path / "in")
    status, found = run(tmp_path / "in", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert status == 1 and any(all_of(found).values())
    for message in messages:
        assert [line for line in lines if re.match(message, line) or re.search(f"/{message}", line)], (message, lines)
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert len(left_out) == sum(message.startswith("left out") for message in messages)


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *options: str) -> None:
        assert tool.main([str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 1
        assert message in capsys.readouterr().err

    refused("in: there is no such folder")
    photo(tmp_path / "in" / "images" / "a.png")
    refused("is of none of the known forms: masks, one file an object")
    write_part(tmp_path / "in", "roboflow", "train", 1)
    refused("in has COCO's format (Roboflow): give it to train_net.py --data as it is")
    shutil.rmtree(tmp_path / "in" / "train")
    yolo(tmp_path / "in")
    labelme(tmp_path / "in" / "images" / "a.json", shape("cell", box(5, 5, 25, 25)))
    refused("may be of the forms yolo, labelme: choose one with --form")
    refused("some photographs are in parts (train, val), others are not", "--form", "yolo")
    (tmp_path / "in" / "images" / "a.png").unlink()
    refused("has no photographs with objects", "--form", "labelme")
    (tmp_path / "in" / "data.yaml").write_text("names: 3")
    refused("data.yaml: 'names' must be a list", "--form", "yolo")
    (tmp_path / "in" / "data.yaml").write_text("names: [")
    refused("data.yaml is no YAML", "--form", "yolo")
    (tmp_path / "in" / "data.yaml").write_text("names: [a, b]")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    refused("out is not empty", "--form", "yolo")


def test_photographs_of_one_name_and_turned_ones(tmp_path: Path) -> None:
    """They get different names; masks are those of the upright image."""
    for folder in ("x", "y"):
        exif = Image.Exif()
        exif[274] = 6
        photo(tmp_path / "in" / folder / "a.jpg", (WIDTH, HEIGHT), exif=exif)
        labelme(tmp_path / "in" / folder / "a.json", shape("cell", box(5, 5, 25, 25)), imagePath="a.jpg")
    assert tool.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("a.jpg", WIDTH, HEIGHT),
        ("a_2.jpg", WIDTH, HEIGHT),
    ]
