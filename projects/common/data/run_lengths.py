"""COCO's run-length encoding, checked before pycocotools sees it.

pycocotools trusts lengths of runs: where they do not fill the image, it returns uninitialised memory or never returns,
and two runs of length 0 that meet end its loop over a pair of masks too early.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

REST = "run lengths that end early after a run of foreground: the rest counts as background"


def check_rle(rle: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], list[str]]:
    """A run-length encoding of an image of ``height`` x ``width`` in a form that is safe to use.

    Args:
        rle: with ``counts``, a list of lengths down the columns, the first of them of background, or COCO's compressed
            string or bytes; and ``size``, height and width.

    Returns:
        the encoding, compressed, and what was mended in it.

    Raises:
        ValueError: size or lengths do not fit the image.
    """
    mended = []
    size = rle.get("size")
    if size is None:
        mended.append("run lengths without size: the image's is taken")
    elif _sides(size) != (height, width):
        if _sides(size) == (width, height):
            raise ValueError(
                f"'size' is {list(size)}, height and width exchanged: the image has {[height, width]}. Write [height, "
                "width] and runs down the columns"
            )
        raise ValueError(
            f"'size' is {size if isinstance(size, str) else list(size) if isinstance(size, Sequence) else size!r}: the "
            f"image has height and width {[height, width]}. Make the sizes equal"
        )
    counts = rle.get("counts")
    compressed = isinstance(counts, (str, bytes))
    runs = read_counts(counts) if compressed else _plain_runs(counts)
    total = int(runs.sum())
    if total != height * width:
        if compressed or not 0 < total < height * width or len(runs) % 2:
            raise ValueError(
                f"the runs of 'counts' sum to {total}, the image has {height * width} pixels. Encode the mask again, "
                "at the image's size"
            )
        runs = np.append(runs, height * width - total)
        mended.append(REST)
    if (runs[1:] == 0).any():
        runs = _without_zeros(runs)
        compressed = False
    if compressed:
        counts = counts if isinstance(counts, str) else counts.decode("ascii")
    else:
        plain = {"size": [height, width], "counts": runs.tolist()}
        counts = mask_util.frPyObjects(plain, height, width)["counts"].decode("ascii")
    return {"size": [height, width], "counts": counts}, mended


def read_counts(text: str | bytes) -> np.ndarray:
    """Lengths of runs, int64, of COCO's compressed form: numbers of 5 bits a character, from the third on differences.

    Raises:
        ValueError: it is none.
    """
    wrong = ValueError("'counts' is not COCO's compressed form, or damaged. Encode the mask again")
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise wrong from None
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not len(codes):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise wrong
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 6:  # more than 35 bits
        raise wrong
    values = np.add.reduceat((codes & 31) << 5 * places, starts)
    values -= ((codes[ends] & 16) > 0) * (1 << 5 * (places[ends] + 1))  # the sign
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    if runs.min() < 0 or runs.max() >= 2**32:
        raise wrong
    return runs


def _plain_runs(counts: Any) -> np.ndarray:
    """Lengths that are written out, as int64."""
    wrong = "'counts' must be a list of lengths (integers, none negative) or COCO's compressed string"
    if not isinstance(counts, (Sequence, np.ndarray)):
        raise ValueError(f"{wrong}, not {'missing' if counts is None else repr(counts)}. Encode the mask again")
    try:
        runs = np.asarray(counts)
        integers = runs.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{wrong}. Encode the mask again") from None
    allowed = runs.ndim == 1 and runs.dtype.kind in "iuf" and (integers == runs).all()
    if not allowed or ((integers < 0) | (integers >= 2**32)).any():
        raise ValueError(f"{wrong}. Encode the mask again")
    return integers


def _without_zeros(runs: np.ndarray) -> np.ndarray:
    """The same pixels with no run of length 0 but the first."""
    values = np.arange(len(runs)) % 2
    values, runs = values[runs > 0], runs[runs > 0]
    firsts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    merged = np.add.reduceat(runs, firsts)
    return np.concatenate([[0], merged]) if values[0] else merged


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, (Sequence, np.ndarray)) and not isinstance(size, str) and len(size) == 2:
        try:
            return int(size[0]), int(size[1])
        except (TypeError, ValueError, OverflowError):
            return None
    return None
