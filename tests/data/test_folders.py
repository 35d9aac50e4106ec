"""Folders of own data: their layouts, parts and classes, and those that cannot be used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_folders import CATEGORIES, LAYOUTS, content, save_photo, write_folder, write_part
from detectron2.data import DatasetCatalog, MetadataCatalog

from querymask.common.data.annotations import AnnotationError, read_dataset
from querymask.common.data.folders import choose_kept_out, register_folder
from querymask.common.data.mapper import InstanceMapper
from querymask.common.evaluation.truth import category_ids, dataset_truth

pytestmark = pytest.mark.usefixtures("catalog")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str, log: pytest.LogCaptureFixture) -> None:
    folder = register_folder(write_folder(tmp_path / "fruit", layout))
    assert folder.names == {"train": "fruit_train", "val": "fruit_val"} and folder.evaluated == "fruit_val"
    assert not log.text  # nothing is read yet
    assert folder.classes == ["apple", "pear"]
    for name, count in (("fruit_train", 4), ("fruit_val", 2)):
        entries = read_dataset(name)
        assert [[a["category_id"] for a in entry["annotations"]] for entry in entries] == [[1, 0]] * count
        assert MetadataCatalog.get(name).thing_classes == ["apple", "pear"]
        mapper = InstanceMapper(True, augmentations=[], num_classes=2)
        masks = [mapper(entry)["instances"].gt_masks.tensor.flatten(1).sum(1).tolist() for entry in entries]
        assert masks == [[400, 300]] * count
        truth = dataset_truth(name)
        assert [image["id"] for image in truth["images"]] == list(range(1, count + 1))
        assert [a["category_id"] for a in truth["annotations"]] == [10, 3] * count
        assert [a["area"] for a in truth["annotations"]] == [400, 300] * count
        assert category_ids(name, truth) == {3: 0, 10: 1}
    assert "4 images in fruit_train, 2 images in fruit_val; 2 classes: apple, pear" in log.text


def test_name_of_another_data_set(tmp_path: Path) -> None:
    """A folder named like a data set that is known already is the one that is meant."""
    register_folder(write_folder(tmp_path / "balloon", "plain"))
    assert len(read_dataset("balloon_train")) == 4 and MetadataCatalog.get("balloon_train").get("json_file") is None


@pytest.mark.parametrize("place", ["", "images", "fruit"])
def test_one_file_is_split_by_hashes(tmp_path: Path, place: str, log: pytest.LogCaptureFixture) -> None:
    names = [f"{i}.png" for i in range(10)]
    for name in names:
        save_photo(tmp_path / "own" / place / name)
    (tmp_path / "own" / "fruit.json").write_text(json.dumps(content(names)))
    register_folder(tmp_path / "own")
    parts = {part: [Path(e["file_name"]).name for e in read_dataset(f"own_{part}")] for part in ("train", "val")}
    assert sorted(sum(parts.values(), [])) == names and parts["val"] == ["0.png", "6.png"]  # least by sha256sum
    assert len(dataset_truth("own_val")["annotations"]) == 4
    assert "2 of 10 images, one of 5, chosen by the SHA-256 hashes of the file names" in log.text


def test_split_counts_folders_as_part_of_the_name(tmp_path: Path) -> None:
    names = [f"camera{i}/1.png" for i in range(10)]
    for name in names:
        save_photo(tmp_path / "own" / name)
    (tmp_path / "own" / "all.json").write_text(json.dumps(content(names)))
    register_folder(tmp_path / "own")
    assert [len(read_dataset(f"own_{part}")) for part in ("train", "val")] == [8, 2]


def test_split_depends_on_names_alone() -> None:
    names = [f"{i}.jpg" for i in range(50)]
    assert choose_kept_out(names) == choose_kept_out(names[::-1]) and len(choose_kept_out(names)) == 10
    assert len(choose_kept_out(["a.jpg", "b.jpg"])) == 1 and not choose_kept_out(["a.jpg"])
    versions = [f"{i}_jpg.rf.{k}.jpg" for i in range(10) for k in "abc"]
    kept_out = choose_kept_out(versions)
    assert len(kept_out) == 6 and len({name[0] for name in kept_out}) == 2


def test_training_part_alone_is_split(tmp_path: Path) -> None:
    write_part(tmp_path / "own", "roboflow", "train", 5)
    register_folder(tmp_path / "own")
    assert [len(read_dataset(f"own_{part}")) for part in ("train", "val")] == [4, 1]


def test_test_part(tmp_path: Path) -> None:
    """It is a data set of its own, and the one to evaluate on where there is no other."""
    write_part(tmp_path / "own", "roboflow", "train", 5)
    write_part(tmp_path / "own", "roboflow", "test", 3)
    folder = register_folder(tmp_path / "own")
    assert folder.names == {"train": "own_train", "test": "own_test"} and folder.evaluated == "own_test"
    write_part(tmp_path / "own", "roboflow", "val", 2)
    folder = register_folder(tmp_path / "own")
    assert [len(read_dataset(name)) for name in folder.names.values()] == [5, 2, 3] and folder.evaluated == "own_val"


def test_group_of_roboflow(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """The category that stands for the project is no class, unless objects are in it."""
    group = ({"id": 0, "name": "fruits", "supercategory": "none"},)
    members = tuple({**category, "supercategory": "fruits"} for category in CATEGORIES)
    for name, categories in (("with", group + members), ("without", members), ("used", group + members[:1])):
        for part in ("train", "val"):
            write_part(tmp_path / name, "roboflow", part, 3, categories=categories)
    folder = register_folder(tmp_path / "with")
    assert folder.classes == ["apple", "pear"] and "category 0, 'fruits', stands for all others" in log.text
    assert dataset_truth("with_val")["categories"] == [{"id": 3, "name": "apple"}, {"id": 10, "name": "pear"}]
    assert register_folder(tmp_path / "without").classes == ["apple", "pear"]
    assert register_folder(tmp_path / "used").classes == ["fruits", "apple"]


def test_classes_of_one_part(tmp_path: Path) -> None:
    """A part may lack a class; one that calls it by another number is refused."""
    write_part(tmp_path / "own", "plain", "train", 3)
    write_part(tmp_path / "own", "plain", "val", 2, categories=({"id": 10, "name": "pear"}, {"id": 12, "name": "fig"}))
    assert register_folder(tmp_path / "own").classes == ["apple", "pear", "fig"]
    assert read_dataset("own_val")[0]["annotations"][0]["category_id"] == 2
    write_part(tmp_path / "own", "plain", "val", 2, categories=({"id": 3, "name": "pear"}, {"id": 10, "name": "apple"}))
    with pytest.raises(
        AnnotationError, match=r"val\.json: category 3 is 'pear', in other files .* 'apple'\. Give a cl"
    ):
        register_folder(tmp_path / "own").classes  # noqa: B018


def test_part_without_annotations(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Said where there are none; where the key lacks, they are unknown, and there is nothing to evaluate."""
    write_part(tmp_path / "own", "plain", "train", 3)
    write_part(tmp_path / "own", "plain", "val", 2, annotations=[])
    register_folder(tmp_path / "own")
    assert [entry["annotations"] for entry in read_dataset("own_val")] == [[], []]
    assert "val.json: its 2 images have no annotations" in log.text
    write_part(tmp_path / "own", "plain", "val", 2, annotations=None)
    register_folder(tmp_path / "own")
    assert "annotations" not in dataset_truth("own_val")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    own = tmp_path / "own"
    with pytest.raises(FileNotFoundError, match="own: there is no such folder"):
        register_folder(own)
    save_photo(own / "images" / "a.png")
    with pytest.raises(AnnotationError, match=r"own: there are no annotations in it\..*tools/make_coco\.py"):
        register_folder(own)
    write_part(own, "roboflow", "val", 2)
    with pytest.raises(AnnotationError, match=r"there is valid/_annotations\.coco\.json, but nothing to train on"):
        register_folder(own)
    write_folder(own, "plain")
    message = r"in 2 layouts: train\.json, val\.json, valid/_annotations\.coco\.json\. Keep those of one"
    with pytest.raises(AnnotationError, match=message):
        register_folder(own)
    shutil.rmtree(own)
    for name in ("a.json", "b.json"):
        own.mkdir(exist_ok=True)
        (own / name).write_text("{}")
    with pytest.raises(AnnotationError, match=r"it has a\.json, b\.json, and no names that say which are to train on"):
        register_folder(own)
    shutil.rmtree(own)
    for year in ("2014", "2017"):
        write_part(own, "coco", "train", 1).rename(own / "annotations" / f"instances_train{year}.json")
    with pytest.raises(AnnotationError, match=r"instances_train2014\.json, .*2017\.json are several files of one part"):
        register_folder(own)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(AnnotationError, match=message):
            DatasetCatalog.get(register_folder(tmp_path / "own").names["train"])

    write_folder(tmp_path / "own", "coco")
    images = tmp_path / "own" / "train2017"
    (images / "train2.png").unlink()
    refused(
        r"instances_train2017\.json: 1 of 4 images, the first train2\.png, are not in .*train2017\. Put them there, or"
    )
    images.rename(tmp_path / "elsewhere")
    refused(r"its images, the first train0\.png, are not in .*own/train2017, .*own/images/train2017")
    file = write_part(tmp_path / "own", "coco", "train", 4, images=[], annotations=[])
    refused("it has no images")
    file.write_text("[]")
    refused("it is a list, not an object")
    file.write_text("no JSON")
    refused("not JSON")
    write_part(tmp_path / "own", "coco", "train", 1)
    for path in (tmp_path / "own").rglob("*val*.json"):
        path.unlink()
    refused("one photograph cannot be split in two")


def test_file_names_of_windows(tmp_path: Path) -> None:
    file = write_part(tmp_path / "own", "plain", "train", 2)
    write_part(tmp_path / "own", "plain", "val", 2)
    (tmp_path / "own" / "train" / "cam").mkdir()
    (tmp_path / "own" / "train" / "train0.png").rename(tmp_path / "own" / "train" / "cam" / "train0.png")
    file.write_text(file.read_text().replace("train0.png", r"cam\\train0.png"))
    register_folder(tmp_path / "own")
    item = InstanceMapper(True, augmentations=[], num_classes=2)(read_dataset("own_train")[0])
    assert np.asarray(item["image"]).shape == (3, 40, 60)
