"""Data sets in COCO's panoptic format: their reader, targets, folders, and those that are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import panoptic_files
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from panoptic_files import HEIGHT, IDS, WIDTH, segment_map, write_panoptic
from PIL import Image

from querymask.common.data.annotations import AnnotationError, read_dataset
from querymask.common.data.folders import register_folder
from querymask.common.data.mapper import InstanceMapper
from querymask.common.data.mask_crops import MaskCrops
from querymask.common.data.segment_maps import encode_segment_map, entry_segment_map, read_segment_map
from querymask.common.data.training_set import read_training_set
from querymask.common.evaluation.truth import dataset_truth

METADATA = {
    "thing_classes": ["dog", "cat", "sky", "grass"],
    "stuff_classes": ["dog", "cat", "sky", "grass"],
    "thing_dataset_id_to_contiguous_id": {3: 0, 5: 1},
    "stuff_dataset_id_to_contiguous_id": {2: 2, 9: 3},
}
CLASSES = [2, 0, 1, 3]  # of the segments

pytestmark = pytest.mark.usefixtures("catalog")


def register(path: Path, metadata: dict[str, Any] | None = None) -> str:
    """As Detectron2 registers COCO's, under a name of the file's folder."""
    name, pngs = f"panoptic of {path.parent}", path.with_suffix("")
    register_coco_panoptic(name, metadata or METADATA, str(path.parent / "val"), str(pngs), str(path))
    return name


def expected_masks(shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.stack([segment_map() == key for key in (IDS[0], IDS[1], IDS[3])])


def check_entries(entries: list[dict[str, Any]]) -> None:
    """The entries of the data set of ``panoptic_files``, and what training makes of them."""
    assert [entry["image_id"] for entry in entries] == [1, 2]
    for entry in entries:
        assert (entry["height"], entry["width"]) == (HEIGHT, WIDTH)
        assert [a["category_id"] for a in entry["annotations"]] == CLASSES
        assert [a["id"] for a in entry["segments_info"]] == list(IDS)
        assert [a["isthing"] for a in entry["segments_info"]] == [False, True, True, False]
        before = json.dumps(entry)
        item = InstanceMapper(True, augmentations=[], num_classes=4)(entry)
        assert json.dumps(entry) == before
        assert not {"annotations", "segments_info"} & set(item)
        instances = item["instances"]
        assert instances.gt_classes.tolist() == [2, 0, 3]  # not the crowd
        np.testing.assert_array_equal(instances.gt_masks.tensor.numpy(), expected_masks())
        np.testing.assert_array_equal(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)


def test_registered_by_detectron2(tmp_path: Path) -> None:
    check_entries(read_dataset(register(write_panoptic(tmp_path))))


def test_detectron2s_own_sets_are_read_by_the_same_reader() -> None:
    from detectron2.data.datasets import coco_panoptic

    from querymask.common.data.annotations import load_coco_panoptic_json

    assert "coco_2017_val_panoptic" in DatasetCatalog.list()
    assert coco_panoptic.load_coco_panoptic_json is load_coco_panoptic_json


def test_dictionaries_of_a_function(tmp_path: Path) -> None:
    """In Detectron2's form, as other code gives them: without sizes and annotations."""
    entries = read_dataset(register(write_panoptic(tmp_path)))
    keys = ("id", "category_id", "iscrowd", "bbox", "area")
    made = [
        {
            **{key: entry[key] for key in ("file_name", "image_id", "pan_seg_file_name")},
            "segments_info": [{key: s[key] for key in keys} for s in entry["segments_info"]],
        }
        for entry in entries
    ]
    DatasetCatalog.register("made", lambda: made)
    MetadataCatalog.get("made").set(evaluator_type="coco_panoptic_seg", **METADATA)
    check_entries(read_dataset("made"))
    made[1]["segments_info"][0]["category_id"] = 4
    with pytest.raises(
        AnnotationError, match=r"data set made: segment 0, id 70000, of .*b\.jpg: 'category_id' 4 is no"
    ):
        read_dataset("made")


