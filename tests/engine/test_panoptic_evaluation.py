"""Panoptic quality against its definition, its evaluator, result files, and what is refused of panoptic runs."""

import json
import math
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from detectron2.utils import comm
from panoptic_files import HEIGHT, IDS, WIDTH, segment_map, write_panoptic
from tool_loader import load_tool

from querymask import get_cfg
from querymask.common.data.annotations import AnnotationError, read_dataset
from querymask.common.engine.checks import check_panoptic
from querymask.common.engine.evaluating import check_evaluation_keys
from querymask.common.evaluation import build_evaluator, results_table
from querymask.common.evaluation.boundary import boundary_width
from querymask.common.evaluation.panoptic import ApiPanopticEvaluator, PanopticEvaluator, evaluate_panoptic_results
from querymask.common.evaluation.panoptic_quality import compare_segments, missed_segments, quality

tool = load_tool("evaluate_results")
NAMES = ["dog", "cat", "sky", "grass"]
NUM_THINGS = 2
Segments = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("catalog")


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A data set of two images."""
    path = write_panoptic(tmp_path / "data")
    metadata = {
        "thing_classes": NAMES,
        "stuff_classes": NAMES,
        "thing_dataset_id_to_contiguous_id": {3: 0, 5: 1},
        "stuff_dataset_id_to_contiguous_id": {2: 2, 9: 3},
    }
    images = str(path.parent / "val")
    register_coco_panoptic("panoptic_of_test", metadata, images, str(path.with_suffix("")), str(path))
    return "panoptic_of_test"


# ---- The definition ------------------------------------------------------------------------------------------------


def paint(
    rng: np.random.Generator, count: int, num_classes: int, shape: tuple[int, int]
) -> tuple[np.ndarray, Segments]:
    """Overlapping rectangles on void, some of an id above a byte, one crowd of a class at most."""
    ids, segments, crowded = np.zeros(shape, np.int32), [], set()
    for number in range(count):
        y, x = rng.integers(0, shape[0] - 4), rng.integers(0, shape[1] - 4)
        key = int(1 + number + 300 * (number % 3))
        ids[y : y + rng.integers(3, shape[0]), x : x + rng.integers(3, shape[1])] = key
        category = int(rng.integers(num_classes))
        crowd = category not in crowded and rng.random() < 0.2
        crowded |= {category} if crowd else set()
        segments.append({"id": key, "category_id": category, "iscrowd": int(crowd)})
    return ids, [segment for segment in segments if (ids == segment["id"]).any()]


def disturb(
    rng: np.random.Generator, ids: np.ndarray, segments: Segments, num_classes: int
) -> tuple[np.ndarray, Segments]:
    """What a model may find: moved by a pixel, with other ids, some classes wrong, some pixels void or of another."""
    found = np.zeros_like(ids)
    made = []
    for number, segment in enumerate(segments):
        key = 5000 - number
        found[np.roll(ids == segment["id"], rng.integers(-1, 2, 2), (0, 1)) & (found == 0)] = key
        category = segment["category_id"] if rng.random() < 0.8 else int(rng.integers(num_classes))
        made.append({"id": key, "category_id": category})
    found[: rng.integers(0, 4)] = 0
    made.append({"id": 9, "category_id": int(rng.integers(num_classes))})
    y, x = rng.integers(0, ids.shape[0] - 3), rng.integers(0, ids.shape[1] - 3)
    found[y : y + 5, x : x + 5] = 9
    return found, [segment for segment in made if (found == segment["id"]).any()]


def pixels(ids: np.ndarray, key: int) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(ids == key)}


def outline(mask: set[tuple[int, int]], shape: tuple[int, int]) -> set[tuple[int, int]]:
    """Pixels that see, in a square around them, one that is not in the mask."""
    d = boundary_width(*shape)
    window = [(a, b) for a in range(-d, d + 1) for b in range(-d, d + 1)]
    return {(y, x) for y, x in mask if any((y + a, x + b) not in mask for a, b in window)}


def by_definition(
    truth: np.ndarray, truth_segments: Segments, found: np.ndarray, found_segments: Segments, boundary: bool
) -> dict[int, tuple[int, int, int, Fraction]]:
    """TP, FP, FN and sum of the IoU by class, with sets of pixels and exact fractions."""
    void = pixels(truth, 0)
    counts: dict[int, list] = {}
    matched = set()
    for segment in truth_segments:
        count = counts.setdefault(segment["category_id"], [0, 0, 0, Fraction(0)])
        if segment["iscrowd"]:
            continue
        true, hits = pixels(truth, segment["id"]), 0
        for candidate in found_segments:
            if candidate["category_id"] != segment["category_id"]:
                continue
            mine = pixels(found, candidate["id"])
            iou = Fraction(len(true & mine), len(true | (mine - void)))
            if boundary:
                edges = outline(true, truth.shape), outline(mine, truth.shape)
                iou = min(iou, Fraction(len(edges[0] & edges[1]), len(edges[0] | (edges[1] - void))))
            if iou > Fraction(1, 2):
                hits += 1
                count[0] += 1
                count[3] += iou
                matched.add(candidate["id"])
        assert hits <= 1
        count[2] += 1 - hits
    for candidate in found_segments:
        count = counts.setdefault(candidate["category_id"], [0, 0, 0, Fraction(0)])
        mine, ignored = pixels(found, candidate["id"]), set(void)
        for segment in truth_segments:
            if segment["iscrowd"] and segment["category_id"] == candidate["category_id"]:
                ignored |= pixels(truth, segment["id"])
        count[1] += candidate["id"] not in matched and 2 * len(mine & ignored) <= len(mine)
    return {label: tuple(count) for label, count in counts.items()}


@pytest.mark.parametrize("boundary", [False, True], ids=["masks", "boundary"])
def test_quality_by_definition(boundary: bool) -> None:
    """On random maps with void and crowds: each count, and the means, to 1e-12."""
    rng = np.random.default_rng(0)
    num_classes, totals = 5, np.zeros((5, 4))
    expected = {label: [0, 0, 0, Fraction(0)] for label in range(num_classes)}
    crowds = voids = 0
    for _ in range(10 if boundary else 60):
        shape = (int(rng.integers(40, 60)), int(rng.integers(50, 80))) if boundary else (17, 23)
        truth, truth_segments = paint(rng, int(rng.integers(1, 9)), num_classes, shape)
        found, found_segments = disturb(rng, truth, truth_segments, num_classes)
        crowds += sum(segment["iscrowd"] for segment in truth_segments)
        voids += (truth == 0).any()
        counts = compare_segments(truth, truth_segments, found, found_segments, num_classes, boundary)
        slow = by_definition(truth, truth_segments, found, found_segments, boundary)
        for label in range(num_classes):
            row = slow.get(label, (0, 0, 0, Fraction(0)))
            assert counts[label].tolist() == pytest.approx([float(value) for value in row], abs=1e-12)
            expected[label] = [a + b for a, b in zip(expected[label], row)]
        totals += counts
    assert crowds > 2 and voids > 2 and all(sum(row[k] for row in expected.values()) > 2 for k in range(3))
    scores = quality(totals, [f"c{label}" for label in range(num_classes)], 3)
    for suffix, labels in (("", range(5)), ("_th", range(3)), ("_st", range(3, 5))):
        qualities = []
        for label in labels:
            tp, fp, fn, iou = expected[label]
            sq, rq = (iou / tp if tp else Fraction(0)), Fraction(2 * tp, 2 * tp + fp + fn)
            qualities.append((sq * rq, sq, rq))
            for metric, value in zip(("PQ", "SQ", "RQ"), qualities[-1]):
                assert scores[f"{metric}-c{label}"] == pytest.approx(100 * float(value), abs=1e-12)
        for metric, values in zip(("PQ", "SQ", "RQ"), zip(*qualities)):
            assert scores[metric + suffix] == pytest.approx(100 * float(sum(values) / len(values)), abs=1e-12)


def test_classes_that_do_not_occur() -> None:
    """They are in no mean; stuff of which nothing occurs has no number."""
    counts = np.zeros((4, 4))
    counts[0] = 1, 0, 1, 0.75
    scores = quality(counts, NAMES, NUM_THINGS)
    assert scores["PQ"] == scores["PQ_th"] == pytest.approx(100 * 0.75 * 1 / 1.5)
    assert all(math.isnan(scores[key]) for key in ("PQ_st", "SQ_st", "RQ_st", "PQ-cat", "SQ-cat", "PQ-sky"))
    np.testing.assert_array_equal(
        missed_segments([{"category_id": 1, "iscrowd": 0}, {"category_id": 2, "iscrowd": 1}], 4)[:, 2], [0, 1, 0, 0]
    )


# ---- The evaluator -------------------------------------------------------------------------------------------------


def perfect(shift: int = 0) -> tuple[torch.Tensor, Segments]:
    """A map as a model gives it, in which the three segments that are no crowd are right, but for a shift."""
    ids, segments = np.zeros((HEIGHT, WIDTH), np.int32), []
    for number, (key, label) in enumerate(((IDS[0], 2), (IDS[1], 0), (IDS[3], 3)), start=1):
        ids[np.roll(segment_map() == key, shift, 1)] = number
        segments.append({"id": number, "category_id": label, "isthing": label < NUM_THINGS, "score": 0.5})
    return torch.from_numpy(ids), segments


def run(evaluator: Any, entries: list[dict[str, Any]], shift: int = 0) -> dict[str, dict[str, float]]:
    evaluator.reset()
    for entry in entries:
        evaluator.process([entry], [{"panoptic_seg": perfect(shift)}])
    return evaluator.evaluate()


def same(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Something that scores are equal to."""
    return {task: pytest.approx(values, nan_ok=True) for task, values in scores.items()}


