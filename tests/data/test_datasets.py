import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import querymask
from querymask.common import engine
from querymask.common.data import register_balloon, register_shapes
from querymask.common.data.datasets import datasets_root, register_all
from querymask.common.data.shapes import CATEGORIES, make_shapes, shapes_folder

OWN_NAMES = ["shapes_train", "shapes_val", "balloon_train", "balloon_val"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def names():
    """Names that a test may register; they are taken back afterwards."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_coco(folder, split, num_images=3, categories=((3, "apple"), (10, "pear"), (40, "plum"))):
    """A tiny data set in COCO's format; its second image has no instances."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        name = f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": i, "file_name": name, "height": 30, "width": 40})
        if i != 1:
            polygon = [[5.0, 5.0, 25.0, 5.0, 25.0, 20.0, 5.0, 20.0]]
            common = {"image_id": i, "bbox": [5, 5, 20, 15], "area": 300, "iscrowd": 0, "segmentation": polygon}
            annotations.append({"id": i + 1, "category_id": categories[i % len(categories)][0], **common})
    kinds = [{"id": number, "name": name} for number, name in categories]
    document = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / f"{split}.json").write_text(json.dumps(document))


def test_import_registers(monkeypatch):
    assert set(OWN_NAMES) <= set(DatasetCatalog.list())
    assert {"coco_2017_train", "coco_2017_val"} <= set(DatasetCatalog.list())
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert datasets_root() == str(Path.home() / "data")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == "datasets"


def test_registration_makes_nothing_and_leaves_taken_names_alone(tmp_path):
    registered = sorted(DatasetCatalog.list())
    register_all(tmp_path)  # a second time
    assert sorted(DatasetCatalog.list()) == registered
    assert not MetadataCatalog.get("shapes_train").json_file.startswith(str(tmp_path))
    for name in OWN_NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    try:
        register_all(tmp_path)
        files = [Path(MetadataCatalog.get(name).json_file) for name in OWN_NAMES]
        own = [shapes_folder(tmp_path), tmp_path / "balloon"]
        assert files == [folder / f"{split}.json" for folder in own for split in ("train", "val")]
        assert not list(tmp_path.iterdir())
    finally:
        for name in OWN_NAMES:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_all(datasets_root())


def test_shapes_come_through_detectron2s_coco_path(tmp_path, names):
    register_shapes("shapes_of_test", tmp_path, "val", num_images=30)
    metadata = MetadataCatalog.get("shapes_of_test")
    assert metadata.evaluator_type == "coco" and metadata.json_file == str(shapes_folder(tmp_path) / "val.json")
    assert metadata.thing_classes == [category["name"] for category in CATEGORIES]
    assert not shapes_folder(tmp_path).exists()  # nothing is made before it is used

    entries = DatasetCatalog.get("shapes_of_test")
    assert metadata.thing_dataset_id_to_contiguous_id == {c["id"]: i for i, c in enumerate(CATEGORIES)}
    document = json.loads(Path(metadata.json_file).read_bytes())
    raw = {}
    for annotation in document["annotations"]:
        raw.setdefault(annotation["image_id"], []).append(annotation)
    assert len(entries) == len(document["images"]) == 30
    for entry in entries:
        assert Path(entry["file_name"]).parent == Path(metadata.image_root) and Path(entry["file_name"]).exists()
        ids = [CATEGORIES[a["category_id"]]["id"] for a in entry["annotations"]]
        assert ids == [a["category_id"] for a in raw.get(entry["image_id"], [])]
    mapper = querymask.data.InstanceMapper(True, augmentations=[], num_classes=len(CATEGORIES))
    for entry in entries:
        instances = mapper(entry)["instances"]
        assert len(instances) == sum(not a["iscrowd"] for a in entry["annotations"])
        assert instances.gt_masks.tensor.flatten(1).any(dim=1).all()


def test_category_ids_have_gaps():
    ids = [category["id"] for category in CATEGORIES]
    assert ids == sorted(ids) and ids != list(range(1, len(ids) + 1))


def test_balloon(tmp_path, names):
    register_balloon("balloon_of_test", tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="(?s)balloon_of_test.*val.json.*DETECTRON2_DATASETS.*docs/data.md"):
        DatasetCatalog.get("balloon_of_test")
    write_coco(tmp_path / "balloon", "val", categories=((1, "balloon"),))
    entries = DatasetCatalog.get("balloon_of_test")
    assert [len(entry["annotations"]) for entry in entries] == [1, 0, 1]


def test_example_of_the_documentation(tmp_path, names, monkeypatch):
    """Runs the example of docs/your_own_data.md as it is there, with a trainer that only reads the data."""
    text = (REPOSITORY / "docs" / "your_own_data.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "fruit" in block]
    assert example.startswith("from querymask")  # applies the shims, without which Detectron2 0.5 fails
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "projects").symlink_to(REPOSITORY / "projects")
    for split in ("train", "val"):
        write_coco(tmp_path / "fruit", split)
    monkeypatch.chdir(tmp_path)

    done = []

    class Trainer:
        def __init__(self, cfg):
            self.cfg = cfg
            engine.check_num_classes(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])

        def resume_or_load(self, resume):
            assert not resume

        def train(self):
            mapper = querymask.data.InstanceMapper(self.cfg, True)
            for name in (*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.TEST):
                outputs = [mapper(entry) for entry in DatasetCatalog.get(name)]
                done.append((name, [output["instances"].gt_classes.tolist() for output in outputs]))

    monkeypatch.setattr(engine, "Trainer", Trainer)
    monkeypatch.setattr(engine, "default_setup", lambda cfg, args: None)
    runpy.run_path("example.py", run_name="__main__")
    assert done == [("fruit_train", [[0], [], [2]]), ("fruit_val", [[0], [], [2]])]


def test_layout_in_the_documentation(tmp_path):
    json_file = make_shapes(tmp_path, "val", 2)
    text = (REPOSITORY / "docs" / "data.md").read_text()
    assert str(json_file.parent.relative_to(tmp_path)) + "/{train,val}.json" in text
