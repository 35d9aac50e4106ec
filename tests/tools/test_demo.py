"""The demo: what is read, drawn and reported; the predictor's sizes; the views."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import coco_files
import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from devices import DEVICE
from PIL import Image
from pycocotools.coco import COCO
from torch import nn

from querymask import get_cfg
from querymask.common import predictor as predictor_module
from querymask.common import views
from querymask.common.detections import Detections
from querymask.common.evaluation.results import evaluate_results
from querymask.common.meta_arch import QuerySegmenter
from querymask.common.predictor import Predictor, class_names
from querymask.solq.figures import detections_by_coefficients

ROOT = Path(__file__).parents[2]
TINY = {
    "solq": "SOLQ: {NUM_QUERIES: 5, HIDDEN_DIM: 64, NUM_HEADS: 2, ENC_LAYERS: 1, DEC_LAYERS: 1, DIM_FEEDFORWARD: 8}",
    "isda": "ISDA: {NUM_QUERIES: 5, HIDDEN_DIM: 64, NUM_HEADS: 2, ENC_LAYERS: 1, DEC_LAYERS: 1, DIM_FEEDFORWARD: 8}",
    "istr": "ISTR: {NUM_QUERIES: 4, NUM_STAGES: 2, HIDDEN_DIM: 16, NUM_HEADS: 2, DIM_FEEDFORWARD: 8, DIM_DYNAMIC: 4}\n"
    "  FPN: {OUT_CHANNELS: 16}\n  RESNETS: {STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16}",
    "effseg": "EFFSEG: {NUM_QUERIES: 20, HIDDEN_DIM: 32, NUM_HEADS: 2, DEC_LAYERS: 1, DIM_FEEDFORWARD: 8}\n"
    "  MASK_BRANCH: {EFFSEG: {REFINEMENTS: 100}}",
}


JSON = ["detections.json", "images.json"]


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Function that writes a tiny config of a method."""

    def write(method: str) -> str:
        path = tmp_path / f"{method}.yaml"
        base = ROOT / "projects" / method / "configs" / f"{method}_shapes.yaml"
        path.write_text(f'_BASE_: {base}\nMODEL:\n  WEIGHTS: ""\n  DEVICE: {DEVICE}\n  {TINY[method]}\n')
        return str(path)

    return write


