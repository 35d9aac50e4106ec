"""From images to detections in Python: what goes in, what comes out, batches, threads; reading ahead."""

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from devices import DEVICE
from PIL import Image
from tiny_models import small_solq
from torch import nn

import querymask
from querymask.common.data.read_ahead import read_ahead
from querymask.common.detections import Detections
from querymask.common.predictor import Predictor

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fly"]


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    return small_solq(NAMES)


@pytest.fixture(scope="module")
def predictor(cfg: CfgNode) -> Predictor:
    torch.manual_seed(0)
    return Predictor(cfg)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def same(one: Detections, other: Detections, tolerance: float = 0.0) -> None:
    assert one.size == other.size and one.names == other.names
    assert np.allclose(one.scores, other.scores, atol=tolerance, rtol=0)
    assert np.allclose(one.boxes, other.boxes, atol=100 * tolerance, rtol=0)
    assert (one.masks != other.masks).mean() <= tolerance


def test_paths_and_arrays(predictor: Predictor, tmp_path: Path) -> None:
    """Are the same; scores descend, names are those of the labels, boxes and masks of the image's size."""
    image = noise(50, 70)
    path = save(tmp_path / "a.png", image)
    found = predictor(image)
    same(found, predictor(path))
    same(found, predictor([str(path)])[0])
    assert found.size == (50, 70) and found.masks.shape == (len(found), 50, 70) and found.masks.dtype == bool
    assert (np.diff(found.scores) <= 0).all() and found.names == [NAMES[i] for i in found.labels]
    assert found.boxes.shape == (len(found), 4)
    threshold = float(found.scores[3])
    assert len(predictor(image, score_threshold=threshold)) == 4
    assert [len(f) for f in predictor([image, image], score_threshold=threshold)] == [4, 4]


def test_is_what_evaluation_sees(predictor: Predictor, cfg: CfgNode) -> None:
    image = noise(64, 96)  # of the size of the input
    with torch.no_grad():
        (output,) = predictor.model([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}])
    instances = output["instances"]
    order = instances.scores.argsort(descending=True, stable=True)
    found = predictor(image)
    assert np.array_equal(found.scores, instances.scores[order].cpu().numpy())
    assert np.array_equal(found.boxes, instances.pred_boxes.tensor[order].cpu().numpy())
    assert np.array_equal(found.masks, instances.pred_masks[order].cpu().numpy())
    back = found.to_instances()
    assert set(back.get_fields()) == {"scores", "pred_classes", "pred_boxes", "pred_masks"}


