"""AP* and APB*: COCO's detections against the finer masks that LVIS has of the same images.

The protocol is PointRend's and EffSeg's (both evaluate models that were trained on COCO), with the rules of LVIS:

- Only images that are in both files count (they have the same ids), and only categories of COCO that LVIS has.
- Categories are matched by ``match_categories``.
- LVIS is annotated federatedly. In an image, a category counts if it has annotations there or is among the image's
  ``neg_category_ids``; detections of any other category are left out, as nobody looked for it. A detection without
  match of a category in ``not_exhaustive_category_ids`` is ignored rather than wrong.
- The detections of highest score of an image count, 300 unless another limit is given, over all categories. There are
  no crowds.

Models that were trained on LVIS itself are evaluated by the same rules, boxes too.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querymask.common.data.annotations.findings import show
from querymask.common.data.annotations.images import read_id
from querymask.common.evaluation.boundary import BoundaryEval
from querymask.common.evaluation.scores import evaluate, load_results
from querymask.common.evaluation.truth import index

MAX_DETECTIONS = 300
"""LVIS's limit of detections in an image."""

SYNSETS = {
    "bus": "bus.n.01",
    "car": "car.n.01",
    "cell phone": "cellular_telephone.n.01",
    "hair drier": "hand_blower.n.01",
    "keyboard": "computer_keyboard.n.01",
    "laptop": "laptop.n.01",
    "microwave": "microwave.n.02",
    "mouse": "mouse.n.04",
    "orange": "orange.n.01",
    "potted plant": "pot.n.04",  # LVIS's flowerpot: the nearest there is
    "remote": "remote_control.n.01",
    "skis": "ski.n.01",
    "sports ball": "ball.n.06",
    "tie": "necktie.n.01",
    "train": "train.n.01",
    "wine glass": "wineglass.n.01",
}
"""COCO's categories that LVIS calls otherwise, with their WordNet synsets there."""


def match_categories(
    categories: Sequence[Mapping[str, Any]], lvis_categories: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, int], list[str]]:
    """Which category of LVIS each of COCO's is.

    SYNSETS decides for the names in it. Any other name, with underscores for spaces, must be that of one LVIS category
    or else, of all of them, a synonym of one alone.

    Returns:
        {id in COCO: id in LVIS}, and the names of those that have none.
    """
    matched, missing = {}, []
    for category in categories:
        name = category["name"]
        key = name.replace(" ", "_")
        if name in SYNSETS:
            found = [c for c in lvis_categories if c.get("synset") == SYNSETS[name]]
        else:
            found = [c for c in lvis_categories if c["name"] == key]
            found = found or [c for c in lvis_categories if key in (c.get("synonyms") or ())]
        if len(found) == 1:
            matched[category["id"]] = found[0]["id"]
        else:
            missing.append(name)
    return matched, missing


def lvis_truth(coco: COCO, lvis: Mapping[str, Any]) -> tuple[COCO, list[str]]:
    """LVIS's annotations with the images and the category ids of COCO.

    Args:
        lvis: content of an annotation file of LVIS, any version.

    Returns:
        the ground truth, and names of COCO's categories that LVIS lacks.

    Raises:
        ValueError: the file is none of LVIS, or has no image or no category of COCO's, or no masks.
    """
    check_lvis(lvis, "LVIS's file")
    annotations = lvis.get("annotations") or []
    lacking = [annotation for annotation in annotations if "segmentation" not in annotation]
    if lacking or not annotations:
        raise ValueError(
            f"LVIS's file: {len(lacking)} of {len(annotations)} annotations are without segmentation, and AP* "
            "is that of masks. Give LVIS's annotations with masks"
        )
    categories = coco.loadCats(sorted(coco.getCatIds()))
    matched, missing = match_categories(categories, lvis["categories"])
    ids = {theirs: ours for ours, theirs in matched.items()}
    shared = set(coco.getImgIds())
    images = []
    for image in lvis["images"]:
        if image["id"] in shared:
            keys = ("neg_category_ids", "not_exhaustive_category_ids")
            images.append({**image, **{key: [ids[i] for i in image[key] if i in ids] for key in keys}})
    if not images or not ids:
        raise ValueError("LVIS's file and COCO's have no image or no category in common: are they of the same images?")
    kept = {image["id"] for image in images}
    truth = {
        "images": images,
        "categories": [category for category in categories if category["id"] in matched],
        "annotations": [
            {"iscrowd": 0, **annotation, "category_id": ids[annotation["category_id"]]}
            for annotation in annotations
            if annotation["image_id"] in kept and annotation["category_id"] in ids
        ],
    }
    return index(truth), missing


