"""The tool that draws the results of several models side by side."""

import json
import re
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tool_loader import load_tool

tool = load_tool("compare_results")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Two grey images, one annotation, category ids 7 and 9."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (3, 4)]
    box = {"id": 1, "image_id": 3, "category_id": 9, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    box["segmentation"] = [[5, 5, 25, 5, 25, 25, 5, 25]]
    content = {"images": images, "annotations": [box], "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    for image in images:
        Image.new("RGB", (60, 40), "gray").save(tmp_path / image["file_name"])
    register_coco_instances("compare_set", {}, str(tmp_path / "set.json"), str(tmp_path))
    yield "compare_set"
    DatasetCatalog.remove("compare_set")
    MetadataCatalog.remove("compare_set")


def result(category: int, **fields: object) -> dict:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 30:50] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    return {"image_id": 3, "category_id": category, "score": 0.9, "segmentation": rle, **fields}


def test_panels(dataset: str, tmp_path: Path) -> None:
    """Ground truth and a panel a model; what differs between two pictures is where the models differ."""
    (tmp_path / "masks.json").write_text(json.dumps([result(9)]))
    (tmp_path / "boxes.json").write_text(json.dumps([result(7, bbox=[30, 10, 20, 20])]))
    arguments = ["--dataset", dataset, "--output", str(tmp_path / "out")]
    assert tool.main([*arguments, f"A={tmp_path}/masks.json", f"B B={tmp_path}/boxes.json"]) == 0
    pictures = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "out").iterdir()}
    assert set(pictures) == {"3.png", "4.png"}
    assert pictures["3.png"].shape[1] > 3 * 512  # three panels
    drawn, plain = pictures["3.png"].astype(int), pictures["4.png"].astype(int)
    panel = drawn.shape[1] // 3
    for i in range(3):
        assert (drawn[60:, i * panel : (i + 1) * panel] != plain[60:, i * panel : (i + 1) * panel]).any()


def test_equal_names_and_images_that_cannot_be_drawn(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((tmp_path / "set.json").read_text())
    images = [{**content["images"][0], "id": i, "file_name": f"cam{i}/0001.png"} for i in (3, 4, 5)]
    (tmp_path / "set.json").write_text(json.dumps({**content, "images": images}))
    for i in (3, 4, 5):
        (tmp_path / f"cam{i}").mkdir()
        Image.new("RGB", (60, 40), "gray").save(tmp_path / f"cam{i}" / "0001.png")
    (tmp_path / "cam4" / "0001.png").write_text("no image")
    (tmp_path / "r.json").write_text(json.dumps([result(9)]))
    arguments = ["--dataset", dataset, "--output", str(tmp_path / "out"), f"A={tmp_path}/r.json"]
    assert tool.main(arguments) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.png", "0001_3.png"]
    said = capsys.readouterr()
    assert f"error: there is no picture of {tmp_path}/cam4/0001.png: " in said.err and "2 pictures are in" in said.out
    samples = np.arange(2400).reshape(40, 60).astype(np.uint16)
    Image.fromarray(samples).save(tmp_path / "cam4" / "0001.png")
    assert tool.main(arguments) == 1 and "PIXEL_RANGE" in capsys.readouterr().err
    assert tool.main([*arguments, "--pixel-range", "0", "2399"]) == 0
    assert (tmp_path / "out" / "0001_2.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 3}], "not a list of results"),
        ({"images": []}, "not a list of results"),
        ([result(8)], "1 values of category_id in the results are none of compare_set: 8"),
    ],
)
def test_bad_files(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert tool.main(["--dataset", dataset, "--output", str(tmp_path / "out"), f"A={tmp_path}/r.json"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_file_without_name(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--dataset", dataset, "--output", str(tmp_path), "results.json"]) == 1
    assert "results.json: give every model as NAME=FILE" in capsys.readouterr().err