def test_all_three_bytes_of_an_id(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]], np.int32)
    path = tmp_path / "ids.png"
    path.write_bytes(encode_segment_map(ids))
    pixels = np.asarray(Image.open(path)).astype(int)
    np.testing.assert_array_equal(pixels @ [1, 256, 65536], ids)  # as COCO's page has it
    np.testing.assert_array_equal(read_segment_map(path, (2, 3), [1, 255, 256, 65536, 2**24 - 1]), ids)


def test_training_set(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    name = register(write_panoptic(tmp_path))
    assert len(read_training_set([name])) == 2
    assert "2 of 8 annotations are crowd regions" in log.text
    assert re.search(r"dog +\| +2 \| cat +\| +0 \| sky +\| +2", log.text)


def stuff_twice(content: dict[str, Any]) -> None:
    content["annotations"][0]["segments_info"][1]["category_id"] = 2


def no_list(content: dict[str, Any]) -> None:
    del content["annotations"][1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (stuff_twice, "with several segments in an image.*first sky, 2 segments, in a.jpg"),
        (no_list, r"image without a list of segments, left out: 1 time\(s\), first b.jpg"),
    ],
)
def test_what_is_told(tmp_path: Path, log: pytest.LogCaptureFixture, change: Callable, line: str) -> None:
    read_dataset(register(write_panoptic(tmp_path, change=change)))
    assert re.search(line, log.text)


def change_segment(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][1]["segments_info"][1].update(values)


def change_annotation(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][1].update(values)


