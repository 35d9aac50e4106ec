"""Samples of image files with more than 8 bits, of which Pillow keeps only the high byte, or cuts them off at 255."""

import re
from typing import IO

import cv2
import numpy as np
from PIL import Image

_SAMPLE_FORMAT, _BITS, _PHOTOMETRIC, _ORIENTATION = 339, 258, 262, 274  # tags of TIFF
_SIGNED = 2

# Pillow's names of the layouts in files: 16 bits a channel. "BGR;16" is another thing: 5, 6 and 5 bits
_COLOUR_16 = re.compile(r"(L|LA|RGB|RGBA|RGBX);16[BLN]")
_ANY_16 = re.compile(r"\w+;16[BLN]")


def deep_samples(image: Image.Image, layout: str, file: IO[bytes]) -> np.ndarray | None:
    """The samples as they are in the file; None for an image of 8 bits.

    Args:
        image: just opened.
        layout: its ``sample_layout``.
        file: that it was opened from; its position is kept.

    Returns:
        integers or floats, [H, W] or [H, W, 3] RGB (an alpha channel is left out, as Pillow does), turned as Pillow
        turns TIFF files.

    Raises:
        ValueError: 16-bit colours of a kind that cannot be read.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I") or image.mode == "F":
        unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] == 1 and tags.get(_BITS, (0,))[0] == 32  # Pillow makes it signed
        samples = np.asarray(image)
        return samples.view(np.uint32) if unsigned and samples.dtype == np.int32 else samples
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED:
        return np.asarray(image).view(np.int8)
    if not _ANY_16.fullmatch(layout):
        return None
    return _colours(image, layout, file)


def white_is_zero(image: Image.Image) -> bool:
    """Whether the greatest sample is black, which Pillow heeds only for up to 8 bits."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def sample_layout(image: Image.Image) -> str:
    """Pillow's "raw mode" of the pixels in a file, of which none was loaded yet; "" where a decoder has none."""
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if image.format == "PPM" and isinstance(arguments, tuple) and isinstance(arguments[1], int) and arguments[1] > 255:
        return f"{first};16B"
    return first if isinstance(first, str) else ""


def _colours(image: Image.Image, layout: str, file: IO[bytes]) -> np.ndarray:
    """Channels of 16 bits, with OpenCV."""
    position = file.tell()
    file.seek(0)
    content = np.frombuffer(file.read(), np.uint8)
    file.seek(position)
    upright = getattr(image, "tag_v2", {}).get(_ORIENTATION, 1) == 1  # OpenCV fails on some TIFF files that are not
    pixels = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if upright and _COLOUR_16.fullmatch(layout) else None
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != image.size[::-1]:
        turned = "" if upright else ", turned"
        raise ValueError(f"16-bit samples of the layout {layout}{turned} in a {image.format} file: convert it to PNG")
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, 2::-1])
