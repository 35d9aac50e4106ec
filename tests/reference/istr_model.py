"""The official weights of ISTR's reference cases."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from cases import fixture, load_document


@contextmanager
def double_precision() -> Iterator[None]:
    """New modules and tensors are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bits packed by row -> bool array."""
    return np.unpackbits(bits.reshape(shape[0], -1), axis=1)[:, : int(np.prod(shape[1:]))].reshape(shape).astype(bool)


def _initial_boxes(w: np.ndarray) -> np.ndarray:
    t = np.tanh(2 * w)
    return np.concatenate((0.5 + 0.25 * t[:, :2], 0.45 + 0.35 * t[:, 2:]), axis=1)


def _large_first(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[0] = 45
    return w


# The overrides of cases.json, by their wording there: pattern of the keys and what becomes of the weights
_DCT = "(DCT configurations only)"
_OVERRIDES = {
    "init_proposal_boxes.weight": (r"^init_proposal_boxes\.weight$", _initial_boxes, False),
    "mask_encoding.explained_variances": (
        r"^mask_encoding\.explained_variances$",
        lambda w: 1600 / (1 + np.arange(len(w))),
        False,
    ),
    "mask_encoding.means": (r"^mask_encoding\.means$", lambda w: 40 * w, False),
    "head.head_series.*.bboxes_delta.weight": (
        r"^head\.head_series\.\d+\.bboxes_delta\.weight$",
        lambda w: 0.25 * w,
        False,
    ),
    f"head.head_series.*.mask_module.6.weight {_DCT}": (
        r"^head\.head_series\.\d+\.mask_module\.6\.weight$",
        lambda w: 8 * w,
        True,
    ),
    f"head.head_series.*.mask_module.6.bias {_DCT}": (
        r"^head\.head_series\.\d+\.mask_module\.6\.bias$",
        _large_first,
        True,
    ),
}


def official_value(key: str, shape: Sequence[int], dct: bool = False) -> torch.Tensor:
    """The value of one entry of the official state dict; an override that is not known is an error."""
    unknown = set(load_document("istr")["overrides"]) - set(_OVERRIDES)
    assert not unknown, f"the cases override weights in a way that is not known here: {sorted(unknown)}"
    value = np.asarray(fixture().weight(key, shape))
    for name in load_document("istr")["overrides"]:
        pattern, change, only_dct = _OVERRIDES[name]
        if re.search(pattern, key) and (dct or not only_dct):
            value = change(value)
    return torch.from_numpy(np.ascontiguousarray(value))