REFUSED = {
    "id 0": (change_segment(id=0), r"segment 1, id 0, of b.jpg \(image id 2\): it is no id of a segment\. Give every"),
    "id twice": (change_segment(id=IDS[0]), "segment 1, id 70000, of b.jpg .*its id is that of another"),
    "large id": (change_segment(id=2**24), "it is no id of a segment"),
    "category": (change_segment(category_id=4), "'category_id' 4 is none of the categories. Add the category, or"),
    "no box": (change_segment(bbox=None), "segment 1, id 300, of b.jpg .*'bbox' is missing"),
    "iscrowd": (change_segment(iscrowd=[1]), "'iscrowd' is "),
    "image": (change_annotation(image_id=3), r"annotations\[1\]: 'image_id' 3 is none of the file's images"),
    "image twice": (change_annotation(image_id=1), r"annotations\[1\]: 'image_id' 1 is that of another, too"),
    "segments": (change_annotation(segments_info=None), r"annotations\[1\]: 'segments_info' is None"),
    "no PNG": (change_annotation(file_name=None), "'file_name' is None. Give the name of the PNG file"),
    "missing PNG": (change_annotation(file_name="c.png"), r"1 of 2 PNG files of segments, the first .*c\.png, are not"),
    "isthing": (lambda content: content["categories"][0].pop("isthing"), "category 2, sky: 'isthing' is None. Write 1"),
    "instances": (lambda content: content.pop("annotations"), "there is no list of images with their segments"),
    "other classes": (
        lambda content: content["categories"].append({"id": 20, "name": "sea", "isthing": 0}),
        "category 20, sea, is none of those that the data set is registered with",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_annotations(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    path = write_panoptic(tmp_path, change=change)
    with pytest.raises(AnnotationError, match=f"^{re.escape(str(path))}: .*{message}"):
        read_dataset(register(path))


def wrong_size(path: Path) -> None:
    path.write_bytes(encode_segment_map(segment_map()[:-1]))


def stranger(path: Path) -> None:
    ids = segment_map()
    ids[0, 0] = 5
    path.write_bytes(encode_segment_map(ids))


def lost(path: Path) -> None:
    ids = segment_map()
    ids[ids == IDS[2]] = 0
    path.write_bytes(encode_segment_map(ids))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "there is no such PNG file of segments. Put it there"),
        (lambda path: path.write_bytes(b"PNG"), "cannot be decoded"),
        (wrong_size, r"it has 60x39 pixels \(width x height\), its image 60x40. Write the ids"),
        (stranger, "it has pixels of 1 ids that are none of its segments_info, the first 5. Ids are R "),
        (lost, "1 segments of its segments_info, the first with id 7, have no pixel in it. Take them out"),
    ],
    ids=["missing", "broken", "size", "stranger", "lost"],
)
def test_refused_png_files(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    """When an image is read, by training and by evaluation."""
    entry = read_dataset(register(write_panoptic(tmp_path)))[1]
    spoil(tmp_path / "panoptic_val" / "b.png")
    for read in (InstanceMapper(True, augmentations=[]), entry_segment_map):
        with pytest.raises(AnnotationError, match=rf"^{re.escape(str(tmp_path))}/panoptic_val/b\.png: .*{message}"):
            read(entry)


@pytest.mark.parametrize("places", [("", ""), ("annotations", "annotations"), ("annotations", "")])
def test_folders(tmp_path: Path, log: pytest.LogCaptureFixture, places: tuple[str, str]) -> None:
    """The JSON files here or in annotations/, the PNG files beside them or here."""
    own = tmp_path / "own"
    for part, names in (("train", ("a", "b")), ("val", ("c", "d"))):
        file = write_panoptic(own, part, names)
        for path, place in ((file, places[0]), (file.with_suffix(""), places[1])):
            (own / place).mkdir(exist_ok=True)
            path.rename(own / place / path.name)
    folder = register_folder(own, panoptic=True)
    assert folder.names == {"train": "own_train", "val": "own_val"} and folder.evaluated == "own_val"
    assert folder.classes == ["dog", "cat", "sky", "grass"] and folder.num_things == 2
    for name in folder.names.values():
        check_entries(read_dataset(name))
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "coco_panoptic_seg"
        assert {key: metadata.get(key) for key in METADATA} == METADATA
    assert "2 images in own_train, 2 images in own_val; 4 classes: dog, cat, sky, grass" in log.text


def test_folder_with_both_kinds(tmp_path: Path) -> None:
    """Instances are read by instance models, whatever panoptic files there are."""
    from data_folders import write_folder

    own = write_folder(tmp_path / "own", "coco")
    write_panoptic(own / "annotations", "train2017", ("train0", "train1"))
    assert register_folder(own).classes == ["apple", "pear"]


def test_refused_folders(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(
        AnnotationError, match=r"own: there are no panoptic annotations in it. Expected are panoptic_tr"
    ):
        register_folder(own, panoptic=True)
    write_panoptic(own, "val")
    with pytest.raises(AnnotationError, match=r"there is panoptic_val\.json, but nothing to train on"):
        register_folder(own, panoptic=True)
    path = write_panoptic(own, "train")
    path.with_suffix("").rename(own / "elsewhere")
    with pytest.raises(AnnotationError, match=rf"{re.escape(str(path))}: there is no folder .*with its PNG files"):
        register_folder(own, panoptic=True)
    (own / "elsewhere").rename(path.with_suffix(""))
    document = panoptic_files.content()
    document["categories"][0]["isthing"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match="category 2, sky, is a thing in one file of .* and stuff in another"):
        register_folder(own, panoptic=True).classes  # noqa: B018


def test_masks_for_a_coding(tmp_path: Path) -> None:
    """Cut out of the PNG files, crowds excepted."""
    crops = MaskCrops([register(write_panoptic(tmp_path))], 20)
    assert len(crops) == 6
    sky, dog = segment_map() == IDS[0], segment_map() == IDS[1]
    assert crops[0].float().mean() == pytest.approx(sky[:20].mean(), abs=0.05)
    np.testing.assert_array_equal(crops[1][:, ::2].numpy(), dog[10:30, 20:30])


def test_what_is_about_instances_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a panoptic data set, and this is about instances"):
        dataset_truth(register(write_panoptic(tmp_path)))