def test_run_lengths(predictor: Predictor) -> None:
    found = predictor(noise(41, 60))
    assert found.masks.any()
    assert np.array_equal(mask_util.decode(found.run_lengths()).transpose(2, 0, 1), found.masks)
    (first, *_) = found.to_coco(3, [10, 20, 30, 40, 50, 60])
    assert first["image_id"] == 3 and first["category_id"] == 10 * (found.labels[0] + 1)
    x0, y0, x1, y1 = found.boxes[0].tolist()
    assert (
        first["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0]) and first["segmentation"] == found.run_lengths()[0]
    )


def test_batches(predictor: Predictor) -> None:
    """Images of one size are no other in a batch; of others, nearly the same. The order stays, the rest is done."""
    images = [noise(64, 96, seed) for seed in range(5)]
    for found, image in zip(predictor(images, batch_size=2), images, strict=True):
        same(found, predictor(image), tolerance=1e-5)
    sizes = [noise(40, 60), noise(64, 64), noise(90, 30)]
    assert [found.size for found in predictor(sizes, batch_size=3)] == [(40, 60), (64, 64), (90, 30)]
    assert predictor([]) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        predictor(images, batch_size=0)


class Alone(nn.Module):
    """Fails where two threads are in it at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.busy = model, False

    def forward(self, inputs: list[dict]) -> list[dict]:
        assert not self.busy, "two threads are in the network"
        self.busy = True
        time.sleep(0.01)
        output = self.model(inputs)
        self.busy = False
        return output


def test_threads(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise(48, 64, seed) for seed in range(6)]
    expected = predictor(images)
    monkeypatch.setattr(predictor, "model", Alone(predictor.model))
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(predictor, images), expected, strict=True):
            same(one, other)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"not uint8 \[4, 5\]\. It is grey: np.repeat"),
        (np.zeros((4, 5, 1), np.uint8), r"not uint8 \[4, 5, 1\]\. It is grey"),
        (np.zeros((4, 5, 4), np.uint8), r"not uint8 \[4, 5, 4\]\. It has an alpha channel: image\[:, :, :3\]"),
        (
            np.zeros((3, 40, 50), np.uint8),
            r"not uint8 \[3, 40, 50\]\. Its channels come first: image.transpose\(1, 2, 0\)",
        ),
        (np.zeros((4, 5, 7), np.uint8), r"not uint8 \[4, 5, 7\]\. Choose three channels"),
        (np.zeros((4, 5, 3), np.uint16), r"not uint16 \[4, 5, 3\]\. Map its values to 0\.\.255"),
        (np.zeros((4, 5, 3), np.float32), r"not float32 \[4, 5, 3\]\. Map its values"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"not uint8 \[2, 4, 5, 3\]\. Give several images as a list"),
        (np.zeros((0, 5, 3), np.uint8), r"not uint8 \[0, 5, 3\]\. It has no pixels"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"not Tensor\. Give a path, or the pixels as a NumPy array"),
        (Image.new("RGB", (4, 5)), r"not Image\. Give a path"),
    ],
)
def test_other_pixels_are_refused(predictor: Predictor, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^image 1: the predictor needs a uint8 image \[H, W, 3\] RGB, {message}"):
        predictor([noise(4, 5), image])


def test_grey_and_alpha_hints_are_right(predictor: Predictor) -> None:
    """What the messages tell to do gives an image."""
    grey = noise(30, 40)[:, :, 0]
    predictor(np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2))
    predictor(np.dstack([noise(30, 40), grey])[:, :, :3])
    predictor(noise(30, 40).transpose(2, 0, 1).transpose(1, 2, 0))


def test_files(predictor: Predictor, tmp_path: Path) -> None:
    """As training reads them: grey ones and those with transparency become RGB, others are refused by name."""
    image = noise(30, 40)
    grey = save(tmp_path / "grey.png", image[:, :, 0])
    same(predictor(grey), predictor(np.repeat(image[:, :, :1], 3, axis=2)))
    same(predictor(save(tmp_path / "alpha.png", np.dstack([image, image[:, :, 0]]))), predictor(image))
    deep = save(tmp_path / "deep.png", image[:, :, 0].astype(np.uint16) * 200)
    with pytest.raises(ValueError, match=r"deep\.png: the samples are uint16.*INPUT.PIXEL_RANGE"):
        predictor(deep)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg: the file cannot be decoded"):
        predictor([grey, tmp_path / "text.jpg"])
    with pytest.raises(FileNotFoundError, match=r"gone\.png: there is no such file"):
        predictor(tmp_path / "gone.png")


def test_stream_reads_a_batch_ahead(predictor: Predictor) -> None:
    """However many images there are, few are taken before their turn."""
    taken = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield noise(20, 30, taken)

    for used, _ in enumerate(predictor.stream(images(), batch_size=2), start=1):
        assert used <= taken <= used + 1 + 2 + 2  # in the batch, and ahead
        if used == 9:
            break


def test_read_ahead() -> None:
    """Another thread works while an item is used, no further than asked; an error is one of its item alone."""
    taken: list[int] = []
    started: dict[int, threading.Event] = {i: threading.Event() for i in range(20)}

    def numbers() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        started[number].set()
        assert threading.current_thread() is not threading.main_thread()
        return 10 // (number - 5)

    results = []
    for number, future in read_ahead(work, numbers(), ahead=3):
        assert len(taken) <= number + 4
        if number + 3 < 20:
            assert started[number + 3].wait(10), "nothing is done ahead"
        if number == 5:
            with pytest.raises(ZeroDivisionError):
                future.result()
        else:
            results.append(future.result())
    assert results == [10 // (i - 5) for i in range(20) if i != 5]


def test_read_ahead_that_is_left() -> None:
    """Its thread ends."""
    before = threading.active_count()
    ahead = read_ahead(lambda number: number, range(10))
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


@pytest.fixture
def run(cfg: CfgNode, tmp_path: Path) -> Path:
    """The OUTPUT_DIR of a run, as training leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(1)
    model = build_model(cfg)
    checkpointer = DetectionCheckpointer(model, str(folder))
    checkpointer.save("model_final", class_names=NAMES)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def test_load(run: Path, cfg: CfgNode, tmp_path: Path) -> None:
    """A run, a config with weights, and both with other weights."""
    image = noise(40, 50)
    of_run = querymask.load(run)
    assert of_run.class_names == NAMES
    config = tmp_path / "model.yaml"
    config.write_text(cfg.dump())
    same(of_run(image), querymask.load(str(config), run / "model_final.pth", device=DEVICE)(image))
    torch.manual_seed(2)
    other = tmp_path / "other.pth"
    torch.save({"model": build_model(cfg).state_dict()}, other)
    same(querymask.load(run, other)(image), querymask.load(config, other)(image))
    assert not np.array_equal(querymask.load(run, other)(image).scores, of_run(image).scores)
    assert querymask.load(run, longest_side=25)(image).size == (20, 25)


def test_what_cannot_be_loaded(run: Path, cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "model.yaml"
    config.write_text(cfg.dump())
    with pytest.raises(ValueError, match=r"model\.yaml names no MODEL.WEIGHTS: give a checkpoint"):
        querymask.load(config)
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder. Give a config file, or"):
        querymask.load("nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.yaml: give the OUTPUT_DIR"):
        querymask.load(tmp_path)
    with pytest.raises(ValueError, match=r"gone\.pth: there is no such file"):
        querymask.load(config, "gone.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:1', but PyTorch finds no GPU: give 'cpu'"):
        querymask.load(run, device="cuda:1")
    other = cfg.clone()
    other.MODEL.SOLQ.NUM_CLASSES, other.MODEL.CLASS_NAMES = 7, []
    config.write_text(other.dump())
    with pytest.raises(ValueError, match=r"The file has 6 classes, MODEL.SOLQ.NUM_CLASSES is 7"):
        querymask.load(config, run / "model_final.pth")
    (run / "last_checkpoint").unlink()
    with pytest.raises(FileNotFoundError, match="run has no checkpoint"):
        querymask.load(run)
    querymask.load(run, run / "model_final.pth")  # which needs none of its own


def two_objects(boxes: bool) -> Detections:
    masks = np.zeros((2, 6, 8), bool)
    masks[0, 1:4, 2:5] = True
    found = np.array([[2, 1, 5, 4], [0, 0, 0, 0]], np.float32)
    return Detections((6, 8), np.float32([0.9, 0.4]), np.array([3, 1]), ["dog", "bee"], found if boxes else None, masks)


@pytest.mark.parametrize("boxes", [True, False])
def test_supervision(monkeypatch: pytest.MonkeyPatch, boxes: bool) -> None:
    """The fields that the package asks for; boxes around masks where a model has none."""
    stand_in = SimpleNamespace(Detections=lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    given = two_objects(boxes).to_supervision()
    assert given.xyxy.tolist() == [[2, 1, 5, 4], [0, 0, 0, 0]] and given.xyxy.dtype == np.float32
    assert given.mask.shape == (2, 6, 8) and given.confidence.tolist() == pytest.approx([0.9, 0.4])
    assert given.class_id.tolist() == [3, 1] and given.data["class_name"].tolist() == ["dog", "bee"]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="to_supervision needs the package supervision"):
        two_objects(boxes).to_supervision()


def test_the_package_supervision_itself() -> None:
    supervision = pytest.importorskip("supervision")
    given = two_objects(boxes=False).to_supervision()
    assert isinstance(given, supervision.Detections) and len(given) == 2
    (dog,) = given[given.confidence > 0.5]["class_name"]
    assert dog == "dog" and given.area.tolist() == [9, 0] and given.box_area.tolist() == [9, 0]


def test_label_images_need_masks() -> None:
    found = Detections((6, 8), np.float32([0.9]), np.array([3]), ["dog"], np.zeros((1, 4), np.float32), None)
    with pytest.raises(ValueError, match="the model makes no masks"):
        found.label_image()
    assert found.run_lengths() is None and found.to_coco(1)[0] == {
        "image_id": 1,
        "category_id": 3,
        "score": pytest.approx(0.9),
        "bbox": [0, 0, 0, 0],
    }