def test_evaluator(name: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    entries = read_dataset(name)
    scores = run(PanopticEvaluator(name, str(tmp_path), boundary=True), entries)
    assert list(scores) == ["panoptic_seg", "panoptic_boundary"] and "no panoptic map" not in log.text
    for values in scores.values():
        assert values["PQ"] == values["SQ_th"] == values["RQ_st"] == values["PQ-dog"] == 100
        assert math.isnan(values["PQ-cat"])  # of which there are crowds alone
    shifted = run(PanopticEvaluator(name, None, boundary=True), entries, 3)
    assert 0 < shifted["panoptic_boundary"]["PQ"] < shifted["panoptic_seg"]["PQ"] < 100


def test_images_without_a_map(name: str, log: pytest.LogCaptureFixture) -> None:
    """Their segments are missed."""
    scores = run(PanopticEvaluator(name, None), read_dataset(name)[:1])
    assert scores["panoptic_seg"]["RQ"] == pytest.approx(100 / 1.5) and scores["panoptic_seg"]["SQ"] == 100
    assert "no panoptic map of 1 of the 2 images: their segments count as missed" in log.text


def test_some_images_alone(name: str, log: pytest.LogCaptureFixture) -> None:
    evaluator, (entry, _) = PanopticEvaluator(name, None), read_dataset(name)
    run(evaluator, [entry])
    log.clear()
    assert evaluator.evaluate([entry["image_id"]])["panoptic_seg"]["RQ"] == 100
    assert "no panoptic map" not in log.text


def test_several_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a part of the images."""
    entries = read_dataset(name)
    whole = run(PanopticEvaluator(name, str(tmp_path / "whole")), entries, 2)
    parts = [PanopticEvaluator(name, str(tmp_path / "parts")) for _ in entries]
    for evaluator, entry in zip(parts, entries):
        evaluator.process([entry], [{"panoptic_seg": perfect(2)}])
    sent: list[Any] = []

    def gather(value: Any, dst: int) -> list[Any]:
        sent.append(value)
        return sent

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    monkeypatch.setattr(comm, "gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: len(sent) == 2)
    assert parts[1].evaluate() == {}
    assert parts[0].evaluate() == same(whole)
    for folder in ("whole", "parts"):
        assert evaluate_panoptic_results(tmp_path / folder / "predictions.json", name) == same(whole)


def test_refused_maps(name: str) -> None:
    (entry, _), (ids, segments) = read_dataset(name), perfect()
    evaluator = PanopticEvaluator(name, None)
    with pytest.raises(ValueError, match=r"a\.jpg: the panoptic map is 60x39 \(width x height\), the image 60x40"):
        evaluator.process([entry], [{"panoptic_seg": (ids[1:], segments)}])
    with pytest.raises(ValueError, match="the model predicts class 4, panoptic_of_test has classes 0 to 3"):
        evaluator.process([entry], [{"panoptic_seg": (ids, [{**segments[0], "category_id": 4}])}])
    with pytest.raises(
        ValueError, match=r"has pixels of the ids \[1, 2, 3\], and .* with the ids \[1, 2\]: they must be"
    ):
        evaluator.process([entry], [{"panoptic_seg": (ids, segments[:2])}])
    with pytest.raises(AnnotationError, match="image_id 9 of the results is none of its images"):
        evaluator.process([{**entry, "image_id": 9}], [{"panoptic_seg": (ids, segments)}])


# ---- Result files --------------------------------------------------------------------------------------------------


def test_result_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They give what the model gave, on the data set, on its annotation file and on a folder of own data."""
    expected = run(PanopticEvaluator(name, str(tmp_path), boundary=True), read_dataset(name), 2)
    results, saved = str(tmp_path / "predictions.json"), tmp_path / "scores.json"
    document = json.loads(Path(results).read_text())
    assert [s["category_id"] for s in document["annotations"][0]["segments_info"]] == [2, 3, 9]  # ids of the file
    data = tmp_path / "data"
    write_panoptic(data, "train", ("c", "d"))
    for truth in (["--dataset", name], ["--annotations", str(data / "panoptic_val.json")], ["--data", str(data)]):
        assert tool.main([results, *truth, "--save", str(saved)]) == 0
        found = json.loads(saved.read_text())
        assert found == same(expected)
    assert "boundary PQ" in capsys.readouterr().out
    assert tool.main([results, "--dataset", name, "--no-boundary"]) == 0
    assert "boundary" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main([results, "--dataset", name, "--lvis", "lvis.json"])


def change_result(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["annotations"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.clear(), "it has no 'annotations'"),
        (change_result(segments_info=5), r"annotations\[1\]: 'segments_info' is 5"),
        (change_result(file_name=None), "'image_id' or 'file_name' is missing"),
        (change_result(image_id=1), r"annotations\[1\]: 'image_id' 1 is that of another, too"),
        (change_result(image_id=7), "image_id 7 of the results is none of its images"),
        (change_result(segments_info=[{"id": 0, "category_id": 2}]), r"ids of its segments are \[0\]"),
        (change_result(segments_info=[{"id": 1, "category_id": 4}]), "'category_id' 4 is none of panoptic_of_test"),
        (change_result(segments_info=[{"id": 1, "category_id": 2}]), r"b\.png: it has pixels of 2 ids that are none"),
        (change_result(file_name="c.png"), r"c\.png: there is no such PNG file"),
    ],
)
def test_refused_result_files(name: str, tmp_path: Path, change: Callable[[dict], Any], message: str) -> None:
    run(PanopticEvaluator(name, str(tmp_path)), read_dataset(name))
    path = tmp_path / "predictions.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=message):
        evaluate_panoptic_results(path, name)


