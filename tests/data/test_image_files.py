"""What image files give: Detectron2's pixels for 8 bits, scaled ones or a refusal for more, a message for the rest."""

import logging
import os
import pickle
import re
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image, TiffImagePlugin

from querymask import get_cfg
from querymask.common.data import image_files
from querymask.common.data.image_files import ImageFileError, ImageReader, find_file, read_image

HEIGHT, WIDTH = 24, 36
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
DEEP = np.arange(1000, 1000 + 7 * HEIGHT * WIDTH, 7).reshape(HEIGHT, WIDTH).astype(np.uint16)
DEEP_COLOURS = RANDOM.integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(np.uint16)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_told", set())


def deep_png(path: Path, samples: np.ndarray, colour_type: int) -> None:
    """A PNG file of 16 bits a channel, by the format's definition; colour type 4 is grey with alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


EIGHT_BITS: dict[str, Callable[[Path], None]] = {
    "colours.jpg": lambda path: Image.fromarray(COLOURS).save(path),
    "colours.png": lambda path: Image.fromarray(COLOURS).save(path),
    "colours.webp": lambda path: Image.fromarray(COLOURS).save(path),
    "colours.tif": lambda path: Image.fromarray(COLOURS).save(path),
    "colours.bmp": lambda path: Image.fromarray(COLOURS).save(path),
    "grey.png": lambda path: Image.fromarray(COLOURS[:, :, 0]).save(path),
    "grey.jpg": lambda path: Image.fromarray(COLOURS[:, :, 0]).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(COLOURS).convert("CMYK").save(path),
    "palette.png": lambda path: Image.fromarray(COLOURS).quantize(16).save(path),
    "palette_transparent.png": lambda path: Image.fromarray(COLOURS).quantize(16).save(path, transparency=3),
    "palette.gif": lambda path: Image.fromarray(COLOURS).quantize(16).save(path),
    "alpha.png": lambda path: Image.fromarray(np.dstack([COLOURS, COLOURS[:, :, 0]])).save(path),
    "grey_alpha.png": lambda path: Image.fromarray(COLOURS[:, :, :2], "LA").save(path),
    "bits.png": lambda path: Image.fromarray(COLOURS[:, :, 0] > 99).save(path),
}


@pytest.mark.parametrize("format", ["RGB", "BGR", "L", "YUV-BT.601"])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_8_bits_are_those_of_detectron2(tmp_path: Path, name: str, format: str) -> None:
    EIGHT_BITS[name](tmp_path / name)
    expected = detectron2_read_image(str(tmp_path / name), format)
    for reader in (ImageReader(format), ImageReader(format, (1000, 2000), 10**6)):  # the options change nothing
        pixels = reader(tmp_path / name)
        assert pixels.dtype == expected.dtype
        np.testing.assert_array_equal(pixels, expected)
    if format == "RGB":
        assert read_image(tmp_path / name).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    """As Detectron2 does; but TIFF files, which Pillow itself turns, are turned once and not twice."""
    path = tmp_path / f"turned.{ending}"
    tags = Image.Exif()
    tags[274] = orientation
    if ending == "tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[274] = orientation
        Image.fromarray(COLOURS).save(path, tiffinfo=tags)
    else:
        Image.fromarray(COLOURS).save(path, exif=tags, quality=95)
    pixels, found = ImageReader().read(path)
    assert found == orientation and pixels.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    if ending != "tif":
        np.testing.assert_array_equal(pixels, detectron2_read_image(str(path), "RGB"))
    if ending != "jpg":  # by the definition: where the first row and the first column of the file belong
        upright = {
            1: COLOURS,
            2: COLOURS[:, ::-1],
            3: COLOURS[::-1, ::-1],
            4: COLOURS[::-1],
            5: COLOURS.transpose(1, 0, 2),
            6: COLOURS[::-1].transpose(1, 0, 2),
            7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
            8: COLOURS[:, ::-1].transpose(1, 0, 2),
        }[orientation]
        np.testing.assert_array_equal(pixels, upright)


DEEP_FILES: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "grey.png": (lambda path: Image.fromarray(DEEP).save(path), DEEP),
    "grey.tif": (lambda path: Image.fromarray(DEEP).save(path), DEEP),
    "compressed.tif": (lambda path: Image.fromarray(DEEP).save(path, compression="tiff_lzw"), DEEP),
    "grey.pgm": (lambda path: cv2.imwrite(str(path), DEEP), DEEP),
    "signed.tif": (lambda path: cv2.imwrite(str(path), DEEP.astype(np.int16) - 2000), DEEP - 2000.0),
    "bytes.tif": (lambda path: cv2.imwrite(str(path), (DEEP % 256 - 128.0).astype(np.int8)), DEEP % 256 - 128.0),
    "int32.tif": (lambda path: Image.fromarray(DEEP.astype(np.int32) * 9999).save(path), DEEP * 9999.0),
    "float.tif": (lambda path: Image.fromarray(DEEP.astype(np.float32) / 7000).save(path), DEEP / 7000.0),
    "grey_alpha.png": (lambda path: deep_png(path, np.stack([DEEP, DEEP * 2], -1), 4), DEEP),
    "colours.png": (lambda path: deep_png(path, DEEP_COLOURS, 2), DEEP_COLOURS),
    "alpha.png": (lambda path: deep_png(path, np.dstack([DEEP_COLOURS, DEEP]), 6), DEEP_COLOURS),
    "colours.tif": (lambda path: cv2.imwrite(str(path), DEEP_COLOURS[:, :, ::-1]), DEEP_COLOURS),
    "colours.ppm": (lambda path: cv2.imwrite(str(path), DEEP_COLOURS[:, :, ::-1]), DEEP_COLOURS),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_more_than_8_bits(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused with the range of the file; scaled with that of the config, whatever is in the file."""
    write, samples = DEEP_FILES[name]
    write(tmp_path / name)
    least = re.escape(f"{samples.min():g}" if name == "float.tif" else str(int(samples.min())))
    with pytest.raises(ImageFileError, match=rf"{name}: the samples are .*from {least} to .*PIXEL_RANGE"):
        read_image(tmp_path / name)
    low, high = np.quantile(samples, [0.2, 0.7])
    for _ in range(2):
        pixels = ImageReader(pixel_range=(low, high))(tmp_path / name).astype(float)
    expected = 255 * np.clip((samples - low) / (high - low), 0, 1)
    expected = expected if samples.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and np.abs(pixels - expected).max() <= 0.51
    assert (pixels == 0).any() and (pixels == 255).any()
    assert len(caplog.records) == 1 and f"{name}: samples are" in caplog.text
    blue_first = ImageReader("BGR", (low, high))(tmp_path / name)
    np.testing.assert_array_equal(blue_first[:, :, ::-1], pixels)


