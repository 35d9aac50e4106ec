"""The page about a run: what is on it, that it needs nothing else, what is said where parts of a run are missing."""

import base64
import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import coco_files
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tool_loader import ROOT, load_tool

from querymask import get_cfg

tool = load_tool("report")


class Reader(HTMLParser):
    """Tables as lists of rows, texts of other elements, and what is fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"elements that stay open: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        else:
            self.texts.append(data)

    def rows(self, table: int) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables[table]}


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Path]:
    """A picture with four squares, two of them dogs; gives its annotation file."""
    content = coco_files.squares()
    content["categories"].append({"id": 2, "name": "<dog> & co"})
    for annotation in content["annotations"][:2]:
        annotation["category_id"] = 2
    truth, _ = coco_files.write(tmp_path / "set", lambda c: c.update(content))
    register_coco_instances("report_squares", {}, str(truth), str(tmp_path / "set"))
    yield truth
    DatasetCatalog.remove("report_squares")
    MetadataCatalog.remove("report_squares")


def write_run(folder: Path, results: list[dict[str, Any]] | None, rate: float = 1e-4) -> Path:
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "projects/solq/configs/solq_shapes.yaml"))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("report_squares",)
    cfg.MODEL.DEVICE, cfg.SOLVER.BASE_LR = "cpu", rate
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [{"iteration": i, "total_loss": 5 / (i + 1)} for i in range(5)] + [{"iteration": 5, "segm/AP": 12.5}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    if results is not None:
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    return folder


def detections(truth: Path) -> list[dict[str, Any]]:
    return coco_files.detections(json.loads(truth.read_text()))


def read(file: Path) -> Reader:
    page = Reader(file.read_text(encoding="utf-8"))
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64"), f"needs {source[:60]}"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
    return page


def test_page(dataset: Path, tmp_path: Path) -> None:
    """One dog has no detection, the other is taken for a cell."""
    results = detections(dataset)[1:]
    results[0]["category_id"] = 1
    run = write_run(tmp_path / "run", results)
    assert tool.main([str(run)]) == 0
    page = read(run / "report.html")
    assert len(page.sources) == 2  # curves, and the picture
    scores, errors = page.rows(0), page.rows(1)
    assert scores[""] == ["box", "mask"]
    assert scores["class <dog> & co"] == ["0.00", "0.00"] and scores["class cell"][0] == scores["class cell"][1]
    assert scores["medium"] == ["–", "–"]
    assert scores["small, below 32 x 32 pixels"] == scores["AP"]
    assert {name: errors[name][0] for name in ("classification", "missed", "background")} == {
        "classification": "1",
        "missed": "1",
        "background": "0",
    }
    text = " ".join(page.texts)
    assert (
        "AP50 is " + scores["AP50"][1] in text
        and "a.png: quality 0.57, objects: 4, right: 2, classification: 1" in text
    )
    assert "BASE_LR: 0.0001" in text and "SOLQ" in text


def test_comparison(dataset: Path, tmp_path: Path) -> None:
    """The other run finds all."""
    bad, good = write_run(tmp_path / "bad", detections(dataset)[:1]), write_run(tmp_path / "good", None, rate=2e-4)
    (good / "inference").mkdir()
    (good / "inference" / "coco_instances_results.json").write_text(json.dumps(detections(dataset)))
    output = tmp_path / "pages" / "both.html"
    assert tool.main([str(bad), "--compare", str(good), "--output", str(output)]) == 0
    page = read(output)
    scores, errors, keys = page.rows(0), page.rows(1), page.rows(2)
    assert scores[""] == ["box, bad", "box, good", "difference", "mask, bad", "mask, good", "difference"]
    first, second, change = map(float, scores["AP"][:3])
    assert second == 100 and change == pytest.approx(second - first, abs=0.02) and change > 0
    assert errors["missed"][:3] == ["3", "0", "-3"]
    assert keys == {"key": ["bad", "good"], "SOLVER.BASE_LR": ["0.0001", "0.0002"]}
    assert "Images that differ most" in page.texts
    assert len(page.sources) == 2 + 2  # the curves of both; the picture, as the one that differs most and as the worst


def test_what_is_missing(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is named on the page and in the terminal; the rest is there."""
    run = write_run(tmp_path / "run", None)
    (run / "metrics.json").unlink()
    assert tool.main([str(run)]) == 1
    page, errors = read(run / "report.html"), capsys.readouterr().err
    for text in (
        "there are no curves of run",
        "there are no results of run on report_squares",
        "--eval-only writes them",
    ):
        assert text in errors and text in " ".join(page.texts)
    assert page.sources == []
    other = write_run(tmp_path / "other", detections(dataset))
    (dataset.parent / "a.png").unlink()
    assert tool.main([str(other)]) == 1
    page = read(other / "report.html")
    assert len(page.sources) == 1 and page.rows(0)["AP"] == ["100.00", "100.00"]
    assert "there is no picture of" in capsys.readouterr().err
    assert tool.main([str(tmp_path)]) == 1
    assert "has no config.yaml: give the OUTPUT_DIR of a training run" in capsys.readouterr().err
    (run / "config.yaml").write_text((other / "config.yaml").read_text().replace("report_squares", "nothing_known"))
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text("[]")
    assert tool.main([str(run)]) == 1
    assert "there are no results of run on nothing_known: " in capsys.readouterr().err


def test_without_ground_truth(dataset: Path, tmp_path: Path) -> None:
    content = json.loads(dataset.read_text())
    run = write_run(tmp_path / "run", detections(dataset))
    dataset.write_text(json.dumps({**content, "annotations": []}))
    assert tool.main([str(run)]) == 0
    page = read(run / "report.html")
    assert "The data set has no ground truth." in page.texts and page.tables == []


def test_two_runs_of_one_name(dataset: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "run", detections(dataset)) for place in ("one", "two")]
    assert tool.main([str(runs[0]), "--compare", str(runs[1])]) == 0
    page = read(runs[0] / "report.html")
    assert page.rows(0)[""][0] == f"box, {runs[0]}" and "Both configs are the same." in page.texts