# ---- Detectron2's evaluator ----------------------------------------------------------------------------------------


def install_panopticapi(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of this name, whose quality is that of the definition above."""

    def id2rgb(ids: np.ndarray) -> np.ndarray:
        return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)

    def pq_compute(truth_file: str, found_file: str, gt_folder: str, pred_folder: str) -> dict[str, dict[str, float]]:
        from PIL import Image

        documents = [json.loads(Path(file).read_text()) for file in (truth_file, found_file)]
        total: dict[int, list] = {}
        for annotations in zip(*(document["annotations"] for document in documents)):
            assert annotations[0]["image_id"] == annotations[1]["image_id"]
            maps = [
                np.asarray(Image.open(Path(folder, annotation["file_name"]))).astype(int) @ [1, 256, 65536]
                for folder, annotation in zip((gt_folder, pred_folder), annotations)
            ]
            segments = [annotation["segments_info"] for annotation in annotations]
            for label, row in by_definition(maps[0], segments[0], maps[1], segments[1], False).items():
                total[label] = [a + b for a, b in zip(total.get(label, (0, 0, 0, 0)), row)]
        result = {}
        things = {category["id"]: category["isthing"] for category in documents[0]["categories"]}
        for group, wanted in (("All", (0, 1)), ("Things", (1,)), ("Stuff", (0,))):
            rows = [row for label, row in total.items() if things[label] in wanted and any(row[:3])]
            sq = [float(iou / tp) if tp else 0.0 for tp, _, _, iou in rows]
            rq = [tp / (tp + fp / 2 + fn / 2) for tp, fp, fn, _ in rows]
            values = {"pq": np.mean(np.multiply(sq, rq)), "sq": np.mean(sq), "rq": np.mean(rq), "n": len(rows)}
            result[group] = values
        return result

    package = types.ModuleType("panopticapi")
    utils, evaluation = types.ModuleType("panopticapi.utils"), types.ModuleType("panopticapi.evaluation")
    package.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("panopticapi", None)
    utils.id2rgb, evaluation.pq_compute = id2rgb, pq_compute
    for module in (package, utils, evaluation):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_detectron2s_evaluator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used where panopticapi is installed, gives the same numbers, and result files of the same form."""
    cfg = get_cfg()
    cfg.MODEL.PANOPTIC.ENABLED, cfg.VIS_NUM_IMAGES, cfg.OUTPUT_DIR = True, 0, str(tmp_path)
    own = build_evaluator(cfg, name)
    assert type(own) is PanopticEvaluator
    expected = run(own, read_dataset(name), 2)
    install_panopticapi(monkeypatch)
    evaluator = build_evaluator(cfg, name)
    assert type(evaluator) is ApiPanopticEvaluator
    cfg.OUTPUT_DIR = str(tmp_path / "other")
    evaluator = build_evaluator(cfg, name)
    scores = run(evaluator, read_dataset(name), 2)
    assert scores["panoptic_seg"] == pytest.approx(
        {key: expected["panoptic_seg"][key] for key in scores["panoptic_seg"]}
    )
    assert "things" in results_table(scores)
    files = tmp_path / "other" / "inference" / "predictions.json"
    assert evaluate_panoptic_results(files, name) == same(expected)
    cfg.TEST.BOUNDARY_AP = True
    assert type(build_evaluator(cfg, name)) is PanopticEvaluator
    cfg.TEST.BOUNDARY_AP = False
    del MetadataCatalog.get(name).panoptic_json  # as of a part of a folder
    assert type(build_evaluator(cfg, name)) is PanopticEvaluator


# ---- Runs ----------------------------------------------------------------------------------------------------------


def test_table() -> None:
    scores = {f"{metric}{suffix}": 10.0 for suffix in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")}
    scores |= {"PQ_th": 12.345, "PQ-sea-lion": 1.0, "SQ-sea-lion": 2.0, "RQ-sea-lion": float("nan")}
    assert results_table({"panoptic_seg": scores}) == "\n".join(
        [
            "           PQ     SQ     RQ",
            "all     10.00  10.00  10.00",
            "things  12.35  10.00  10.00",
            "stuff   10.00  10.00  10.00",
            "",
            "class       PQ    SQ   RQ",
            "sea-lion  1.00  2.00  nan",
        ]
    )


def test_model_and_data_set_are_panoptic_alike(name: str) -> None:
    cfg = get_cfg()
    check_panoptic(cfg, ["coco_2017_val"])
    with pytest.raises(
        ValueError, match="ENABLED is False, but the data set panoptic_of_test is panoptic: set .* True"
    ):
        check_panoptic(cfg, [name])
    cfg.MODEL.PANOPTIC.ENABLED = True
    check_panoptic(cfg, ["coco_2017_val_panoptic", "coco_2017_train_panoptic"])
    with pytest.raises(
        ValueError, match="ENABLED is True, but the data set coco_2017_val is not panoptic: set .* False"
    ):
        check_panoptic(cfg, ["coco_2017_val"])
    with pytest.raises(ValueError, match="NUM_THINGS is 80, but 2 classes of the data set panoptic_of_test are things"):
        check_panoptic(cfg, [name])
    with pytest.raises(ValueError, match="coco_2017_val_panoptic_separated: .*Use the data set without _separated"):
        check_panoptic(cfg, ["coco_2017_val_panoptic_separated"])
    cfg.MODEL.PANOPTIC.NUM_THINGS = NUM_THINGS
    check_panoptic(cfg, [name])
    cfg.INPUT.COPY_PASTE = 0.5
    with pytest.raises(ValueError, match="INPUT.COPY_PASTE is for instances"):
        check_panoptic(cfg, [name])


@pytest.mark.parametrize("metric", ["panoptic_seg/PQ", "panoptic_boundary/RQ_st", "a set/panoptic_seg/SQ-sky"])
def test_best_metric(metric: str) -> None:
    cfg = get_cfg()
    cfg.TEST.BEST_METRIC = metric
    check_evaluation_keys(cfg)
    for wrong in ("panoptic_seg/AP", "segm/PQ", "panoptic/PQ"):
        cfg.TEST.BEST_METRIC = wrong
        with pytest.raises(ValueError, match="panoptic_seg/PQ"):
            check_evaluation_keys(cfg)
