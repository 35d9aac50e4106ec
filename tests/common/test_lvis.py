"""AP on LVIS's annotations beside the package lvis, its authors' code."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from querymask import get_cfg
from querymask.common.evaluation import InstanceEvaluator, build_evaluator
from querymask.common.evaluation.lvis import FederatedEval, evaluate_on_lvis

SIZE = (120, 160)
NAMES = ("bird", "cat", "dog", "horse")
COCO_IDS = dict(zip(NAMES, (16, 17, 18, 19)))
LVIS_IDS = dict(zip(NAMES, (9, 4, 2, 7)))  # another order
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def shape(rng: np.random.Generator, near: dict[str, Any] | None = None) -> dict[str, Any]:
    """An ellipse within a box; a disturbed copy of ``near`` if there is one."""
    if near is None:
        width, height = rng.integers(6, 110, 2)
        x, y = rng.integers(0, SIZE[1] - 5), rng.integers(0, SIZE[0] - 5)
    else:
        x, y, width, height = (int(v) for v in near["bbox"] + rng.integers(-4, 5, 4))
        width, height = max(width, 3), max(height, 3)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    inside = ((columns - x) / width - 0.5) ** 2 + ((rows - y) / height - 0.5) ** 2 <= 0.25
    encoded = mask_util.encode(np.asfortranarray(inside, dtype=np.uint8))
    box, area = mask_util.toBbox(encoded).tolist(), float(mask_util.area(encoded))
    return {"bbox": box, "area": area, "segmentation": {"size": list(SIZE), "counts": encoded["counts"].decode()}}


def scene(seed: int) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """COCO's and LVIS's annotation files of the same eight images, and results with COCO's categories."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for number in range(1, 9):
        for name in rng.choice(NAMES, rng.integers(0, 5)):
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": LVIS_IDS[name], **shape(rng)}
            if annotation["area"] > 0:
                annotations.append(annotation)
        present = {a["category_id"] for a in annotations if a["image_id"] == number}
        absent = [i for i in LVIS_IDS.values() if i not in present and rng.random() < 0.4]
        not_exhaustive = [i for i in present if rng.random() < 0.3]
        lists = {"neg_category_ids": absent, "not_exhaustive_category_ids": not_exhaustive}
        image = {"id": number, "height": SIZE[0], "width": SIZE[1], "file_name": f"{number}.jpg", "coco_url": ""}
        images.append({**image, **lists})
        truth = [a for a in annotations if a["image_id"] == number]
        ours = {theirs: COCO_IDS[name] for name, theirs in LVIS_IDS.items()}
        for near in [*truth, *truth, None, None, None]:
            category = ours[near["category_id"]] if near and rng.random() < 0.9 else rng.choice([*COCO_IDS.values()])
            found = shape(rng, near)
            if found["area"] > 0:
                score = round(float(rng.random()), 6)
                results.append({"image_id": number, "category_id": int(category), "score": score, **found})
    categories = [
        {"id": i, "name": name, "synset": f"{name}.n.01", "synonyms": [name], "frequency": "f", "image_count": 100}
        for name, i in LVIS_IDS.items()
    ]
    coco = {
        "images": images,
        "categories": [{"id": i, "name": name} for name, i in COCO_IDS.items()],
        "annotations": [],
    }
    return coco, {"images": images, "categories": categories, "annotations": annotations}, results


def official(
    lvis_file: Path, results: list[dict[str, Any]], iou_type: str = "segm", limit: int = 300
) -> dict[str, float]:
    """Scores of the package, in percent, of results with LVIS's categories."""
    from lvis import LVIS, LVISEval, LVISResults

    truth = LVIS(str(lvis_file))
    evaluation = LVISEval(truth, LVISResults(truth, copy.deepcopy(results), limit), iou_type)
    evaluation.run()
    return {key: 100 * value for key, value in evaluation.get_results().items()}


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # the package uses it, current NumPy has it no more


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_scored_as_by_the_package(seed: int, tmp_path: Path) -> None:
    content, lvis, results = scene(seed)
    (tmp_path / "lvis.json").write_text(json.dumps(lvis))
    theirs = {ours: LVIS_IDS[name] for name, ours in COCO_IDS.items()}
    as_lvis = [
        {key: value for key, value in result.items() if key != "bbox"} | {"category_id": theirs[result["category_id"]]}
        for result in results
    ]
    expected = official(tmp_path / "lvis.json", as_lvis)
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    scores, missing, count = evaluate_on_lvis(coco, lvis, results)
    assert (missing, count) == ([], 8)
    for metric in METRICS:
        if expected[metric] < 0:  # no object of this size
            assert np.isnan(scores["segm_lvis"][metric])
        else:
            assert scores["segm_lvis"][metric] == pytest.approx(expected[metric], abs=1e-9), metric
    assert 10 < expected["AP"] < 95 and scores["boundary_lvis"]["AP"] < scores["segm_lvis"]["AP"]


