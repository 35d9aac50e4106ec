"""What is found in a folder of annotations of another program."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from querymask.common.data.annotations.images import Size, file_size
from querymask.common.data.image_files import IMAGE_ENDINGS
from querymask.common.data.segmentation import Segmentation, clean_segmentation


@dataclass
class Photo:
    """A photograph with its objects.

    Attributes:
        file: of the image; of another one where ``content`` is given, the name alone counts.
        size: height and width, upright.
        part: "train", "val", "test", or "" where the source has no parts.
        objects: class, segmentation (polygons or RLE), whether it is a crowd.
        content: of the image file, where annotations hold it.
    """

    file: Path
    size: Size
    part: str = ""
    objects: list[tuple[str, Segmentation, bool]] = field(default_factory=list)
    content: bytes | None = None

    def add_mask(self, name: str, mask: np.ndarray, crowd: bool = False) -> None:
        """Add an object of a class by its pixels, bool [H, W]."""
        self.objects.append((name, clean_segmentation(mask, *self.size)[0], crowd))


@dataclass
class Source:
    """All that was found.

    Attributes:
        photos: with all their objects.
        left_out: photographs that cannot be used or whose objects cannot all be read, and the reasons. (An object
            that is missing in a photograph would be learned as background.)
        remarks: what else the user should know.
        classes: in the order of their numbers; those of the objects that are not in it come after.
    """

    photos: list[Photo] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def leave_out(self, file: Path, reason: str) -> None:
        """Note a photograph that is not taken over."""
        self.left_out.append(f"{file}: {reason}")


def image_files(folder: Path, deep: bool = False) -> list[Path]:
    """Photographs in a folder by name, with those below it if ``deep``."""
    files = folder.rglob("*") if deep else folder.glob("*")
    return sorted(f for f in files if f.suffix.lower() in IMAGE_ENDINGS and not f.name.startswith(".") and f.is_file())


def by_stem(files: Iterable[Path], folder: Path) -> dict[str, list[Path]]:
    """Files by their path below a folder without ending."""
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return found


def new_photo(source: Source, file: Path, part: str = "") -> Photo | None:
    """A photograph without objects; one that cannot be read is left out."""
    size = file_size(file)
    if size is None:
        source.leave_out(file, "it cannot be read as an image")
        return None
    return Photo(file, size, part)


def read_mask(file: str | os.PathLike[str] | Any) -> np.ndarray:
    """The samples of a mask or label image, [H, W], of palettes the indices, of colours the largest one.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            if image.mode in ("LA", "PA", "RGBA"):
                image = image.convert({"LA": "L", "PA": "L"}.get(image.mode, "RGB"))
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({error})") from None
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels
