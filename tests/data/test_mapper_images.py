"""Image files that the mapper meets: EXIF orientations against stored sizes, 16 bits, names of other systems."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from PIL import Image

from querymask import get_cfg
from querymask.common.data import InstanceMapper, image_files

HEIGHT, WIDTH = 64, 96
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def entry(path: Path, height: int = HEIGHT, width: int = WIDTH) -> dict:
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    annotation = {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [square]}
    return {"file_name": str(path), "image_id": 3, "height": height, "width": width, "annotations": [annotation]}


def save(path: Path, orientation: int, pixels: np.ndarray = PIXELS) -> Path:
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(pixels).save(path, exif=tags)
    return path


@pytest.fixture(params=[True, False], ids=["training", "test"])
def mapper(request: pytest.FixtureRequest) -> InstanceMapper:
    return InstanceMapper(request.param, augmentations=[])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_sizes_of_the_stored_pixels(tmp_path: Path, mapper: InstanceMapper, orientation: int) -> None:
    """The message says why: the JSON file has the sizes before the rotation."""
    path = save(tmp_path / "a.jpg", orientation)
    with pytest.raises(SizeMismatchError) as error:
        mapper(entry(path))
    for text in (
        f"{path} (image id 3): the image is 64x96 (width x height), the data set says 96x64",
        f"EXIF orientation {orientation}, a rotation, which is applied",
        "exiftool -Orientation=",
        "exchange width and height in the data set",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((WIDTH, HEIGHT), "Width and height are exchanged: correct the data set"), ((HEIGHT, 97), "96x64.*says 97x64")],
)
def test_other_sizes(tmp_path: Path, mapper: InstanceMapper, sizes: tuple[int, int], message: str) -> None:
    """Without an orientation in the file, which the message does not speak of then."""
    path = save(tmp_path / "a.jpg", 1)
    with pytest.raises(SizeMismatchError, match=message) as error:
        mapper(entry(path, *sizes))
    assert "EXIF" not in str(error.value) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_turned_images_whose_sizes_agree(
    tmp_path: Path, mapper: InstanceMapper, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Which way the annotations were drawn cannot be known: one line says how they are taken."""
    pixels = PIXELS[:, :HEIGHT] if orientation == 6 else PIXELS
    files = [save(tmp_path / f"{name}.png", orientation, pixels) for name in "ab"]
    upright = save(tmp_path / "c.png", 1, pixels)
    with caplog.at_level(logging.WARNING):
        mapper(entry(upright, *pixels.shape[:2]))
        assert not caplog.records
        outputs = [mapper(entry(file, *pixels.shape[:2])) for file in files]
    (record,) = caplog.records
    assert f"a.png (image id 3): the file has EXIF orientation {orientation}, which is applied" in record.getMessage()
    turned = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 6: pixels[::-1].transpose(1, 0, 2)}
    for output in outputs:
        np.testing.assert_array_equal(output["image"].permute(1, 2, 0), turned[orientation])


def test_sizes_that_lack_are_the_images(tmp_path: Path, mapper: InstanceMapper) -> None:
    item = entry(save(tmp_path / "a.png", 8))
    del item["height"], item["width"]
    output = mapper(item)
    assert (output["height"], output["width"]) == (WIDTH, HEIGHT)
    assert "height" not in item


@pytest.mark.parametrize("is_train", [True, False])
def test_16_bits(tmp_path: Path, is_train: bool) -> None:
    samples = np.arange(1000, 1000 + HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    path = tmp_path / "thermal.png"
    Image.fromarray(samples).save(path)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TEST = HEIGHT
    cfg.INPUT.DETR_CROP.ENABLED, cfg.INPUT.RANDOM_FLIP = False, "none"
    with pytest.raises(RuntimeError, match=r"thermal.png \(image id 3\): .*uint16.*1000 to 7143.*INPUT.PIXEL_RANGE"):
        InstanceMapper(cfg, is_train)(entry(path))
    cfg.INPUT.PIXEL_RANGE = [2000, 6000]
    image = InstanceMapper(cfg, is_train)(entry(path))["image"].permute(1, 2, 0).numpy().astype(float)
    expected = 255 * np.clip((samples - 2000.0) / 4000, 0, 1)
    assert image.shape == (HEIGHT, WIDTH, 3) and np.abs(image - expected[:, :, None]).max() <= 0.51


def test_names_of_windows(tmp_path: Path, mapper: InstanceMapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_told", set())
    (tmp_path / "cam1").mkdir()
    save(tmp_path / "cam1" / "0001.png", 1)
    output = mapper(entry(Path(os.path.join(tmp_path, "cam1\\0001.png"))))
    np.testing.assert_array_equal(output["image"].permute(1, 2, 0), PIXELS)
    with pytest.raises(RuntimeError, match=r"cam2.*0001.png \(image id 3\): there is no such file"):
        mapper(entry(Path(os.path.join(tmp_path, "cam2\\0001.png"))))


def test_too_many_pixels(tmp_path: Path, mapper: InstanceMapper, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RuntimeError, match=r"large.png \(image id 3\): .*6144 pixels.*INPUT.MAX_PIXELS"):
        mapper(entry(path))