def test_rules_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lists of images, the scenes of the comparison score otherwise: it sees these rules."""
    content, lvis, results = scene(0)
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    before = evaluate_on_lvis(coco, lvis, results)[0]["segm_lvis"]["AP"]
    for method in ("_prepare", "evaluateImg"):
        with monkeypatch.context() as patch:
            patch.delattr(FederatedEval, method)
            assert abs(evaluate_on_lvis(coco, lvis, results)[0]["segm_lvis"]["AP"] - before) > 0.1, method


@pytest.fixture
def lvis_set(tmp_path: Path) -> Iterator[tuple[CfgNode, dict[str, Any], list[dict[str, Any]]]]:
    """Config with a data set of LVIS as its test set, the content of its file, and results with COCO's categories."""
    _, lvis, results = scene(1)
    for category, frequency in zip(lvis["categories"], "rcff"):
        category["frequency"] = frequency
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(lvis))
    names = sorted(NAMES, key=lambda name: LVIS_IDS[name])
    MetadataCatalog.get("test_lvis_v1_val").set(
        json_file=str(path),
        image_root=str(tmp_path),
        evaluator_type="lvis",
        thing_classes=names,
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(sorted(LVIS_IDS.values()))},
    )
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TEST, cfg.VIS_NUM_IMAGES = ("test_lvis_v1_val",), 0
    yield cfg, lvis, results
    MetadataCatalog.remove("test_lvis_v1_val")


def evaluate_set(cfg: CfgNode, lvis: dict[str, Any], results: list[dict[str, Any]], boxes: bool = True) -> dict:
    """Scores of results as Instances of a model, with or without boxes."""
    evaluator = build_evaluator(cfg, "test_lvis_v1_val")
    names = sorted(NAMES, key=lambda name: LVIS_IDS[name])
    classes = {ours: names.index(name) for name, ours in COCO_IDS.items()}
    for image in lvis["images"]:
        found = [result for result in results if result["image_id"] == image["id"]]
        instances = Instances(SIZE)
        if boxes:
            sides = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
            instances.pred_boxes = Boxes(torch.cat([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1))
        instances.scores = torch.tensor([result["score"] for result in found])
        instances.pred_classes = torch.tensor([classes[result["category_id"]] for result in found]).long()
        masks = [mask_util.decode(result["segmentation"]) for result in found]
        instances.pred_masks = torch.from_numpy(np.stack(masks)).bool() if masks else torch.zeros(0, *SIZE).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def with_lvis_ids(results: list[dict[str, Any]], dropped: str) -> list[dict[str, Any]]:
    theirs = {ours: LVIS_IDS[name] for name, ours in COCO_IDS.items()}
    return [
        {key: v for key, v in result.items() if key != dropped} | {"category_id": theirs[result["category_id"]]}
        for result in results
    ]


def test_a_model_is_scored_as_by_the_package(
    lvis_set: tuple[CfgNode, dict[str, Any], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Boxes and masks, classes by frequency, and the limit of detections, each as the package has it."""
    cfg, lvis, results = lvis_set
    cfg.TEST.BOUNDARY_AP = True
    for limit in (300, 3):
        cfg.TEST.DETECTIONS_PER_IMAGE = limit
        scores = evaluate_set(cfg, lvis, results)
        assert list(scores) == ["bbox", "segm", "boundary"]
        for task, dropped in (("bbox", "segmentation"), ("segm", "bbox")):
            kept = with_lvis_ids(results, dropped)
            expected = official(tmp_path / "lvis.json", kept, task, limit)
            for metric in (*METRICS, "APr", "APc", "APf"):
                value = expected[metric]
                assert scores[task][metric] == pytest.approx(value if value >= 0 else np.nan, abs=1e-6, nan_ok=True)
    assert (tmp_path / "inference" / "lvis_instances_results.json").is_file()


def test_a_model_without_boxes_is_scored_on_its_masks(
    lvis_set: tuple[CfgNode, dict[str, Any], list[dict[str, Any]]],
) -> None:
    cfg, lvis, results = lvis_set
    scores = evaluate_set(cfg, lvis, results, boxes=False)
    assert list(scores) == ["segm"]
    assert scores["segm"] == pytest.approx(evaluate_set(cfg, lvis, results)["segm"], nan_ok=True)


def test_a_file_that_is_none_of_lvis(lvis_set: tuple[CfgNode, dict[str, Any], list[dict[str, Any]]]) -> None:
    cfg, lvis, _ = lvis_set
    for image in lvis["images"]:
        del image["neg_category_ids"]
    Path(MetadataCatalog.get("test_lvis_v1_val").json_file).write_text(json.dumps(lvis))
    with pytest.raises(ValueError, match="the images have no neg_category_ids: give an annotation file of LVIS"):
        build_evaluator(cfg, "test_lvis_v1_val")


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
@pytest.mark.parametrize("value", [None, 5, ["9"], [[9]], [None], "9"])
def test_lists_of_categories_that_are_none_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    content, lvis, results = scene(1)
    lvis["images"][2][key] = value
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    with pytest.raises(ValueError, match=f"LVIS's file: image with id 3: '{key}' is"):
        evaluate_on_lvis(coco, lvis, results)
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(lvis))
    MetadataCatalog.get("lvis_faulty").set(json_file=str(path), evaluator_type="lvis")
    try:
        with pytest.raises(ValueError, match=f"lvis_faulty: image with id 3: '{key}' is"):
            InstanceEvaluator("lvis_faulty", None)
    finally:
        MetadataCatalog.remove("lvis_faulty")


def test_masks_are_needed_on_lvis() -> None:
    content, lvis, results = scene(1)
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    for result in results:
        del result["segmentation"]
    with pytest.raises(ValueError, match="results are without segmentation"):
        evaluate_on_lvis(coco, lvis, results)
    with pytest.raises(ValueError, match="LVIS's file: 0 of 0 annotations"):
        evaluate_on_lvis(coco, {key: lvis[key] for key in ("images", "categories")}, results)
    del lvis["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match="LVIS's file: 1 of"):
        evaluate_on_lvis(coco, lvis, results)
