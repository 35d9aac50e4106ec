"""What the reader of annotations finds: things that it mends, one line a kind, and things that it refuses."""

import logging
from collections.abc import Callable
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_SAID: set[str] = set()

XYXY = "bbox is [x0, y0, x1, y1] in place of [x, y, width, height], converted"

XYWH = "bbox is [x, y, width, height] in place of the stated [x0, y0, x1, y1], converted"


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
        self._boxes = self._misfits = self._exact = 0
        self._undecided: str | None = None
        self._ambiguous: list[tuple[dict[str, Any], list[float], str]] = []

    def mend(self, what: str, where: str | Callable[[], str]) -> None:
        """Count a thing that was mended; ``where`` is asked for the first of a kind only."""
        if what not in self._counts:
            self._first[what] = where if isinstance(where, str) else where()
        self._counts[what] = self._counts.get(what, 0) + 1

    def count_fit(self, fits: bool, exactly: bool) -> None:
        """Count a box with a mask, and whether it is about the mask's, and exactly so."""
        self._boxes += 1
        self._misfits += not fits
        self._exact += exactly

    def note_undecided(self, where: str) -> None:
        """Note a box that may be [x, y, width, height] or corners: neither mask nor area shows which."""
        self._undecided = self._undecided or where

    def note_ambiguous(self, annotation: dict[str, Any], converted: list[float], where: str) -> None:
        """Note a box near the image's corner that is that of its mask as corners, and but a pixel off as it stands."""
        self._ambiguous.append((annotation, converted, where))

    def _decide_ambiguous(self) -> None:
        """Take ambiguous boxes as the other boxes of the file are; as corners where there are none.

        That they are a pixel larger than their masks by a convention, others must show, by being so, too.
        """
        others = self._boxes - len(self._ambiguous)
        if 2 * self._counts.get(XYXY, 0) >= others or 2 * self._exact > others:
            for annotation, converted, where in self._ambiguous:
                annotation["bbox"] = converted
                self.mend(XYXY, where)

    def refuse_misfits(self) -> None:
        """Raise the error where boxes of the whole file do not fit together.

        That is where most are not about those of their masks (a few may be, of hidden objects), or where some are
        corners and others may be.
        """
        self._decide_ambiguous()
        if self._undecided and XYXY in self._counts:
            self.refuse(
                self._undecided,
                f"'bbox' may be corners, as that of {self._first[XYXY]} is, but neither mask nor area shows it",
                "Write all boxes as [x, y, width, height]",
            )
        if self._misfits > self._boxes / 2:
            self.refuse(
                f"{self._misfits} of {self._boxes} annotations with a mask",
                "'bbox' covers less than half of what 'segmentation' does, or more than twice as much",
                "Bring both to pixels of the image, bbox as [x, y, width, height]",
            )

    def refuse(self, where: str, problem: str, remedy: str) -> NoReturn:
        """Raise the error."""
        raise AnnotationError(f"{self.source}: {where}: {problem}. {remedy}.") from None

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
