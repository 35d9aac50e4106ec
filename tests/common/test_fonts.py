"""Names of any script in pictures."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from querymask.common import fonts

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
OWN, STIX, MATHS, LAST = (
    str(FOLDER / name) for name in ("DejaVuSans.ttf", "STIXGeneral.ttf", "cmsy10.ttf", "LastResortHE-Regular.ttf")
)
FRAKTUR = "\U0001d50d"  # in STIX, not in DejaVu Sans
CAT = "\u732b"  # in none of Matplotlib's fonts


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The system's fonts: what a test puts into the list."""
    found: list[str] = []
    monkeypatch.setattr(fonts, "_system_fonts", lambda characters: iter(found))
    for name in ("_known", "_lacking"):
        monkeypatch.setattr(fonts, name, type(getattr(fonts, name))())
    monkeypatch.setattr(fonts, "_preferred", "")
    yield found


def drawn(text: str, size: int = 20) -> np.ndarray:
    picture = Image.new("L", (200, 40))
    fonts.write(ImageDraw.Draw(picture), (5, 5), text, size, (255,))
    return np.asarray(picture)


def with_pillow(text: str, font: str, size: int = 20) -> np.ndarray:
    picture = Image.new("L", (200, 40))
    baseline = 5 + ImageFont.truetype(OWN, size).getmetrics()[0]
    ImageDraw.Draw(picture).text((5, baseline), text, fill=255, font=ImageFont.truetype(font, size), anchor="ls")
    return np.asarray(picture)


@pytest.mark.parametrize("text", ["cat 0.93", "größe", "Ящик", "AVA fi", "", "e\u0301"])
def test_text_of_our_own_font(text: str, system: list[str]) -> None:
    system.append(STIX)
    np.testing.assert_array_equal(drawn(text), with_pillow(text, OWN))
    assert [Path(font.path).name for _, font in fonts.runs(text, 20)] == ["DejaVuSans.ttf"] * bool(text)
    draw = ImageDraw.Draw(Image.new("L", (200, 40)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=ImageFont.truetype(OWN, 14))
    assert fonts.text_extent(text, 14) == ((right, top, bottom) if text else (0, 0, 0))


def test_characters_from_the_system(system: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first font that has them and can be read; boxes for everything are no characters."""
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    system.extend([str(broken), str(tmp_path / "gone.ttf"), LAST, MATHS, STIX])
    np.testing.assert_array_equal(drawn(FRAKTUR), with_pillow(FRAKTUR, STIX))
    text = f"a {FRAKTUR}{FRAKTUR} b"
    parts = [(part, Path(font.path).name) for part, font in fonts.runs(text, 20)]
    assert parts == [("a ", "DejaVuSans.ttf"), (f"{FRAKTUR}{FRAKTUR} ", "STIXGeneral.ttf"), ("b", "DejaVuSans.ttf")]
    widths = [fonts.text_extent(part, 20)[0] for part in ("a ", f"{FRAKTUR}{FRAKTUR} ", "b")]
    assert fonts.text_extent(text, 20)[0] == pytest.approx(sum(widths), abs=3)
    assert not caplog.records


def test_one_line_where_no_font_has_them(system: list[str], caplog: pytest.LogCaptureFixture) -> None:
    system.append(STIX)
    for _ in range(2):
        drawing = drawn(f"{CAT} 0.5")
    np.testing.assert_array_equal(drawing, with_pillow(f"{CAT} 0.5", OWN))  # a box and the number
    drawn("\u72d7")  # another
    assert len(caplog.records) == 1 and f"characters {CAT} of names" in caplog.text and "VIS_FONT" in caplog.text
    # What the system has is drawn all the same
    np.testing.assert_array_equal(drawn(FRAKTUR), with_pillow(FRAKTUR, STIX))


def test_font_of_the_config(tmp_path: Path, system: list[str]) -> None:
    try:
        fonts.set_font(STIX)
        assert [Path(font.path).name for _, font in fonts.runs(f"cat {FRAKTUR}", 20)] == ["STIXGeneral.ttf"]
        fonts.set_font(MATHS)  # letters are not in it
        assert {Path(font.path).name for _, font in fonts.runs("\u2135 cat", 20)} == {"cmsy10.ttf", "DejaVuSans.ttf"}
    finally:
        fonts.set_font("")
    assert [Path(font.path).name for _, font in fonts.runs("cat", 20)] == ["DejaVuSans.ttf"]
    (tmp_path / "text.ttf").write_text("no font")
    for path in (tmp_path / "text.ttf", tmp_path / "gone.ttf", tmp_path):
        with pytest.raises(ValueError, match=f"VIS_FONT is '{path}', which is no font"):
            fonts.set_font(str(path))


def test_control_characters_are_spaces() -> None:
    np.testing.assert_array_equal(drawn("a\nb\tc"), drawn("a b c"))


def test_fonts_of_this_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without fontconfig, those that Matplotlib finds, plain ones first."""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [f"/f/{name}" for name in ("Bold-Italic.ttf", "Serif.ttf", "Sans.ttf")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    assert list(fonts._system_fonts({CAT})) == ["/f/Sans.ttf", "/f/Serif.ttf", "/f/Bold-Italic.ttf"]
