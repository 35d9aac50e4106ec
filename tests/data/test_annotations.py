"""Annotation files with faults that users have met: mended with a line, or refused by name; never another number."""

import copy
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, Change, each, runs, squares, write
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from querymask.common.data.annotations import AnnotationError, clean_entries, findings, read_coco, read_dataset
from querymask.common.data.mask_crops import MaskCrops
from querymask.common.data.segmentation import encode_segmentation
from querymask.common.data.training_set import read_training_set
from querymask.common.evaluation import InstanceEvaluator
from querymask.common.evaluation.results import evaluate_results, register_annotations


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package says, every time anew."""
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    monkeypatch.setattr(findings, "_SAID", set())
    caplog.set_level("INFO")
    return caplog


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., dict]:
    """Function that spoils a file, and gives the scores of perfect detections on it."""

    def run(change: Change = lambda c: None, change_results: Change = lambda r: None, **options: Any) -> dict:
        truth, results = write(tmp_path, change, change_results, **options)
        return evaluate_results(results, register_annotations(truth), boundary=True)

    yield run
    MetadataCatalog.pop(str(tmp_path / "truth.json"), None)


@pytest.fixture
def registered(tmp_path: Path) -> Callable[..., str]:
    """Function that spoils a file and registers it with its image."""
    names = []

    def run(change: Change = lambda c: None, count: int = 4) -> str:
        name = f"faulty_{len(names)}"
        names.append(name)
        truth, _ = write(tmp_path / name, change, count=count)
        register_coco_instances(name, {}, str(truth), str(truth.parent))
        return name

    yield run
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def one(**values: Any) -> Change:
    """A change of these keys in the second annotation."""
    return lambda content: content["annotations"][1].update(copy.deepcopy(values))


def drop(key: str) -> Change:
    return lambda content: [a.pop(key) for a in content["annotations"]]


def every(function: Callable[[dict], dict]) -> Change:
    return lambda content: [a.update(function(a)) for a in content["annotations"]]


def all_of(*changes: Change) -> Change:
    return lambda content: [change(content) for change in changes]


def as_runs(annotation: dict) -> dict:
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": runs(annotation["segmentation"][0])}}


def corners(annotation: dict) -> dict:
    x, y, w, h = annotation["bbox"]
    return {"bbox": [x, y, x + w, y + h]}


def short_runs(annotation: dict) -> dict:
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": runs(annotation["segmentation"][0])[:-1]}}


def zero_runs(annotation: dict) -> dict:
    first, second, *rest = runs(annotation["segmentation"][0])
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [first, 0, 0, second - 3, 0, 3, *rest, 0, 0]}}


def renamed(old: str, new: str) -> Change:
    return lambda content: [a.update({new: a.pop(old)}) for a in content["annotations"]]


ALL = {"bbox", "segm", "boundary"}
MENDED: dict[str, tuple[Change, set[str], str]] = {
    # fault: (change, tasks that score 100, what the log says)
    "nothing": (lambda c: None, ALL, ""),
    "ids from 0": (lambda c: [a.update(id=i) for i, a in enumerate(c["annotations"])], ALL, "numbered anew"),
    "ids missing": (drop("id"), ALL, "numbered anew"),
    "ids doubled": (each(id=7), ALL, "numbered anew"),
    "ids negative": (each(id=-1), ALL, "numbered anew"),
    "ids of texts": (lambda c: [a.update(id=str(a["id"])) for a in c["annotations"]], ALL, "numbered anew"),
    "ids null": (each(id=None), ALL, "numbered anew"),
    "an annotation twice": (lambda c: c["annotations"].append(c["annotations"][0]), ALL, "there twice"),
    "float ids": (each(image_id=1.0, category_id=1.0), ALL, ""),
    "iscrowd missing": (drop("iscrowd"), ALL, ""),
    "iscrowd null": (each(iscrowd=None), ALL, "'iscrowd'"),
    "iscrowd false": (each(iscrowd=False), ALL, ""),
    "iscrowd text": (each(iscrowd="0"), ALL, "'iscrowd'"),
    "iscrowd word": (each(iscrowd="False"), ALL, "'iscrowd'"),
    "isCrowd": (renamed("iscrowd", "isCrowd"), ALL, "'isCrowd'"),
    "one crowd": (one(iscrowd="true"), ALL, "'iscrowd'"),
    "one to ignore": (one(ignore=1), ALL, "to be ignored"),
    "ignore 0": (each(ignore=0), ALL, ""),
    "boxes missing": (drop("bbox"), ALL, "bbox missing: that of the mask"),
    "boxes null": (each(bbox=None), ALL, "bbox missing"),
    "boxes empty lists": (each(bbox=[]), ALL, "bbox no four numbers"),
    "boxes without extent": (each(bbox=[5, 5, 0, 0]), ALL, "bbox empty or outside"),
    "boxes outside": (each(bbox=[500, 500, 10, 10]), ALL, "bbox empty or outside"),
    "boxes not finite": (each(bbox=[math.nan, 1, 10, 10]), ALL, "bbox no four numbers"),
    "boxes as texts": (every(lambda a: {"bbox": [str(v) for v in a["bbox"]]}), ALL, ""),
    "boxes XYXY": (every(corners), ALL, r"\[x0, y0, x1, y1\] in place of"),
    "one box XYXY near the corner": (
        lambda c: c["annotations"][0].update(bbox=[1, 1, 11, 11]),
        ALL,
        r"\[x0, y0, x1, y1\] in place of",
    ),
    "boxes XYXY, no masks": (all_of(every(corners), drop("segmentation")), {"bbox"}, r"\[x0, y0, x1, y1\]"),
    "segmentation missing": (drop("segmentation"), {"bbox"}, "no mask AP"),
    "segmentation null": (each(segmentation=None), {"bbox"}, "no mask AP"),
    "segmentation []": (each(segmentation=[]), {"bbox"}, "no mask AP"),
    "segmentation [[]]": (each(segmentation=[[]]), {"bbox"}, "no mask AP"),
    "segmentation [], no area": (all_of(each(segmentation=[]), drop("area")), {"bbox"}, "no mask AP"),
    "one without segmentation": (one(segmentation=None), {"bbox"}, r"no mask AP \(1 of 4\)"),
    "too short": (one(segmentation=[[1, 2, 3, 4]]), ALL, "unusable.*three pairs"),
    "odd": (one(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ALL, "unusable.*has 7 numbers"),
    "not finite": (one(segmentation=[[1, 2, math.inf, 4, 5, 6]]), ALL, "unusable.*not finite"),
    "no numbers": (one(segmentation=[["a", 2, 3, 4, 5, 6]]), ALL, "unusable.*no numbers"),
    "far away": (one(segmentation=[[1e9, 2, 3, 4, 5, 6]]), ALL, "unusable.*far outside"),
    "outside": (one(segmentation=[[200, 200, 210, 200, 210, 210]]), ALL, "unusable.*no pixel"),
    "a line beside": (lambda c: c["annotations"][1]["segmentation"].append([1, 2, 3, 4]), ALL, "less than three"),
    "flat": (every(lambda a: {"segmentation": a["segmentation"][0]}), ALL, "not in a list of polygons"),
    "pairs": (
        every(lambda a: {"segmentation": np.reshape(a["segmentation"], (-1, 2)).tolist()}),
        ALL,
        r"\(x, y\) pairs",
    ),
    "listed pairs": (every(lambda a: {"segmentation": [np.reshape(a["segmentation"], (-1, 2)).tolist()]}), ALL, ""),
    "uncompressed": (every(as_runs), ALL, ""),
    "the last run missing": (every(short_runs), ALL, "the rest counts as background"),
    "runs of length 0": (every(zero_runs), ALL, ""),
    "no area": (drop("area"), ALL, ""),
    "a line": (
        lambda c: c["annotations"].append({**c["annotations"][0], "bbox": [5, 5, 9, 0], "segmentation": [[5, 5] * 3]}),
        ALL,
        "box and mask are a line, left out",
    ),
    "area as text": (each(area="big"), ALL, "'area'"),
    "area not finite": (each(area=math.nan), ALL, "'area'"),
    "name is a number": (lambda c: c["categories"][0].update(name=1), ALL, "no text"),
    "name missing": (lambda c: c["categories"][0].pop("name"), ALL, "without name"),
    "names doubled": (lambda c: c["categories"].append({"id": 2, "name": "cell"}), ALL, "several categories"),
    "a category twice": (lambda c: c["categories"].append(c["categories"][0]), ALL, "listed twice"),
    "an image twice": (lambda c: c["images"].append(c["images"][0]), ALL, "listed twice"),
    "size as text": (lambda c: c["images"][0].update(height="64", width="96"), ALL, "no integer"),
    "size in the masks": (all_of(every(as_runs), lambda c: c["images"][0].pop("height")), ALL, "taken from"),
}


@pytest.mark.parametrize("fault", MENDED)
def test_mended(evaluated: Callable[..., dict], log: pytest.LogCaptureFixture, fault: str, tmp_path: Path) -> None:
    change, tasks, said = MENDED[fault]
    scores = evaluated(change)
    assert {task: values["AP"] for task, values in scores.items()} == pytest.approx(dict.fromkeys(tasks, 100))
    lines = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert bool(lines) == bool(said)
    if said:
        log_text = "\n".join(lines)
        assert re.search(said, log_text), log_text
        assert str(tmp_path / "truth.json") in log_text


REFUSED: dict[str, tuple[Change, str]] = {
    # fault: (change, what the message says)
    "image_id of another type": (each(image_id="1"), "4 of 4 annotations.*image_id.*'1', the ids are numbers"),
    "image_id of no image": (one(image_id=9), r"1 of 4 annotations.*no image.*annotations\[1\].*9"),
    "image_id missing": (drop("image_id"), r"annotations\[0\]: 'image_id' is None"),
    "category_id missing": (drop("category_id"), r"annotations\[0\]: 'category_id' is None"),
    "category_id unknown": (one(category_id=5), r"annotations\[1\].*a.png.*'category_id' 5 is none"),
    "category_id of another type": (each(category_id="1"), "categories: 'category_id' is '1', the ids are numbers"),
    "iscrowd unknown": (one(iscrowd=2), r"annotations\[1\].*'iscrowd' is 2: Write|'iscrowd' is 2. Write"),
    "runs too long": (
        every(lambda a: {"segmentation": {"size": [64, 96], "counts": [640, 64, 9999]}}),
        "annotations.0.*a.png.*sum to 10703, the image has 6144",
    ),
    "odd runs too short": (
        each(segmentation={"size": [64, 96], "counts": [640, 64, 64]}),
        "sum to 768, the image has 6144 pixels",
    ),
    "runs negative": (each(segmentation={"size": [64, 96], "counts": [6200, -56]}), "none negative"),
    "runs no integers": (each(segmentation={"size": [64, 96], "counts": [0.5, 6143.5]}), "integers"),
    "runs of texts": (each(segmentation={"size": [64, 96], "counts": ["a"]}), "integers"),
    "counts missing": (each(segmentation={"size": [64, 96]}), "'counts'.*missing"),
    "counts damaged": (each(segmentation={"size": [64, 96], "counts": "no rle!"}), "compressed form"),
    "counts cut off": (each(segmentation={"size": [64, 96], "counts": "PP"}), "compressed form|sum to"),
    "size exchanged": (
        each(segmentation={"size": [96, 64], "counts": [640, 64, 5440]}),
        "annotations.0.*a.png.*height and width exchanged",
    ),
    "size of another image": (each(segmentation={"size": [10, 10], "counts": [50, 50]}), r"'size' is \[10, 10\]"),
    "segmentation a text": (each(segmentation="cell"), "type str.*Use a list"),
    "neither box nor mask": (all_of(drop("bbox"), drop("segmentation")), "'bbox' is missing, and there is no mask"),
    "empty box without mask": (
        all_of(each(bbox=[1, 1, 0, 0]), drop("segmentation")),
        r"'bbox' is \[1, 1, 0, 0\]: it has no extent.*no mask",
    ),
    "box of two numbers": (all_of(each(bbox=[1, 1]), drop("segmentation")), r"must be four numbers, \[x, y, width"),
    "box elsewhere": (one(bbox=[50, 50, 10, 10]), r"annotations\[1\].*different places"),
    "boxes of another size of the image": (
        every(lambda a: {"bbox": [a["bbox"][0], a["bbox"][1], 25, 25]}),
        "4 of 4 annotations with a mask: 'bbox' covers less than half",
    ),
    "runs that end early elsewhere": (
        one(segmentation={"size": [64, 96], "counts": [4000, 64]}),
        r"annotations\[1\].*sum to 4064, the image has 6144 pixels, and 'bbox' is not at the mask",
    ),
    "boxes XYXY, one undecided": (
        all_of(every(corners), drop("segmentation"), lambda c: c["annotations"][2].pop("area")),
        r"annotations\[2\].*may be corners, as that of annotations\[0\].* is",
    ),
    "box and mask outside": (
        one(bbox=[300, 300, 9, 9], segmentation=[[300, 300, 309, 300, 309, 309]]),
        "no extent within the image.*'segmentation' has no pixel",
    ),
    "boxes in parts of the image": (
        all_of(every(lambda a: {"bbox": [v / 96 for v in a["bbox"]]}), drop("segmentation")),
        "seem to be parts of its width and height",
    ),
    "boxes XYXY, nothing but the border shows it": (
        all_of(every(corners), drop("segmentation"), drop("area")),
        r"leaves the image.*fits as \[x0, y0, x1, y1\]",
    ),
    "no categories": (lambda c: c.pop("categories"), "'categories'.*None"),
    "categories empty": (lambda c: c.update(categories=[]), "'categories'"),
    "category without id": (lambda c: c["categories"][0].pop("id"), r"categories\[0\]: its 'id' is None"),
    "category ids doubled": (
        lambda c: c["categories"].append({"id": 1, "name": "dog"}),
        r"categories\[1\].*'cell' and of 'dog'",
    ),
    "no images": (lambda c: c.pop("images"), "'images'"),
    "images empty": (lambda c: c.update(images=[]), "no image of the file"),
    "image without id": (lambda c: c["images"][0].pop("id"), r"images\[0\], a.png: its 'id' is None"),
    "image ids of two types": (lambda c: c["images"].append({**c["images"][0], "id": "2"}), "numbers and texts"),
    "image ids doubled": (
        lambda c: c["images"].append({**c["images"][0], "file_name": "b.png"}),
        r"images\[1\], b.png: 'id' 1 is that of a.png",
    ),
    "size missing": (lambda c: c["images"][0].pop("width"), "a.png: height and width are 64 and None"),
    "size negative": (lambda c: c["images"][0].update(width=-96), "a.png: height and width are 64 and -96"),
    "annotation no object": (lambda c: c["annotations"].insert(0, 5), r"annotations\[0\]: it is 5"),
    "annotations no list": (lambda c: c.update(annotations={"a": 1}), "'annotations': it must be a list"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(evaluated: Callable[..., dict], fault: str, tmp_path: Path) -> None:
    change, message = REFUSED[fault]
    with pytest.raises(AnnotationError, match=message) as error:
        evaluated(change)
    assert str(error.value).startswith(str(tmp_path / "truth.json"))
    assert str(error.value).endswith(".")


def test_no_annotation_file(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    with pytest.raises(FileNotFoundError, match="truth.json: there is no such file"):
        read_coco(path)
    for text, message in (("<html>", "not JSON"), ("[]", "it is a list"), ("", "not JSON"), ("5", "it is a int")):
        path.write_text(text)
        with pytest.raises(AnnotationError, match=message):
            read_coco(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(squares()).encode())  # a byte order mark
    assert len(read_coco(path)["annotations"]) == 4


def test_one_object_whose_id_is_0(evaluated: Callable[..., dict]) -> None:
    assert evaluated(each(id=0), count=1)["segm"]["AP"] == pytest.approx(100)


def test_classes_of_one_name_are_kept_apart(evaluated: Callable[..., dict]) -> None:
    def change(content: dict) -> None:
        content["categories"].append({"id": 2, "name": "cell"})
        content["annotations"][0]["category_id"] = 2

    scores = evaluated(change)["segm"]
    assert scores["AP-cell (class 0)"] == pytest.approx(75)  # a wrong detection before three right ones
    assert scores["AP-cell (class 1)"] == 0


def test_file_is_read_for_training_as_for_evaluation(registered: Callable[..., str]) -> None:
    """What is left of a file is the same in both, and Detectron2's function for files is the checked one."""
    for change, _, _ in MENDED.values():
        name = registered(change)
        entries = DatasetCatalog.get(name)
        truth = read_coco(MetadataCatalog.get(name).json_file)
        trained = [a["bbox"] for e in entries for a in e["annotations"] if not a["iscrowd"]]
        assert trained == [a["bbox"] for a in truth["annotations"] if not a["iscrowd"]]
        assert MetadataCatalog.get(name).thing_classes == [c["name"] for c in truth["categories"]]
    with pytest.raises(AnnotationError, match="belong to none of the images"):
        DatasetCatalog.get(registered(each(image_id="1")))


