"""Reading pickles of NumPy arrays without trusting them.

Detectron2's ``.pkl`` files are pickled dictionaries of arrays. Unpickling calls what the file names, and even NumPy's
own functions can be abused that way. So nothing that the file names is called: the few names that a pickled array needs
are mapped to the small stand-ins below, everything else is refused.
"""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from querymask.common.checkpoint.rules import CheckpointError


class _Refused(Exception):
    """The file holds something that is not accepted; the message names it."""


class _Dtype:
    """Stands for ``numpy.dtype``: numbers and booleans only, never objects or records."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[<>|=]?(b1|[iuf][1248])", code):
            raise _Refused(f"an array of type {code!r}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise _Refused(f"a byte order {order!r}")
        self.code = order + self.code.lstrip("<>|=")


class _Array:
    """Stands for ``numpy.ndarray``: keeps what the file says about an array until ``array`` is asked for."""

    def __init__(
        self, shape: tuple[int, ...] = (0,), dtype: Any = None, data: Any = b"", fortran: bool = False
    ) -> None:
        self.__setstate__((1, shape, dtype, fortran, data))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    @property
    def array(self) -> np.ndarray:
        """The array itself; its data is a copy, so it can be written to."""
        if not isinstance(self.dtype, _Dtype):
            raise _Refused("an array without a type")
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # str: a pickle of Python 2
        values = np.frombuffer(data, np.dtype(self.dtype.code))
        values = values.reshape(self.shape, order="F" if self.fortran else "C")
        return np.array(values, values.dtype.newbyteorder("="), order="C")


def _reconstruct(kind: type, shape: Any, code: Any) -> _Array:
    return _Array()  # its contents follow by __setstate__


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    return _Array(shape, dtype, bytes(data), order == "F")


def _scalar(dtype: _Dtype, data: Any) -> _Array:
    return _Array((), dtype, data)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"an encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_STAND_INS = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,  # protocol 2 has no bytes: it writes text and its encoding,
    "__builtin__.bytes": _no_bytes,  # or this, for none
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def load_arrays(path: Path) -> Any:
    """Read a pickle that holds arrays, numbers and text in plain containers.

    Raises:
        CheckpointError: the file is damaged, or holds anything else; nothing of it was run.
    """
    try:
        with path.open("rb") as file:
            return _resolve(_Unpickler(file, encoding="latin1").load())
    except _Refused as error:
        raise CheckpointError(
            f"{path}: the pickle holds {error}, which is not an array of numbers; nothing in it was run. "
            "Only Detectron2's .pkl files are read this way."
        ) from error
    except Exception as error:  # a damaged pickle can fail anywhere in the interpreter of its opcodes
        raise CheckpointError(f"{path}: damaged or incomplete ({error}). Download it again.") from error


def _resolve(content: Any) -> Any:
    """Replace the stand-ins by arrays, in dictionaries, lists and tuples."""
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, dict):
        return {key: _resolve(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_resolve(value) for value in content]
    return content
