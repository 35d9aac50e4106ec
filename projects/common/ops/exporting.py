"""Which form of a function runs while a model is exported or compiled.

Operators of the extension have no place in an ONNX file, and what depends on values has no fixed size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_exporting = False


@contextmanager
def exporting() -> Iterator[None]:
    """Within it, functions run the forms that :func:`exportable` names."""
    global _exporting
    previous, _exporting = _exporting, True
    try:
        yield
    finally:
        _exporting = previous


def exportable(form: Callable[P, R], compiled: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that :func:`exporting` replaces.

    Args:
        form: gives the same, of operators that ONNX has, and of sizes that follow from those of its arguments.
        compiled: so does ``torch.compile``, in whose graph no size may depend on values.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            replaced = _exporting or (compiled and torch.compiler.is_compiling())
            return (form if replaced else function)(*args, **kwargs)

        return call

    return decorate
