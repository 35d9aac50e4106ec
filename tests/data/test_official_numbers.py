"""AP of ordinary scenes is that of pycocotools, to the last digit: checks and mends must not touch what is right."""

import contextlib
import copy
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querymask.common.evaluation.results import evaluate_results, register_annotations

HEIGHT, WIDTH = 120, 160


def outline(rng: np.random.Generator) -> list[float]:
    """A polygon of any size with rounded coordinates, cut at the border or slightly beyond."""
    width, height = rng.integers(4, 110, 2)
    x, y = rng.integers(-20, WIDTH - 5), rng.integers(-20, HEIGHT - 5)
    angles = np.sort(rng.random(rng.integers(3, 12))) * 2 * np.pi
    radii = rng.uniform(0.25, 0.5, len(angles))
    points = np.stack([x + width * (0.5 + radii * np.cos(angles)), y + height * (0.5 + radii * np.sin(angles))], 1)
    beyond = 0.5 * (rng.random() < 0.5)
    return points.clip(-beyond, [WIDTH + beyond, HEIGHT + beyond]).round(2).reshape(-1).tolist()


def encode(polygons: list[list[float]]) -> dict[str, Any]:
    return mask_util.merge(mask_util.frPyObjects(polygons, HEIGHT, WIDTH))


def scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotation file and results: crowds beside objects, parts, many ties of scores, gaps between ids."""
    rng = np.random.default_rng(seed)
    categories = [{"id": int(i), "name": f"class {i}"} for i in rng.choice(90, 6, replace=False) + 1]
    ids = [category["id"] for category in categories]
    numbers = rng.choice(10000, 8, replace=False).tolist()
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in numbers]
    annotations: list[dict[str, Any]] = []
    results = []
    for number in numbers:
        near = []
        for _ in range(rng.integers(0, 9)):
            polygons = [outline(rng) for _ in range(rng.choice([1, 1, 2]))]
            rle = encode(polygons)
            area = float(mask_util.area(rle))
            if area < 1:
                continue
            crowd = int(rng.random() < 0.15)
            xs, ys = (np.concatenate([polygon[i::2] for polygon in polygons]) for i in (0, 1))
            box = [xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)]
            if crowd:
                pixels = mask_util.decode(rle).reshape(-1, order="F")
                edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels]))).tolist()
                box = mask_util.toBbox(rle)
            common = {"id": int(rng.integers(1, 2**40)), "image_id": number, "category_id": int(rng.choice(ids))}
            annotations.append(
                {
                    **common,
                    "bbox": [round(float(v), 2) for v in box],
                    "area": area * rng.uniform(0.9, 1),
                    "iscrowd": crowd,
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, pixels.size]).tolist()}
                    if crowd
                    else polygons,
                }
            )
            near.append((common["category_id"], polygons))
        for category, polygons in [*near, *near, *[(int(rng.choice(ids)), [outline(rng)]) for _ in range(5)]]:
            rle = encode([(np.array(polygon) + rng.normal(0, 2)).tolist() for polygon in polygons])
            box = mask_util.toBbox(rle) + rng.normal(0, 1, 4)
            box[2:] = np.abs(box[2:])
            kind = category if rng.random() < 0.9 else int(rng.choice(ids))
            result = {"image_id": number, "category_id": kind, "score": round(float(rng.random()), 1)}
            mask = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
            results.append({**result, "bbox": box.tolist(), "segmentation": mask})
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_the_official_ones(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    content, results = scene(seed)
    truth, found = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(content))
    found.write_text(json.dumps(results))
    try:
        scores = evaluate_results(found, register_annotations(truth))
    finally:
        MetadataCatalog.pop(str(truth), None)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        for task in ("bbox", "segm"):
            official = copy.deepcopy(results)
            for result in official:
                result.pop("bbox" if task == "segm" else "segmentation")  # areas of detections are those of masks
            evaluation = COCOeval(coco, coco.loadRes(official), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats))
            for index, category in enumerate(sorted(coco.getCatIds())):
                precision = evaluation.eval["precision"][:, :, index, 0, -1]
                expected[f"AP-class {category}"] = precision[precision > -1].mean() if precision.max() > -1 else -1
            assert scores[task].keys() == expected.keys()
            for metric, value in expected.items():
                if value == -1:
                    assert math.isnan(scores[task][metric])
                else:
                    assert scores[task][metric] == pytest.approx(100 * value, abs=1e-10), metric
            assert 5 < scores[task]["AP"] < 95
