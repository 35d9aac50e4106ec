"""From an image file to 8-bit pixels: the same for training, evaluation, the demo and every picture."""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from querymask.common.data.deep_images import deep_samples, sample_layout, white_is_zero

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = set(".avif .bmp .gif .heic .heif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
"""Of files of a folder that are taken for images."""
ORIENTATION = 274
"""EXIF's (and TIFF's) tag of the orientation, 1 to 8: 1 is upright, 5 to 8 exchange width and height."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's limit of pixels is a variable of its module
_LIMIT_LOCK = threading.Lock()

_told: set[str] = set()


class ImageFileError(ValueError):
    """An image file cannot be used; ``reason`` is the message without the file's name."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple:  # worker processes send it to the main one
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class ImageReader:
    """Reads image files. Those of 8 bits give the pixels that ``detectron2.data.detection_utils.read_image`` gives.

    Args:
        format: of the result: "RGB", "BGR", or another that Detectron2's function knows.
        pixel_range: (low, high), the values of 16-bit, 32-bit and float samples that become 0 and 255, those between
            linearly, those beyond cut off; empty: such files are refused.
        max_pixels: images with more are refused; 0: Pillow's limit, about 179 million.
    """

    format: str = "RGB"
    pixel_range: Sequence[float] = ()
    max_pixels: int = 0

    def __post_init__(self) -> None:
        if len(self.pixel_range) == 0:
            return
        if len(self.pixel_range) != 2 or not -np.inf < self.pixel_range[0] < self.pixel_range[1] < np.inf:
            raise ValueError(
                f"INPUT.PIXEL_RANGE is {list(self.pixel_range)}: give two numbers, [low, high] with low < high, or "
                "an empty list"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, format: str = "RGB") -> "ImageReader":
        """With INPUT.PIXEL_RANGE and INPUT.MAX_PIXELS."""
        return cls(format, tuple(cfg.INPUT.PIXEL_RANGE), cfg.INPUT.MAX_PIXELS)

    def __call__(self, path: str | os.PathLike) -> np.ndarray:
        """The image of a file, upright, as uint8 [H, W, 3] for the formats RGB and BGR.

        Raises:
            FileNotFoundError: there is no such file.
            ImageFileError: it cannot be used; the message names the file and the remedy.
        """
        return self.read(path)[0]

    def read(self, path: str | os.PathLike) -> tuple[np.ndarray, int]:
        """The image as from ``__call__``, and the EXIF orientation of its file (1: none), which was applied."""
        path = find_file(os.fspath(path))
        with self._limit(), _decoding(path), PathManager.open(path, "rb") as file:
            image = Image.open(file)
            self._check_pixels(path, image)
            layout = sample_layout(image)  # known until the pixels are loaded, as reading EXIF of PNG files does
            _tell_frames(path, image)
            orientation = _orientation(image)
            samples = deep_samples(image, layout, file)
            image.load()
            remaining = _orientation(image)  # 1 for TIFF files, which Pillow turns itself
        if samples is not None:
            image = self._to_8_bits(path, image, samples)
        with _decoding(path):
            if remaining in _TURNS:
                image = image.transpose(_TURNS[remaining])
            array = convert_PIL_to_numpy(image, self.format)
        return np.require(array, requirements="W"), orientation  # flips make a tensor of it, which asks for that

    def _to_8_bits(self, path: str, image: Image.Image, samples: np.ndarray) -> Image.Image:
        """The image of samples of more than 8 bits (or signed ones), [H, W] or [H, W, 3]."""
        if np.isnan(samples).any():
            raise ImageFileError(
                path, f"{int(np.isnan(samples).sum())} samples are NaN: give them a number before the file is written."
            )
        if len(self.pixel_range) == 0:
            raise ImageFileError(
                path,
                f"the samples are {samples.dtype} (mode {image.mode}), from {_number(samples.min())} to "
                f"{_number(samples.max())}, "
                "and the model takes 8 bits. Set INPUT.PIXEL_RANGE to [low, high], the values that become black and "
                "white in all images, the same for training, evaluation and demo; or write the files with 8 bits.",
            )
        low, high = self.pixel_range
        _tell_once(
            "range",
            f"{path}: samples are {samples.dtype}; INPUT.PIXEL_RANGE maps {low:g} to black and {high:g} to white, in "
            "this file and in all others of more than 8 bits",
        )
        values = samples.astype(np.float64)
        values -= low
        values *= 255 / (high - low)
        np.clip(values, 0, 255, out=values)
        if white_is_zero(image):
            np.subtract(255, values, out=values)
        return Image.fromarray(np.rint(values, out=values).astype(np.uint8))

    @contextmanager
    def _limit(self) -> Iterator[None]:
        """Pillow's limit off while our own is used."""
        if not self.max_pixels:
            yield
            return
        with _LIMIT_LOCK:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                yield
            finally:
                Image.MAX_IMAGE_PIXELS = limit

    def _check_pixels(self, path: str, image: Image.Image) -> None:
        width, height = image.size
        if self.max_pixels and width * height > self.max_pixels:
            raise ImageFileError(
                path,
                f"{width}x{height} are {width * height} pixels, and INPUT.MAX_PIXELS is {self.max_pixels}. Cut it "
                "into tiles, reduce it, or raise the key, if the memory is enough.",
            )


def read_image(path: str | os.PathLike, format: str = "RGB") -> np.ndarray:
    """``ImageReader(format)(path)``: uint8 [H, W, 3] of an 8-bit image file, upright."""
    return ImageReader(format)(path)


def find_file(path: str) -> str:
    r"""The path, with slashes for backslashes where only that is a file: ``cam1\1.png`` in a JSON file of Windows.

    Raises:
        FileNotFoundError: neither is there.
    """
    if PathManager.exists(path):
        return path
    other = path.replace("\\", "/")
    if other != path and PathManager.exists(other):
        _tell_once(
            "backslashes", f"there is no {path}: {other} is used, and slashes for backslashes in other names too"
        )
        return other
    raise FileNotFoundError(f"{path}: there is no such file")


def _number(value: np.generic) -> str:
    return str(value) if isinstance(value, np.integer) else f"{value:g}"


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 as well where EXIF data are broken (detectron2#1885)."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # whatever the parser meets
        return 1
    return orientation if orientation in _TURNS else 1


def _tell_frames(path: str, image: Image.Image) -> None:
    """Of several pages or frames, the first is read."""
    number = getattr(image, "n_frames", 1)
    if number > 1 and image.format != "MPO":  # whose further pictures are previews, or the other eye's view
        _tell_once("frames", f"{path} has {number} pages or frames: the first is used, in other such files too")


def _tell_once(topic: str, message: str) -> None:
    """Once in this process: thousands of files may be alike."""
    if topic not in _told:
        _told.add(topic)
        logger.warning(message)


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    """What can go wrong in Pillow becomes ImageFileError."""
    try:
        yield
    except ImageFileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFileError(
            path,
            f"the image has more pixels than Pillow allows ({error}). Cut it into tiles or reduce it; or, if the file "
            "can be trusted and the memory is enough, set INPUT.MAX_PIXELS to its number of pixels.",
        ) from error
    except MemoryError as error:
        raise ImageFileError(
            path, "there is not enough memory for the image. Reduce it or cut it into tiles."
        ) from error
    except Exception as error:  # of some forty decoders, which broken files make fail with nearly anything
        kind = "" if isinstance(error, (OSError, ValueError, SyntaxError)) else f"{type(error).__name__}: "
        reason = _what_it_is(path) if isinstance(error, UnidentifiedImageError) else f"{kind}{error}"
        raise ImageFileError(path, f"the file cannot be decoded ({reason}). Replace it.") from error


def _what_it_is(path: str) -> str:
    """Of a file that is no image to Pillow."""
    with PathManager.open(path, "rb") as file:
        head = file.read(256)
    kinds = {
        "it is empty": not head,
        "it is a web page, as failed downloads leave it": head.lstrip().lower().startswith((b"<!doctype", b"<html")),
        "it is a pointer of Git LFS: git lfs pull fetches the image": head.startswith(b"version https://git-lfs"),
        "it is a HEIC photograph: convert it to JPEG or PNG": head[4:12] in _HEIC,
        "a TIFF file of a kind that Pillow does not read: write 8 bits, or one channel of 16 bits or floats": head[:4]
        in (b"II*\0", b"MM\0*"),
        "it is a DICOM file: convert it to PNG or TIFF": head[128:132] == b"DICM",
    }
    return next((text for text, true in kinds.items() if true), "Pillow knows no such image format")


_HEIC = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")}
