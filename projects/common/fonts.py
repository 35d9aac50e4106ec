"""Text of any script in pictures: fonts that have its characters, from the system where our own lacks them."""

import logging
import os
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Run = tuple[str, ImageFont.FreeTypeFont]
"""Text of one font."""

# Files to take characters from, the first that has them; what set_font was given and our own are the first
_known: list[str] = []
_preferred = ""
# Characters that no font has
_lacking: set[str] = set()


def set_font(path: str) -> None:
    """Draw text with this TrueType or OpenType file from now on, in this process; "": with DejaVu Sans.

    Raises:
        ValueError: it is not a font.
    """
    global _preferred
    if path:
        try:
            _load(path, 14)
        except OSError as error:
            raise ValueError(
                f"VIS_FONT is {path!r}, which is no font file that can be read ({error}). Give the path of a "
                "TrueType or OpenType file, or leave it empty"
            ) from error
    if path != _preferred:
        _preferred = path
        _known.clear()
        _lacking.clear()


def text_extent(text: str, size: int) -> tuple[float, float, float]:
    """Width, top and bottom of a line in pixels, top and bottom measured downwards from where ``write`` puts it."""
    baseline = _load(_fonts()[0], size).getmetrics()[0]
    start, boxes = 0.0, [(0.0, 0.0, 0.0)] if not text else []
    for part, font in runs(text, size):
        _, top, right, bottom = font.getbbox(part, anchor="ls")
        boxes.append((start + right, baseline + top, baseline + bottom))
        start += font.getlength(part)
    rights, tops, bottoms = zip(*boxes)
    return max(rights), min(tops), max(bottoms)


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: tuple[int, ...]) -> None:
    """Draw a line of text with its left end and the top of its first font's ascenders at ``place`` (x, y)."""
    x, y = place
    baseline = y + _load(_fonts()[0], size).getmetrics()[0]
    for part, font in runs(text, size):
        draw.text((x, baseline), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part)


@cache
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _characters(path: str) -> frozenset[str]:
    """What a font file has glyphs for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(path).get_charmap()))


def runs(text: str, size: int) -> list[Run]:
    """A line cut where its font changes; what no font has is left to the first font, which draws boxes."""
    clusters = _clusters("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text))
    _look_for({character for cluster in clusters for character in cluster})
    result: list[tuple[str, str]] = []
    for cluster in clusters:
        fitting = [font for font in _fonts() if _has(font, cluster)]
        font = fitting[0] if fitting else _fonts()[0]
        if cluster.isspace() and result:
            font = result[-1][1]
        if result and result[-1][1] == font:
            result[-1] = (result[-1][0] + cluster, font)
        else:
            result.append((cluster, font))
    return [(part, _load(font, size)) for part, font in result]


def _clusters(text: str) -> list[str]:
    """Characters with the marks that follow them."""
    clusters: list[str] = []
    for character in text:
        if clusters and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _has(font: str, text: str) -> bool:
    # Joiners, directions and variation selectors have no glyphs of their own
    return all(c in _characters(font) or unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f" for c in text)


def _fonts() -> list[str]:
    if not _known:
        import matplotlib

        own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
        _known.extend([_preferred, own] if _preferred else [own])
    return _known


def _look_for(characters: Iterable[str]) -> None:
    """Make fonts known that have these characters: one for all of them, else one for each."""
    missing = {c for c in characters if not any(_has(font, c) for font in _fonts())} - _lacking
    if not missing:
        return
    found = _system_font(missing)
    for font in [found] if found else filter(None, (_system_font({c}) for c in sorted(missing))):
        if font not in _known:
            _known.append(font)
    lacking = {c for c in missing if not any(_has(font, c) for font in _known)}
    if lacking and not _lacking:
        logger.warning(
            f"no font of this system has the characters {' '.join(sorted(lacking))} of names in pictures, where boxes "
            "are drawn for them and for others like them: set VIS_FONT to the path of a font file that has them, or "
            "install one"
        )
    _lacking.update(lacking)


def _system_font(characters: set[str]) -> str | None:
    """A font of the system that has all of these characters and can be drawn at any size."""
    for path in _system_fonts(characters):
        if "lastresort" in Path(path).name.lower():  # boxes for everything
            continue
        try:
            _load(path, 14)
            if all(_has(path, c) for c in characters):
                return path
        except (OSError, RuntimeError):  # bitmap fonts, damaged files, formats that FreeType does not know
            continue
    return None


def _system_fonts(characters: set[str]) -> Iterator[str]:
    """Paths of fonts: in fontconfig's order of preference where it is there, then all that Matplotlib finds."""
    codes = " ".join(f"{ord(c):x}" for c in sorted(characters))
    command = ["fc-match", "--all", "--format=%{file}\\n", f"sans-serif:charset={codes}"]
    try:
        yield from subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # not installed
        pass
    from matplotlib import font_manager

    plain = {path: _plainness(path) for path in map(os.fspath, font_manager.findSystemFonts())}
    yield from sorted(plain, key=lambda path: (plain[path], path))


def _plainness(path: str) -> int:
    """0 for an upright sans serif of regular weight, by its name."""
    name = Path(path).name.lower()
    return sum(word in name for word in ("bold", "black", "italic", "oblique", "light", "thin", "mono", "serif"))
