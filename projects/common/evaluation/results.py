"""Result files: detections in COCO's format, of any code, evaluated without the model that made them."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic

from querymask.common.data.annotations import (
    EVALUATOR_TYPE,
    AnnotationError,
    class_metadata,
    clean_coco,
    clean_panoptic,
    is_panoptic,
    read_json,
)
from querymask.common.data.annotations.boxes import read_box
from querymask.common.data.annotations.findings import Findings, show
from querymask.common.data.annotations.images import read_id
from querymask.common.data.segmentation import clean_segmentation, encode_segmentation
from querymask.common.evaluation.class_file import compare_class_file
from querymask.common.evaluation.coco import InstanceEvaluator, Scores
from querymask.common.evaluation.panoptic import evaluate_panoptic_results
from querymask.common.evaluation.result_boxes import check_boxes
from querymask.common.evaluation.scores import MAX_DETECTIONS


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The results of a file, each with ids, a finite score, and a box or a mask.

    Raises:
        AnnotationError: it is not a list of COCO results; naming the first that is none.
    """
    content = read_json(path, "the coco_instances_results.json of an evaluation")
    findings = Findings(str(path))
    if not isinstance(content, list):
        findings.refuse(
            "the whole file",
            "not a list of results with image_id, category_id and score, as COCO defines them",
            "Give the coco_instances_results.json of an evaluation",
        )
    results = []
    for number, result in enumerate(content):
        where = f"result {number}"
        if not isinstance(result, Mapping) or not {"image_id", "category_id", "score"} <= set(result):
            findings.refuse(
                where,
                f"not a list of results with image_id, category_id and score, as COCO defines them, but {show(result)}",
                "Give the coco_instances_results.json of an evaluation",
            )
        score = _number(result["score"])
        if score is None:
            findings.refuse(where, f"'score' is {show(result['score'])}", "Give a finite number")
        clean = {**result, "score": score}
        for key in ("image_id", "category_id"):
            clean[key] = read_id(result[key])
            if clean[key] is None:
                findings.refuse(where, f"{key!r} is {show(result[key])}", "Give the id of the data set")
        if clean.get("bbox") is None:
            clean.pop("bbox", None)
        else:
            clean["bbox"] = read_box(clean["bbox"])
            if clean["bbox"] is None or min(clean["bbox"][2:]) < 0:
                findings.refuse(where, f"'bbox' is {show(result['bbox'])}", "Give [x, y, width, height]")
        if clean.get("segmentation") is None:
            clean.pop("segmentation", None)
        results.append(clean)
    for key, task in (("bbox", "boxes"), ("segmentation", "masks")):
        lacking = [i for i, result in enumerate(results) if key not in result]
        if 0 < len(lacking) < len(results):
            findings.refuse(
                f"result {lacking[0]}",
                f"it has no {key!r}, as {len(lacking)} of {len(results)} results, so that {task} cannot be evaluated",
                f"Give all results their {key!r}, or none",
            )
    if results and not {"bbox", "segmentation"} & set(results[0]):
        findings.refuse("result 0", "it has neither 'bbox' nor 'segmentation'", "Give detections of objects")
    findings.log()
    return results


