"""Names of the pictures that are made of images."""

import os
from pathlib import PurePosixPath


class PictureNames:
    """Gives every image the name of its picture; images of one name, of different folders or endings, get numbers.

    Args:
        ending: of the pictures, ".png" or ".jpg".
    """

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self._taken: set[str] = set()

    def __call__(self, file: str | os.PathLike) -> str:
        """Name of the picture of an image file, without folder, another one at each call."""
        stem = PurePosixPath(os.fspath(file).replace("\\", "/")).stem or "image"
        name, number = stem, 2
        while name.casefold() in self._taken:  # files "A" and "a" are one on macOS and Windows
            name, number = f"{stem}_{number}", number + 1
        self._taken.add(name.casefold())
        return f"{name}{self.ending}"