def test_sizes_come_from_the_files(registered: Callable[..., str]) -> None:
    (entry,) = DatasetCatalog.get(registered(lambda c: [c["images"][0].pop(key) for key in ("height", "width")]))
    assert (entry["height"], entry["width"]) == (HEIGHT, WIDTH)


def test_training_needs_instances(registered: Callable[..., str], log: pytest.LogCaptureFixture) -> None:
    name = registered()
    assert len(read_training_set([name])) == len(read_training_set([name])) == 1
    assert log.text.count("Distribution of instances among all 1 categories, 4 in total") == 2
    for change, message in (
        (each(iscrowd=1), "4 of 4 annotations are crowd regions, which are not trained on. Set iscrowd to 0"),
        (lambda c: c.update(annotations=[]), "1 images have no annotations"),
        (lambda c: c.update(images=[], annotations=[]), "it has no images"),
        (
            each(segmentation=None),
            r"4 of 4 annotations, first in .*a.png.* have no segmentation.*MASK_BRANCH.NAME none",
        ),
        (one(segmentation=[]), "1 of 4 annotations"),
    ):
        with pytest.raises(AnnotationError, match=message):
            read_training_set([registered(change)])
    with pytest.raises(KeyError, match="there is no data set 'nowhere'"):
        read_training_set(["nowhere"])
    with pytest.raises(AnnotationError, match="DATALOADER.MIN_IMAGE_SIDE"):
        read_training_set([name], min_side=65)
    assert len(read_training_set([registered(drop("segmentation"))], masks=False)) == 1
    log.clear()
    read_training_set([registered(one(iscrowd=1))], num_queries={"MODEL.SOLQ.NUM_QUERIES": 2})
    assert "1 of 4 annotations are crowd regions" in log.text
    assert "1 training images have more objects (up to 3) than the model has queries, 2" in log.text
    assert "Raise MODEL.SOLQ.NUM_QUERIES (and TEST.DETECTIONS_PER_IMAGE" in log.text


def test_classes_without_instances_are_named(registered: Callable[..., str], log: pytest.LogCaptureFixture) -> None:
    read_training_set([registered(lambda c: c["categories"].append({"id": 7, "name": "dog"}))])
    assert "1 of 2 classes have no instances in faulty_0: dog" in log.text


def test_classes_of_the_metadata(tmp_path: Path) -> None:
    truth, _ = write(tmp_path, lambda c: c["categories"].append({"id": 7, "name": "dog"}))
    for names, message in ((["dog", "cell"], "make the two equal"), (["cell"], "is registered with thing_classes")):
        register_coco_instances("named", {"thing_classes": names}, str(truth), str(tmp_path))
        with pytest.raises(AnnotationError, match=message):
            DatasetCatalog.get("named")
        DatasetCatalog.remove("named")
        MetadataCatalog.remove("named")
    register_coco_instances("named", {"thing_classes": ["Zelle", "Hund"]}, str(truth), str(tmp_path))
    assert len(DatasetCatalog.get("named")) == 1 and MetadataCatalog.get("named").thing_classes == ["Zelle", "Hund"]
    DatasetCatalog.remove("named")
    MetadataCatalog.remove("named")


def mask() -> np.ndarray:
    array = np.zeros((HEIGHT, WIDTH), np.uint8)
    array[10:20, 4:14] = 255
    return array