class FederatedEval(BoundaryEval):
    """Evaluation by LVIS's rules.

    Args:
        truth: whose images have ``neg_category_ids`` and ``not_exhaustive_category_ids``.
        task: "bbox", "segm", or "boundary": the smaller one of mask IoU and boundary IoU.
    """

    def __init__(self, truth: COCO, detections: COCO, task: str) -> None:
        super().__init__(truth, detections)
        self.boundary = task == "boundary"
        self.params.iouType = "bbox" if task == "bbox" else "segm"
        self._negative = {i: set(image["neg_category_ids"]) for i, image in truth.imgs.items()}
        self._not_exhaustive = {i: set(image["not_exhaustive_category_ids"]) for i, image in truth.imgs.items()}

    def _prepare(self) -> None:
        super()._prepare()
        present = {key for key, annotations in self._gts.items() if annotations}
        kept = {
            (image, category): detections
            for (image, category), detections in self._dts.items()
            if (image, category) in present or category in self._negative[image]
        }
        self._dts = defaultdict(list, kept)

    def computeIoU(self, imgId: int, catId: int) -> Any:
        return super().computeIoU(imgId, catId) if self.boundary else COCOeval.computeIoU(self, imgId, catId)

    def evaluateImg(self, imgId: int, catId: int, aRng: Sequence[float], maxDet: int) -> dict[str, Any] | None:
        result = super().evaluateImg(imgId, catId, aRng, maxDet)
        if result is not None and catId in self._not_exhaustive[imgId]:
            result["dtIgnore"] = result["dtIgnore"] | (result["dtMatches"] == 0)
        return result


def check_lvis(content: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless all images have LVIS's lists of categories, with ids of the categories' type.

    Ids that are none of the categories count for nothing, as in a file that was reduced to a few categories.

    Args:
        content: of a checked annotation file.
        source: the file or the data set, as messages call it.
    """
    images = content["images"]
    kinds = {type(category["id"]) for category in content["categories"]}
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if not images or not any(key in image for image in images):
            raise ValueError(f"{source}: the images have no {key}: give an annotation file of LVIS, with annotations")
        for image in images:
            ids = image.get(key)
            if not isinstance(ids, (list, tuple)) or not {type(read_id(i)) for i in ids} <= kinds:
                raise ValueError(
                    f"{source}: image with id {image['id']!r}: {key!r} is {show(ids)}. Give a list of category ids, "
                    "empty if there are none, of the type that they have in 'categories'"
                )


def best_of_images(results: Iterable[Mapping[str, Any]], max_detections: int) -> list[Mapping[str, Any]]:
    """The results of highest score of each image, over all categories."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [r for found in by_image.values() for r in sorted(found, key=lambda r: -r["score"])[:max_detections]]


def frequency_groups(truth: COCO) -> dict[str, list[int]]:
    """LVIS's rare, common and frequent classes by their place among the sorted ids; none where not all have one."""
    frequencies = [truth.cats[i].get("frequency") for i in sorted(truth.cats)]
    groups = {f"AP{letter}": [k for k, f in enumerate(frequencies) if f == letter] for letter in "rcf"}
    return groups if all(frequency in ("r", "c", "f") for frequency in frequencies) else {}


def evaluate_on_lvis(
    coco: COCO,
    lvis: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    max_detections: int = MAX_DETECTIONS,
) -> tuple[dict[str, dict[str, float]], list[str], int]:
    """AP* and APB* of results in COCO's format.

    Returns:
        scores by task ("segm_lvis", "boundary_lvis"), COCO's categories that LVIS lacks, the number of images.
    """
    truth, missing = lvis_truth(coco, lvis)
    if lacking := sum("segmentation" not in result for result in results):
        raise ValueError(
            f"{lacking} of {len(results)} results are without segmentation, and AP* is that of masks. Give results "
            "with masks, or leave LVIS's file out"
        )
    best = best_of_images((r for r in results if r["image_id"] in truth.imgs), max_detections)
    used = [result for result in best if result["category_id"] in truth.cats]
    names = [truth.cats[i]["name"] for i in sorted(truth.cats)]
    scores = {}
    for task in ("segm", "boundary"):
        evaluation = FederatedEval(truth, load_results(truth, used, masks=True), task)
        scores[f"{task}_lvis"] = evaluate(evaluation, names, max_detections)
    return scores, missing, len(truth.imgs)