def fit_results(
    results: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], name: str, source: str
) -> list[dict[str, Any]]:
    """Results with the ids of a data set and masks as compressed RLE of its images.

    Args:
        results: as ``read_results`` gives them.
        truth: checked content of the data set's annotation file.
        name: of the data set, for messages.
        source: file of the results, for messages.

    Raises:
        AnnotationError: images or categories that the data set does not have; masks that do not fit; boxes of another
            form.
    """
    findings = Findings(source)
    images = {image["id"]: image for image in truth["images"]}
    fitted = [dict(result) for result in results]
    for key, known in (("image_id", set(images)), ("category_id", {c["id"] for c in truth["categories"]})):
        _fit_ids(fitted, key, known, name, findings)
    farthest = -math.inf  # coordinate of polygons
    for number, result in enumerate(fitted):
        if "segmentation" not in result:
            continue
        image = images[result["image_id"]]
        where = f"result {number}, of image {image['id']!r}"
        size = image["height"], image["width"]
        try:
            mask, mended = clean_segmentation(result["segmentation"], *size)
        except ValueError as error:
            problem, _, remedy = str(error).rpartition(". ")
            findings.refuse(where, f"'segmentation': {problem}", remedy)
        if mask is None:
            findings.refuse(where, "'segmentation' is empty", "Give the mask, or leave the result out")
        if isinstance(mask, list):
            farthest = max(farthest, max(map(max, mask)))
            mask = encode_segmentation(mask, *size)
            findings.mend("polygons in place of run lengths, converted", where)
        elif isinstance(result["segmentation"].get("counts"), list):
            findings.mend("uncompressed run lengths, converted", where)
        for what in mended:
            findings.mend(what, where)
        result["segmentation"] = mask
    if -math.inf < farthest <= 1:
        findings.refuse(
            "the polygons",
            "all of them lie within the first pixel of the image: they seem to be parts of its width and height",
            "Multiply x by the image's width, y by its height",
        )
    check_boxes(fitted, images, findings)
    findings.log()
    return fitted


def _fit_ids(results: list[dict[str, Any]], key: str, known: set[int | str], name: str, findings: Findings) -> None:
    """Make ids those of the data set where only their type differs; refuse others."""
    by_text = {str(value): value for value in known}
    unknown = sorted({result[key] for result in results} - known, key=str)
    if unknown and all(str(value) in by_text for value in unknown):
        findings.mend(f"{key!r} of another type than the data set's ids, converted", show(unknown[0]))
        for result in results:
            result[key] = by_text[str(result[key])]
    elif unknown:
        shown = ", ".join(map(repr, unknown[:6])) + (", ..." if len(unknown) > 6 else "")
        raise AnnotationError(
            f"{findings.source}: {len(unknown)} values of {key} in the results are none of {name}: {shown}. Evaluate "
            "on the data set that the results were made on."
        )


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def register_annotations(path: str | os.PathLike) -> str:
    """Make a COCO annotation file known to evaluators, without its images; returns the name to call it by.

    A panoptic file has its PNG files in the folder beside it of the same name, without the ending.
    """
    name = str(path)
    raw = read_json(path, "an annotation file in COCO's format")
    if _has_segments(raw):
        return _register_panoptic(name, raw)
    categories = clean_coco(raw, name)["categories"]
    MetadataCatalog.get(name).set(
        json_file=name,
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={category["id"]: i for i, category in enumerate(categories)},
    )
    return name


def _has_segments(content: Any) -> bool:
    """Whether the images of an annotation file have lists of segments."""
    annotations = content.get("annotations") if isinstance(content, Mapping) else None
    return isinstance(annotations, list) and any("segments_info" in a for a in annotations if isinstance(a, Mapping))


def _register_panoptic(name: str, raw: Any) -> str:
    content = clean_panoptic(raw, name)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_panoptic(name, class_metadata(content["categories"]), "", os.path.splitext(name)[0], name)
    return name


def evaluate_results(
    path: str | Path, dataset_name: str, boundary: bool = False, max_detections: int = MAX_DETECTIONS
) -> Scores:
    """Scores of a result file on a data set of COCO's or LVIS's kind, or panoptic; nothing is written.

    Raises:
        AnnotationError: the file has no results of the data set.
        ValueError: the data set has another evaluation.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if is_panoptic(dataset_name):
        compare_class_file(path, dataset_name)
        return evaluate_panoptic_results(path, dataset_name, boundary)
    if kind not in ("coco", "lvis"):
        raise ValueError(
            f"{dataset_name} has evaluator_type {kind!r}: only data sets of type coco, lvis or {EVALUATOR_TYPE} take "
            "result files"
        )
    results = read_results(path)
    compare_class_file(path, dataset_name)
    evaluator = InstanceEvaluator(dataset_name, None, boundary, max_detections, distributed=False)
    evaluator.add_results(fit_results(results, evaluator.content, dataset_name, str(path)))
    return evaluator.evaluate()