def entry(**values: Any) -> dict[str, Any]:
    annotation = {"bbox": [4, 10, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": mask()}
    record = {"file_name": "a.png", "image_id": 1, "height": HEIGHT, "width": WIDTH}
    return {**record, "annotations": [{**annotation, **values}]}


FORMS = {
    "array": mask(),
    "bool array": mask() > 0,
    "polygon array": [np.array([4, 10, 14, 10, 14, 20, 4, 20.0])],
    "uncompressed": {"size": [HEIGHT, WIDTH], "counts": [4 * 64 + 10, *[10, 54] * 9, 10, 64 * 82 + 44]},
    "array of runs": {"size": np.array([HEIGHT, WIDTH]), "counts": np.array([266, *[10, 54] * 9, 10, 5292])},
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_registered_functions(form: str, tmp_path: Path) -> None:
    """They can be evaluated and learn a mask basis, in any form; the conversion is made anew when the data change."""
    data = [entry(segmentation=FORMS[form])]
    DatasetCatalog.register("made", lambda: data)
    MetadataCatalog.get("made").thing_classes = ["cell"]
    try:
        assert MaskCrops(["made"], 28)[0].float().mean() > 0.95
        assert isinstance(read_dataset("made")[0]["annotations"][0]["segmentation"], (dict, list))
        result = {"image_id": 1, "category_id": 0, "score": 0.9, "bbox": [4, 10, 10, 10]}
        for box, expected in (([4, 10, 10, 10], 100), ([4, 10, 10, 5], 10)):
            data[0] = entry(bbox=box, segmentation=FORMS[form])
            evaluator = InstanceEvaluator("made", str(tmp_path))
            rle = encode_segmentation(read_dataset("made")[0]["annotations"][0]["segmentation"], HEIGHT, WIDTH)
            evaluator.add_results([{**result, "segmentation": rle}])
            scores = evaluator.evaluate()
            (tmp_path / "results.json").write_text(json.dumps([{**result, "segmentation": rle}]))
            again = evaluate_results(tmp_path / "results.json", "made")
            assert again.keys() == scores.keys()
            assert all(again[task] == pytest.approx(scores[task], nan_ok=True) for task in scores)
            assert scores["bbox"]["AP"] == pytest.approx(expected, abs=0.1)
            assert scores["segm"]["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove("made")
        MetadataCatalog.remove("made")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bbox_mode": None}, "annotation 0 of a.png: 'bbox_mode' is None. Give BoxMode"),
        ({"bbox_mode": BoxMode.XYWHA_ABS}, "'bbox_mode' is"),
        ({"category_id": 3}, "'category_id' is 3, the classes are 0 to 0"),
        ({"category_id": "cell"}, "'category_id' is 'cell'"),
        ({"category_id": None}, "'category_id' is None"),
        ({"segmentation": np.ones((5, 4))}, r"mask has height and width \(5, 4\), the image \(64, 96\)"),
        ({"segmentation": "x"}, "type str"),
        ({"bbox": None, "segmentation": None}, "'bbox' is missing, and there is no mask"),
    ],
)
def test_dictionaries_are_refused(values: dict, message: str) -> None:
    with pytest.raises(AnnotationError, match=message) as error:
        clean_entries([entry(**values)], "data set made", ["cell"])
    assert str(error.value).startswith("data set made")


def test_dictionaries_are_mended() -> None:
    given = entry(bbox=np.array([4, 10, 14, 20.0]), bbox_mode=0, iscrowd="0")
    before = copy.deepcopy(given)
    (clean,) = clean_entries([given], "made", ["cell"])
    assert (
        np.array_equal(given["annotations"][0]["bbox"], before["annotations"][0]["bbox"])
        and "iscrowd" in given["annotations"][0]
    )
    (annotation,) = clean["annotations"]
    assert annotation["iscrowd"] == 0 and list(annotation["bbox"]) == [4, 10, 14, 20]
    (clean,) = clean_entries([entry(bbox=[4 / 96, 10 / 64, 10 / 96, 10 / 64], bbox_mode=BoxMode.XYWH_REL)], "made")
    assert clean["annotations"][0]["bbox"] == pytest.approx([4, 10, 10, 10])
    assert clean["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    without = entry()
    del without["image_id"]
    assert clean_entries([without], "made")[0]["image_id"] == 0
    for faulty, message in (
        ([entry(), entry()], "'image_id' 1 is that of another entry"),
        ([{**entry(), "file_name": None}], "'file_name' is None"),
        ([{**entry(), "height": None}], "height and width are None and 96"),
        ("no list", "Return a list"),
    ):
        with pytest.raises(AnnotationError, match=message):
            clean_entries(faulty, "made")