def picture(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_patterns_and_files(config: Callable[[str], str], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.JPG")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    other, again = picture(tmp_path / "x" / "a.png"), picture(tmp_path / "x" / "c1.png")
    inputs = [str(tmp_path / "in"), str(other), str(tmp_path / "x" / "c*.png"), str(again)]
    output = tmp_path / "out"
    arguments = ["--config-file", config("solq"), "--output", str(output), "--confidence-threshold", "0"]
    assert demo.main([*arguments, "--input", *inputs]) == 0
    assert names(output) == ["a.jpg", "a_2.jpg", "b.jpg", "c1.jpg", *JSON]
    with Image.open(output / "a.jpg") as drawn:
        assert drawn.size == (512, 341)  # small images are enlarged for drawing


def test_broken_files_are_reported_and_the_rest_is_done(
    config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = picture(tmp_path / "good.png")
    broken, cut = tmp_path / "broken.jpg", tmp_path / "cut.png"
    broken.write_bytes(b"this is no image")
    cut.write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    inputs = [str(broken), str(cut), str(tmp_path / "missing.png"), str(tmp_path / "empty"), str(good)]
    output = tmp_path / "out"
    assert demo.main(["--config-file", config("solq"), "--output", str(output), "--input", *inputs]) == 1
    assert names(output) == [JSON[0], "good.jpg", JSON[1]]
    errors = capsys.readouterr().err
    for text in ("broken.jpg cannot be read", "cut.png cannot be read", "missing.png: there is no", "empty: no images"):
        assert text in errors


def test_whatever_is_in_a_folder(
    config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The good files are done, the others named with the reason: files of every kind, and a model that fails."""
    folder = tmp_path / "in"
    for name, width, height in (("a.png", 60, 40), ("b.png", 1, 1), ("c.png", 300, 1), ("huge.png", 50, 60)):
        picture(folder / name, width, height)
    (folder / "folder.jpg").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "nothing")
    (folder / "d.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    samples = np.arange(1000, 3400).reshape(40, 60).astype(np.uint16)
    Image.fromarray(samples).save(folder / "e.png")
    Image.fromarray(samples.astype(np.float32)).save(folder / "f.tif")
    (folder / "g.jpg").write_text("<html>")
    make_draw = demo.make_draw

    def make(*arguments: object) -> demo.Draw:
        draw = make_draw(*arguments)

        def fail(image: np.ndarray) -> tuple[np.ndarray, Detections]:
            if image.shape == (60, 50, 3):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return draw(image)

        return fail

    monkeypatch.setattr(demo, "make_draw", make)
    output = tmp_path / "out"
    arguments = ["--config-file", config("solq"), "--output", str(output), "--input", str(folder)]
    assert demo.main(arguments) == 1
    assert names(output) == ["a.jpg", "b.jpg", "c.jpg", *JSON]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    expected = {
        "d.heic": "cannot be read: .*HEIC",
        "e.png": "cannot be read: the samples are uint16.*from 1000 to 3399.*INPUT.PIXEL_RANGE",
        "f.tif": "cannot be read: the samples are float32.*from 1000 to 3399.*INPUT.PIXEL_RANGE",
        "g.jpg": "cannot be read: .*web page",
        "huge.png": "cannot be drawn: out of memory.*INPUT.MAX_SIZE_TEST",
        "link.png": "cannot be read: there is no such file",
    }
    assert len(errors) == len(expected)
    for line, (name, message) in zip(errors, expected.items()):
        assert re.match(f"error: {re.escape(str(folder / name))} {message}", line), line
    assert demo.main([*arguments, "--opts", "INPUT.PIXEL_RANGE", "[1000, 3000]"]) == 1
    assert names(output) == ["a.jpg", "b.jpg", "c.jpg", JSON[0], "e.jpg", "f.jpg", JSON[1]]


def test_options_that_are_wrong(config: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", config("solq"), "--input", "a.png", "--opts"]
    assert demo.main([*arguments, "VIS_FONT", "gone.ttf"]) == 1
    assert demo.main([*arguments, "INPUT.PIXEL_RANGE", "[3, 2]"]) == 1
    errors = capsys.readouterr().err
    assert "VIS_FONT is 'gone.ttf', which is no font" in errors and "INPUT.PIXEL_RANGE is [3, 2]" in errors


def test_names_of_windows(config: Callable[[str], str], tmp_path: Path) -> None:
    picture(tmp_path / "cam1" / "0001.png")
    name = f"{tmp_path}\\cam1\\0001.png".replace(f"{tmp_path}\\", f"{tmp_path}/")
    output = tmp_path / "out"
    assert demo.main(["--config-file", config("solq"), "--output", str(output), "--input", name]) == 0
    assert names(output) == ["0001.jpg", *JSON]


@pytest.mark.parametrize("rate", [10, 12.5, 30000 / 1001])
def test_video(config: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float) -> None:
    path, output = str(tmp_path / "in.mp4"), str(tmp_path / "out" / "out.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no videos")
    for value in range(3):
        writer.write(np.full((48, 64, 3), 80 * value, np.uint8))
    writer.release()
    arguments = ["--config-file", config("solq"), "--video-input", path, "--output", output]
    assert demo.main([*arguments, "--confidence-threshold", "0"]) == 0
    video = cv2.VideoCapture(output)
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (3, pytest.approx(rate, abs=1e-3))
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (512, 384)
    found = read_back(tmp_path / "out" / "out.images.json", tmp_path / "out" / "out.detections.json")
    assert found.getImgIds() == [1, 2, 3] and len(found.getAnnIds(imgIds=[2])) == 5 * 6
    assert found.imgs[2]["file_name"] == f"{path}, frame 2" and found.imgs[2]["width"] == 64
    assert demo.main(["--config-file", config("solq"), "--video-input", "none.mp4", "--output", output]) == 1
    assert "none.mp4 has no frames" in capsys.readouterr().err


def read_back(images: Path, detections: Path) -> COCO:
    """The written detections as pycocotools has them."""
    return COCO(str(images)).loadRes(str(detections))


class Everything(nn.Module):
    """Finds the left half of every image, with scores 0.1, 0.2, ..."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        (self.item,) = inputs
        size = (self.item["height"], self.item["width"])
        instances = Instances(size)
        instances.scores = torch.linspace(0.1, 1.0, 10)
        instances.pred_classes = torch.zeros(10, dtype=torch.int64)
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1] / 2, size[0]]]).repeat(10, 1))
        instances.pred_masks = torch.zeros(10, *size, dtype=torch.bool)
        instances.pred_masks[:, :, : size[1] // 2] = True
        return [{"instances": instances}]


def test_large_photographs_get_reduced_masks(config: Callable[[str], str]) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(config("solq"))
    image = np.zeros((1500, 2000, 3), np.uint8)
    image[:, :, 0] = 200
    predictor = Predictor(cfg, longest_side=1280)
    predictor.model = Everything()
    found = predictor(image, score_threshold=0.55)
    assert predictor.prepare(image)[1].shape == (960, 1280, 3) and found.size == (960, 1280)
    assert len(found) == 5 and found.masks.shape == (5, 960, 1280)
    seen = predictor.model.item["image"]
    assert max(seen.shape) <= cfg.INPUT.MAX_SIZE_TEST and (seen[0] == 200).all()
    (result,) = found.to_coco(7, size=(1500, 2000))[:1]
    assert result["bbox"] == [0, 0, 1000, 1500] and mask_util.decode(result["segmentation"])[:, :1000].all()
    assert mask_util.area(result["segmentation"]) == 1000 * 1500
    unlimited = Predictor(cfg)
    assert unlimited.prepare(image)[1].shape == image.shape
    cfg.INPUT.FORMAT = "BGR"
    assert (Predictor(cfg).prepare(image)[0]["image"][2] == 200).all()
    with pytest.raises(ValueError, match="needs a uint8 image"):
        predictor(image[:, :, 0])
    assert class_names(cfg)[0] == "circle"


@pytest.mark.parametrize("method", list(TINY))
def test_slices(config: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Each slice is seen as an image; the picture has the size that it has without slices."""
    pytest.importorskip("sahi")
    sizes = []
    find = QuerySegmenter.forward

    def spied(model: nn.Module, inputs: list[dict]) -> list[dict]:
        sizes.append((inputs[0]["height"], inputs[0]["width"], *inputs[0]["image"].shape[1:]))
        return find(model, inputs)

    monkeypatch.setattr(QuerySegmenter, "forward", spied)
    file, output = str(picture(tmp_path / "a.png", 300, 200)), tmp_path / "out"
    arguments = ["--config-file", config(method), "--input", file, "--output", str(output), "--slice", "128"]
    opts = ["--opts", "MODEL.MASK_CODING.NAME", "dct", "MODEL.MASK_CODING.BASIS", ""] if method == "istr" else []
    assert demo.main([*arguments, "--overlap", "0.25", "--confidence-threshold", "0", *opts]) == 0
    assert sizes == [(128, 128, 128, 128)] * 6
    with Image.open(output / "a.jpg") as drawn:
        assert drawn.size == (512, 341)


def test_slices_and_views(config: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", config("solq"), "--input", "a.png", "--view", "coefficients", "--slice", "128"]
    assert demo.main(arguments) == 1
    assert "a view is of one pass of the network: leave out --slice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "view"),
    [("solq", "coefficients"), ("isda", "reference_points"), ("istr", "stages"), ("effseg", "refinement")],
)
def test_views(config: Callable[[str], str], tmp_path: Path, method: str, view: str) -> None:
    file, output = str(picture(tmp_path / "a.png")), tmp_path / "out"
    arguments = ["--config-file", config(method), "--input", file, "--output", str(output)]
    opts = []
    if method == "istr":  # the test's ISTR has no learned basis
        opts = ["--opts", "MODEL.MASK_CODING.NAME", "dct", "MODEL.MASK_CODING.BASIS", ""]
    assert demo.main([*arguments, "--confidence-threshold", "0", "--view", view, *opts]) == 0
    with Image.open(output / "a.jpg") as drawn:
        panels = {"coefficients": 2, "reference_points": 1, "stages": 2, "refinement": 4}[view]
        assert 512 * panels <= drawn.width < 540 * panels


def test_images_of_the_test_set(config: Callable[[str], str], tmp_path: Path) -> None:
    files = [str(picture(tmp_path / f"{name}.png")) for name in "abc"]
    DatasetCatalog.register("demo_test_images", lambda: [{"file_name": file} for file in files])
    try:
        arguments = ["--config-file", config("solq"), "--test-images", "2", "--output", str(tmp_path / "out")]
        assert demo.main([*arguments, "--opts", "DATASETS.TEST", "('demo_test_images',)"]) == 0
    finally:
        DatasetCatalog.remove("demo_test_images")
    assert names(tmp_path / "out") == ["a.jpg", "b.jpg", *JSON]


def test_views_of_other_methods(config: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", config("solq"), "--input", "a.png", "--view"]
    assert demo.main([*arguments, "stages"]) == 1
    assert "view 'stages' is for ISTR; SOLQ has coefficients" in capsys.readouterr().err
    assert demo.main([*arguments, "dreams"]) == 1
    assert "there is no view 'dreams'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is a view 'stages' already"):
        views.register_view("stages", "SOLQ")(lambda *arguments: None)


@pytest.mark.parametrize("shared", [True, False])
def test_coefficients(config: Callable[[str], str], shared: bool) -> None:
    """All coefficients give the model's own masks; fewer give those of a vector whose rest is zero."""
    cfg = get_cfg()
    cfg.merge_from_file(config("solq"))
    cfg.MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD = shared
    torch.manual_seed(0)
    predictor = Predictor(cfg)
    model = predictor.model
    for parameter in model.mask_branch.vector_embed.parameters():
        nn.init.normal_(parameter, std=0.5)
    item, _ = predictor.prepare(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    length = model.mask_branch.coding.length
    found = detections_by_coefficients(model, item, counts=(4, 10**6))
    assert list(found) == [4, length]
    with torch.no_grad():
        own = model([item])[0]["instances"]
    assert own.pred_masks.any() and torch.equal(found[length].pred_masks, own.pred_masks)
    with torch.no_grad():
        model.mask_branch.head(-1).layers[-1].weight[4:] = 0
        model.mask_branch.head(-1).layers[-1].bias[4:] = 0
        cut = model([item])[0]["instances"]
    assert torch.equal(found[4].pred_masks, cut.pred_masks) and not torch.equal(cut.pred_masks, own.pred_masks)


def test_without_a_window(config: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise cv2.error("no window")

    monkeypatch.setattr(cv2, "imshow", refuse)
    with pytest.raises(SystemExit, match="Give --output"):
        demo.main(["--config-file", config("solq"), "--input", str(picture(tmp_path / "a.png"))])


class Halves(nn.Module):
    """Finds the left half of every image, and with a lower score its upper half."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        return [{"instances": self.find(item["height"], item["width"])} for item in inputs]

    def find(self, height: int, width: int) -> Instances:
        instances = Instances((height, width))
        instances.scores = torch.tensor([0.5, 0.9, 0.1])
        instances.pred_classes = torch.tensor([2, 1, 0])
        instances.pred_boxes = Boxes(torch.tensor([[0, 0, width, height // 2], [0, 0, width // 2, height]] * 2)[:3])
        instances.pred_masks = torch.zeros(3, height, width, dtype=torch.bool)
        instances.pred_masks[0, : height // 2] = True
        instances.pred_masks[1, :, : width // 2] = True
        return instances


@pytest.mark.parametrize(("width", "height"), [(60, 40), (2000, 1000)])
def test_detections_and_label_images(
    config: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    """In the pixels of the file, also where pictures are smaller."""
    file, output = picture(tmp_path / "a.png", width, height), tmp_path / "out"
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: Halves())
    arguments = ["--config-file", config("solq"), "--input", str(file), "--output", str(output)]
    assert demo.main([*arguments, "--label-images"]) == 0
    assert names(output) == ["a.jpg", JSON[0], JSON[1], "labels"]
    found = read_back(output / JSON[1], output / JSON[0])
    assert found.imgs[1] == {"id": 1, "file_name": str(file), "height": height, "width": width}
    assert [c["name"] for c in found.cats.values()][:3] == ["circle", "square", "triangle"]
    first, second = found.loadAnns([1, 2])
    assert (first["score"], second["score"]) == (pytest.approx(0.9), 0.5)
    assert [found.cats[a["category_id"]]["name"] for a in (first, second)] == ["square", "triangle"]
    assert first["bbox"] == [0, 0, width / 2, height] and second["bbox"] == [0, 0, width, height / 2]
    left, upper = np.zeros((2, height, width), bool)
    left[:, : width // 2], upper[: height // 2] = True, True
    assert np.array_equal(found.annToMask(first), left) and np.array_equal(found.annToMask(second), upper)
    with Image.open(output / "labels" / "a.png") as labels:
        assert labels.mode == "I;16" and np.array_equal(np.asarray(labels), np.where(left, 1, 2 * upper))


class Halved(nn.Module):
    """Finds a thing on the left and stuff in the upper part of what is left."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        ids = torch.zeros(inputs[0]["height"], inputs[0]["width"], dtype=torch.int32)
        ids[: len(ids) // 2] = 2
        ids[:, : ids.shape[1] // 2] = 1
        segments = [
            {"id": 1, "category_id": 1, "isthing": True, "score": 0.5},
            {"id": 2, "category_id": 7, "isthing": False, "score": 0.9},
        ]
        return [{"panoptic_seg": (ids, segments)}]


@pytest.mark.parametrize(("width", "height"), [(60, 40), (2000, 1000)])
def test_panoptic_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> None:
    """Segments are drawn, written as run lengths, and counted in label images, like instances; they are disjoint."""
    file, output = picture(tmp_path / "a.png", width, height), tmp_path / "out"
    config = ROOT / "projects" / "effseg" / "configs" / "panoptic" / "effseg_shapes_panoptic.yaml"
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: Halved())
    arguments = ["--config-file", str(config), "--input", str(file), "--output", str(output), "--label-images"]
    options = ["--opts", "MODEL.WEIGHTS", ""]
    assert demo.main([*arguments, *options]) == 0
    found = read_back(output / JSON[1], output / JSON[0])
    stuff, thing = found.loadAnns([1, 2])
    assert (stuff["score"], thing["score"]) == (pytest.approx(0.9), 0.5) and "segmentation" in stuff
    names = MetadataCatalog.get("shapes_panoptic_val").thing_classes
    assert [found.cats[a["category_id"]]["name"] for a in (stuff, thing)] == [names[7], names[1]]
    left, upper = np.zeros((2, height, width), bool)
    left[:, : width // 2] = True
    upper[: height // 2, width // 2 :] = True
    assert np.array_equal(found.annToMask(thing), left) and np.array_equal(found.annToMask(stuff), upper)
    with Image.open(output / "labels" / "a.png") as labels:
        assert np.array_equal(np.asarray(labels), 2 * left + upper)
    with Image.open(output / "a.jpg") as drawn:
        plain = np.asarray(Image.open(file).resize(drawn.size)).astype(int)
        changed = np.abs(np.asarray(drawn).astype(int) - plain).mean(axis=2)
    half = changed.shape[0] // 2, changed.shape[1] // 2
    assert changed[half[0] + 40 :, half[1] + 40 :].mean() < 0.7 * changed[half[0] + 40 :, : half[1] - 40].mean()

    # Of a higher score, stuff alone
    assert demo.main([*arguments, "--confidence-threshold", "0.7", *options]) == 0
    with Image.open(output / "labels" / "a.png") as labels:
        assert np.array_equal(np.asarray(labels), 1 * upper)


class Squares(nn.Module):
    """Finds what ``coco_files.squares`` annotates."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        instances = Instances((inputs[0]["height"], inputs[0]["width"]))
        instances.pred_boxes = Boxes(torch.tensor([[1.0 + 20 * i, 1, 11 + 20 * i, 11] for i in range(4)]))
        instances.pred_masks = torch.zeros(4, *instances.image_size, dtype=torch.bool)
        for i in range(4):
            instances.pred_masks[i, 1:11, 1 + 20 * i : 11 + 20 * i] = True
        instances.scores, instances.pred_classes = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int64)
        return [{"instances": instances}]


def test_detections_of_a_test_set_can_be_evaluated(
    config: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have its ids of images and categories."""
    truth, _ = coco_files.write(
        tmp_path,
        lambda content: [
            content.update(categories=[{"id": 5, "name": "cell"}]),
            content["images"][0].update(id=11),
            coco_files.each(category_id=5, image_id=11)(content),
        ],
    )
    register_coco_instances("demo_squares", {}, str(truth), str(tmp_path))
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: Squares())
    arguments = ["--config-file", config("solq"), "--test-images", "1", "--output", str(tmp_path / "out"), "--opts"]
    options = ["DATASETS.TEST", "('demo_squares',)", "DATASETS.TRAIN", "()", "MODEL.SOLQ.NUM_CLASSES", "1"]
    try:
        assert demo.main([*arguments, *options]) == 0
        scores = evaluate_results(tmp_path / "out" / JSON[0], "demo_squares")
    finally:
        DatasetCatalog.remove("demo_squares")
        MetadataCatalog.remove("demo_squares")
    assert {task: score["AP"] for task, score in scores.items()} == {
        "bbox": pytest.approx(100),
        "segm": pytest.approx(100),
    }
    written = json.loads((tmp_path / "out" / JSON[1]).read_text())
    assert written["categories"] == [{"id": 5, "name": "cell"}] and written["images"][0]["id"] == 11


def test_label_images_of_nothing(config: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--config-file", config("solq"), "--input", "a.png", "--label-images"])
    assert "--label-images is for images with --output" in capsys.readouterr().err