def test_deep_files_are_turned(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.fromarray(DEEP).save(tmp_path / "a.png", exif=tags)
    turned, orientation = ImageReader(pixel_range=(0, 2**16)).read(tmp_path / "a.png")
    Image.fromarray(DEEP).save(tmp_path / "b.png")
    upright = ImageReader(pixel_range=(0, 2**16))(tmp_path / "b.png")
    assert orientation == 6
    np.testing.assert_array_equal(turned, upright[::-1].transpose(1, 0, 2))


def test_white_is_zero(tmp_path: Path) -> None:
    """X-ray images in TIFF files whose greatest value is black, as they are for 8 bits."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    Image.fromarray(DEEP).save(tmp_path / "a.tif", tiffinfo=tags)
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)  # photometric interpretation, one short integer
    assert content.count(entry + struct.pack("<I", 1)) == 1
    (tmp_path / "b.tif").write_bytes(content.replace(entry + struct.pack("<I", 1), entry + struct.pack("<I", 0)))
    reader = ImageReader(pixel_range=(0, 2**15))
    sums = reader(tmp_path / "a.tif").astype(int) + reader(tmp_path / "b.tif")
    assert sums.min() >= 254 and sums.max() <= 256


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    samples = DEEP.astype(np.float32)
    samples[0, :3] = np.nan
    Image.fromarray(samples).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match="a.tif: 3 samples are NaN"):
        ImageReader(pixel_range=(0, 1))(tmp_path / "a.tif")
    samples[0, :3] = np.inf
    Image.fromarray(samples).save(tmp_path / "a.tif")
    assert (ImageReader(pixel_range=(0, 2**16))(tmp_path / "a.tif")[0, :3] == 255).all()


@pytest.mark.parametrize("wrong", [(1,), (2, 1), (1, 1), (0, float("nan")), (0, float("inf")), (1, 2, 3)])
def test_ranges_that_are_none(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"INPUT.PIXEL_RANGE is .*low < high"):
        ImageReader(pixel_range=wrong)


def test_reader_of_a_config() -> None:
    cfg = get_cfg()
    assert ImageReader.from_config(cfg) == ImageReader()
    cfg.merge_from_list(["INPUT.PIXEL_RANGE", "[100, 4000.5]", "INPUT.MAX_PIXELS", "9"])
    assert ImageReader.from_config(cfg, "BGR") == ImageReader("BGR", (100, 4000.5), 9)


def test_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's, unless the config has one; Pillow's stays as it was for everybody else."""
    path = tmp_path / "large.png"
    Image.fromarray(COLOURS).save(path)
    number = HEIGHT * WIDTH
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", number // 2 - 1)  # an error from twice as many on
    with pytest.raises(ImageFileError, match=rf"large.png: .*\({number} pixels.*tiles.*INPUT.MAX_PIXELS"):
        read_image(path)
    np.testing.assert_array_equal(ImageReader(max_pixels=number)(path), COLOURS)
    with pytest.raises(ImageFileError, match=f"36x24 are {number} pixels.*MAX_PIXELS is {number - 1}"):
        ImageReader(max_pixels=number - 1)(path)
    assert Image.MAX_IMAGE_PIXELS == number // 2 - 1
    failures = []

    def work() -> None:
        try:
            for _ in range(20):
                ImageReader(max_pixels=number)(path)
        except ImageFileError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and Image.MAX_IMAGE_PIXELS == number // 2 - 1


BROKEN = {
    "empty.jpg": (b"", "it is empty"),
    "page.jpg": (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
    "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert it"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "slice.png": (b"\0" * 128 + b"DICM", "DICOM"),
    "text.png": (b"this is text", "no such image format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_images(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageFileError, match=rf"{name}: the file cannot be decoded \(.*{message}.*Replace it"):
        read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "bmp", "gif"])
def test_damaged_files(tmp_path: Path, ending: str) -> None:
    """Cut off anywhere, or with wrong bytes: an image or an ImageFileError, and nothing else."""
    path = tmp_path / f"a.{ending}"
    Image.fromarray(COLOURS).save(path)
    content = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(content[: RANDOM.integers(1, len(content))] if RANDOM.random() < 0.5 else content)
        for place in RANDOM.integers(0, len(damaged), 3):
            damaged[place] = RANDOM.integers(0, 256)
        path.write_bytes(damaged)
        try:
            ImageReader(max_pixels=10**6)(path)
        except ImageFileError as error:
            assert str(error).startswith(f"{path}: ")


def test_folders_and_files_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(ImageFileError, match="a.jpg: the file cannot be decoded .*directory"):
        read_image(tmp_path / "a.jpg")

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    Image.fromarray(COLOURS).save(tmp_path / "b.png")
    monkeypatch.setattr(image_files.PathManager, "open", refuse)
    with pytest.raises(ImageFileError, match="b.png: .*Permission denied"):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("name", ["frames.gif", "frames.png", "pages.tif"])
def test_first_of_several_frames(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Image.fromarray(np.full_like(COLOURS, value)) for value in (0, 255))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    for _ in range(2):
        assert not read_image(tmp_path / name).any()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{name} has 2 pages or frames: the first is used" in caplog.text


def test_backslashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    r"""Names of a JSON file that was written on Windows; a file that has one in its name is that file."""
    (tmp_path / "cam1" / "left").mkdir(parents=True)
    plain = tmp_path / "cam1" / "left" / "1.png"
    Image.fromarray(COLOURS).save(plain)
    name = os.path.join(tmp_path, "cam1\\left\\1.png")
    for _ in range(2):
        assert find_file(name) == str(plain)
        np.testing.assert_array_equal(read_image(name), COLOURS)
    assert len(caplog.records) == 1 and str(plain) in caplog.text
    Image.fromarray(COLOURS[::-1]).save(name, "PNG")
    np.testing.assert_array_equal(read_image(name), COLOURS[::-1])
    for missing in ("cam2\\1.png", "none.png"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            read_image(tmp_path / missing)


def test_errors_travel_from_worker_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageFileError("a.png", "bad.")))
    assert str(error) == "a.png: bad." and error.reason == "bad."


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_images_may_be_written(tmp_path: Path, kind: str) -> None:
    """Flips make tensors of them; PyTorch warns, once in a process, of those that must not be written."""
    Image.new(kind, (5, 4)).save(tmp_path / "a.png")
    assert ImageReader("RGB")(tmp_path / "a.png").flags.writeable
