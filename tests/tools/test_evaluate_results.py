"""Result files without a model; LVIS's rules on made-up scenes whose AP follows by counting."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coco_files
import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES as LVIS_V0_5_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from pycocotools import mask as mask_util
from tool_loader import load_tool

from querymask.common.evaluation.lvis import match_categories

tool = load_tool("evaluate_results")
SIZE = (60, 80)
COCO = [{"id": 7, "name": "cat"}, {"id": 9, "name": "sports ball"}, {"id": 11, "name": "hot dog"}]
LVIS = [
    {"id": 1, "name": "cat", "synset": "cat.n.01", "synonyms": ["cat"]},
    {"id": 2, "name": "ball", "synset": "ball.n.06", "synonyms": ["ball"]},
    {"id": 3, "name": "zebra", "synset": "zebra.n.01", "synonyms": ["zebra"]},
]


def rle(x: int, y: int, side: int = 20) -> dict[str, Any]:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def annotation(number: int, image: int, category: int, x: int, y: int) -> dict[str, Any]:
    box = {"bbox": [x, y, 20, 20], "area": 400, "segmentation": rle(x, y)}
    return {"id": number, "image_id": image, "category_id": category, **box}


def result(image: int, category: int, score: float, x: int, y: int, side: int = 20) -> dict[str, Any]:
    shape = {"bbox": [x, y, side, side], "segmentation": rle(x, y, side)}
    return {"image_id": image, "category_id": category, "score": score, **shape}


def image(number: int, **keys: list[int]) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1], **keys}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, dict[str, float]]]:
    """Function (results, LVIS's lists of image 1, ...) that gives the scores; a cat is at (10, 10) in image 1."""

    def make(results: list[dict], negative: list[int], not_exhaustive: list[int]) -> dict[str, dict[str, float]]:
        coco = {"images": [image(1), image(2)], "categories": COCO, "annotations": [annotation(1, 1, 7, 10, 10)]}
        images = [
            image(1, neg_category_ids=negative, not_exhaustive_category_ids=not_exhaustive),
            image(99, neg_category_ids=[], not_exhaustive_category_ids=[]),
        ]
        truth = [annotation(1, 1, 1, 10, 10), annotation(2, 99, 1, 10, 10), annotation(3, 1, 3, 40, 10)]
        lvis = {"images": images, "categories": LVIS, "annotations": truth}
        for name, content in (("coco", coco), ("lvis", lvis), ("results", results)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        files = {name: str(tmp_path / f"{name}.json") for name in ("coco", "lvis", "results", "scores")}
        arguments = [files["results"], "--annotations", files["coco"], "--lvis", files["lvis"]]
        assert tool.main([*arguments, "--save", files["scores"]]) == 0
        return json.loads(Path(files["scores"]).read_text())

    return make


def test_all_tables(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    scores = run([result(1, 7, 0.9, 10, 10), result(2, 7, 0.1, 10, 10)], [], [])
    assert list(scores) == ["bbox", "segm", "boundary", "segm_lvis", "boundary_lvis"]
    assert all(values["AP"] == pytest.approx(100) for values in scores.values())
    text = capsys.readouterr().out
    assert "LVIS: 1 of 2 images. Categories that LVIS lacks: hot dog" in text
    assert "boundary*  100.00" in text


def test_images_that_lvis_lacks_do_not_count(run: Callable[..., dict]) -> None:
    scores = run([result(2, 7, 0.95, 10, 10), result(1, 7, 0.9, 10, 10)], [], [])
    assert scores["segm"]["AP"] == pytest.approx(50)  # a wrong one before the right one
    assert scores["segm_lvis"]["AP"] == pytest.approx(100)


def test_not_exhaustive_categories(run: Callable[..., dict]) -> None:
    results = [result(1, 7, 0.95, 50, 30), result(1, 7, 0.9, 10, 10)]
    assert run(results, [], [])["segm_lvis"]["AP"] == pytest.approx(50)
    assert run(results, [], [1])["segm_lvis"]["AP"] == pytest.approx(100)
    assert run(results, [], [2, 3])["segm_lvis"]["AP"] == pytest.approx(50)


def test_categories_nobody_looked_for() -> None:
    """Without annotation of a category, detections are wrong where it is known to be absent, else they do not count."""
    from pycocotools.coco import COCO as Coco

    from querymask.common.evaluation.lvis import FederatedEval, lvis_truth
    from querymask.common.evaluation.scores import evaluate, load_results

    truth, found = [annotation(1, 1, 1, 10, 10)], [result(1, 7, 0.9, 10, 10), result(2, 7, 0.95, 10, 10)]
    coco = Coco()
    coco.dataset = {"images": [image(1), image(2)], "categories": COCO, "annotations": []}
    coco.createIndex()
    for negative, expected in (([], 100), ([1], 50), ([2], 100)):
        images = [
            image(1, neg_category_ids=[], not_exhaustive_category_ids=[]),
            image(2, neg_category_ids=negative, not_exhaustive_category_ids=[]),
        ]
        federated, missing = lvis_truth(coco, {"images": images, "categories": LVIS, "annotations": truth})
        assert missing == ["hot dog"]
        for boundary in (False, True):
            evaluation = FederatedEval(federated, load_results(federated, found, masks=True), boundary)
            assert evaluate(evaluation)["AP"] == pytest.approx(expected)


def test_boundaries_count_with_lvis_too(run: Callable[..., dict]) -> None:
    scores = run([result(1, 7, 0.9, 10, 10, side=22)], [], [])
    # Masks: 400 / 484 = 0.83. Boundaries are 2 wide and share two sides: (40 + 36) / (144 + 160 - 76) = 0.33
    assert scores["segm_lvis"]["AP"] == pytest.approx(70)
    assert scores["boundary_lvis"]["AP"] == 0


def test_categories_of_coco_in_lvis() -> None:
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    matched, missing = match_categories(things, LVIS_CATEGORIES)
    assert missing == ["hot dog"]
    assert len(set(matched.values())) == len(matched) == 79
    names = {category["id"]: category["name"] for category in LVIS_CATEGORIES}
    pairs = {category["name"]: names[matched[category["id"]]] for category in things if category["id"] in matched}
    different = {ours: theirs for ours, theirs in pairs.items() if ours.replace(" ", "_") != theirs}
    assert different == {
        "bus": "bus_(vehicle)",
        "car": "car_(automobile)",
        "cell phone": "cellular_telephone",
        "couch": "sofa",
        "donut": "doughnut",
        "fire hydrant": "fireplug",
        "hair drier": "hair_dryer",
        "keyboard": "computer_keyboard",
        "laptop": "laptop_computer",
        "microwave": "microwave_oven",
        "mouse": "mouse_(computer_equipment)",
        "orange": "orange_(fruit)",
        "potted plant": "flowerpot",
        "remote": "remote_control",
        "skis": "ski",
        "sports ball": "ball",
        "tie": "necktie",
        "train": "train_(railroad_vehicle)",
        "tv": "television_set",
        "wine glass": "wineglass",
    }
    old, missing = match_categories(things, LVIS_V0_5_CATEGORIES)
    assert missing == ["hot dog", "oven"]
    names = {category["id"]: category["name"] for category in LVIS_V0_5_CATEGORIES}
    old_pairs = {category["name"]: names[old[category["id"]]] for category in things if category["id"] in old}
    del pairs["oven"]
    assert old_pairs == {**pairs, "person": "baby"}  # the first of its synonyms there, with child, man, woman, ...


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco, results = tmp_path / "coco.json", tmp_path / "results.json"
    content = {"images": [image(1)], "categories": COCO, "annotations": [annotation(1, 1, 7, 10, 10)]}
    coco.write_text(json.dumps({**content, "annotations": [{**content["annotations"][0], "iscrowd": 0}]}))
    for found, message in (
        ([result(5, 7, 0.9, 1, 1)], "1 values of image_id in the results are none of"),
        ([result(1, 8, 0.9, 1, 1)], "1 values of category_id in the results"),
        ({"annotations": []}, "not a list of results"),
    ):
        results.write_text(json.dumps(found))
        assert tool.main([str(results), "--annotations", str(coco)]) == 1
        assert message in capsys.readouterr().err
    results.write_text(json.dumps([result(1, 7, 0.9, 10, 10)]))
    assert tool.main([str(results), "--annotations", str(coco), "--lvis", str(coco)]) == 1
    assert "give an annotation file of LVIS" in capsys.readouterr().err
    assert tool.main([str(results), "--dataset", "unheard_of"]) == 1
    assert "there is no data set 'unheard_of'" in capsys.readouterr().err


def polygon_of(result: dict[str, Any]) -> list[list[float]]:
    x, y, w, h = result["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def runs_of(result: dict[str, Any]) -> dict[str, Any]:
    return {"size": [coco_files.HEIGHT, coco_files.WIDTH], "counts": coco_files.runs(polygon_of(result)[0])}


CONVERTED: dict[str, tuple[Callable[[list], Any], str]] = {
    "polygons": (lambda r: [x.update(segmentation=polygon_of(x)) for x in r], "polygons in place of run lengths"),
    "uncompressed": (lambda r: [x.update(segmentation=runs_of(x)) for x in r], "uncompressed run lengths"),
    "ids as texts": (lambda r: [x.update(image_id="1", category_id="1") for x in r], "'image_id' of another type"),
    "float ids": (lambda r: [x.update(image_id=1.0) for x in r], ""),
    "scores as texts": (lambda r: [x.update(score=str(x["score"])) for x in r], ""),
    "no boxes": (lambda r: [x.pop("bbox") for x in r], ""),
    "no masks": (lambda r: [x.pop("segmentation") for x in r], ""),
}
NOT_CONVERTED: dict[str, tuple[Callable[[list], Any], str]] = {
    "size exchanged": (
        lambda r: [x["segmentation"].update(size=[96, 64]) for x in r],
        "result 0, of image 1: 'segmentation': 'size' is [96, 64], height and width exchanged",
    ),
    "runs too short": (
        lambda r: r[2].update(segmentation={"size": [64, 96], "counts": [640, 64, 1]}),
        "result 2, of image 1: 'segmentation': the runs of 'counts' sum to 705, the image has 6144 pixels",
    ),
    "two points": (lambda r: r[1].update(segmentation=[[1, 2, 3, 4]]), "result 1, of image 1: 'segmentation': a polyg"),
    "empty mask": (lambda r: r[1].update(segmentation=[]), "result 1, of image 1: 'segmentation' is empty"),
    "some masks": (lambda r: r[1].pop("segmentation"), "result 1: it has no 'segmentation', as 1 of 4 results"),
    "nothing": (lambda r: [[x.pop(k) for k in ("bbox", "segmentation")] for x in r], "result 0: it has neither"),
    "score not finite": (lambda r: r[3].update(score=float("nan")), "result 3: 'score' is nan"),
    "score null": (lambda r: r[3].update(score=None), "result 3: 'score' is None"),
    "box of three": (
        lambda r: r[3].update(bbox=[1, 2, 3]),
        "result 3: 'bbox' is [1, 2, 3]. Give [x, y, width, height]",
    ),
    "box negative": (lambda r: r[3].update(bbox=[9, 9, -3, 3]), "result 3: 'bbox' is [9, 9, -3, 3]"),
    "category of another set": (
        lambda r: r[0].update(category_id=0),
        "1 values of category_id in the results are none",
    ),
    "a dictionary": (lambda r: r.insert(0, {"a": 1}), "result 0: not a list of results"),
}


def evaluate_changed(folder: Path, change: Callable[[list], Any], *options: str, count: int = 4) -> int:
    truth, results = coco_files.write(folder, change_results=change, count=count)
    return tool.main([str(results), "--annotations", str(truth), "--save", str(folder / "scores.json"), *options])


@pytest.mark.parametrize("kind", CONVERTED)
def test_results_of_other_code(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, said = CONVERTED[kind]
    assert evaluate_changed(tmp_path, change) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    tasks = {"no boxes": ["segm", "boundary"], "no masks": ["bbox"]}.get(kind, ["bbox", "segm", "boundary"])
    assert {task: values["AP"] for task, values in scores.items()} == pytest.approx(dict.fromkeys(tasks, 100))
    assert said in caplog.text and bool(said) == bool(caplog.records)


@pytest.mark.parametrize("kind", NOT_CONVERTED)
def test_results_that_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = NOT_CONVERTED[kind]
    assert evaluate_changed(tmp_path, change) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'results.json'}: ") and message in error
    assert error.count("\n") == 1


def test_limit_of_detections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """COCO's limit is 100, and any other can be chosen; a line tells where it counts."""
    scores = tmp_path / "scores.json"
    for options, expected, told in (((), 66.3, True), (("--max-detections", "150"), 100, False)):
        caplog.clear()
        assert evaluate_changed(tmp_path, lambda results: None, *options, count=150) == 0
        values = json.loads(scores.read_text())
        assert [values[task]["AP"] for task in ("bbox", "segm", "boundary")] == pytest.approx([expected] * 3, abs=0.1)
        assert ("1 images have more objects (up to 150) than the 100" in caplog.text) == told
    assert evaluate_changed(tmp_path, lambda results: None, "--max-detections", "1") == 0
    assert json.loads(scores.read_text())["segm"]["AP"] == pytest.approx(100 * 26 / 101)  # recall 0.25 of 101 points
