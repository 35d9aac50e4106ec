"""What the reader of annotations finds: things that it mends, one line a kind, and things that it refuses."""

import logging
from collections.abc import Callable
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_SAID: set[str] = set()


class AnnotationError(ValueError):
    """Annotations that give no right number as they are; the message names file, thing, key and remedy."""


class Findings:
    """Collects what was mended in one file or data set.

    Args:
        source: the file or the data set, as messages call it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._boxes = self._misfits = 0

    def mend(self, what: str, where: str | Callable[[], str]) -> None:
        """Count a thing that was mended; ``where`` is asked for the first of a kind only."""
        if what not in self._counts:
            self._first[what] = where if isinstance(where, str) else where()
        self._counts[what] = self._counts.get(what, 0) + 1

    def count_fit(self, fits: bool) -> None:
        """Count a box with a mask, and whether it is about the mask's."""
        self._boxes += 1
        self._misfits += not fits

    def refuse_misfits(self) -> None:
        """Raise the error where most boxes are not about those of their masks; a few may be, of hidden objects."""
        if self._misfits > self._boxes / 2:
            self.refuse(
                f"{self._misfits} of {self._boxes} annotations with a mask",
                "'bbox' covers less than half of what 'segmentation' does, or more than twice as much",
                "Bring both to pixels of the image, bbox as [x, y, width, height]",
            )

    def refuse(self, where: str, problem: str, remedy: str) -> NoReturn:
        """Raise the error."""
        raise AnnotationError(f"{self.source}: {where}: {problem}. {remedy}.")

    def lines(self) -> list[str]:
        """What was mended, how often and where first."""
        return [f"{self.source}: {w}: {n} time(s), first {self._first[w]}" for w, n in self._counts.items()]

    def log(self) -> None:
        """Write the lines, each once in a process: a file is read for training, evaluation and pictures."""
        for line in self.lines():
            if line not in _SAID:
                _SAID.add(line)
                logger.warning(line)


def show(value: Any, length: int = 60) -> str:
    """A value in a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
