"""Pictures of what goes on inside a method: a registry that methods fill and demo.py shows.

A method registers its views in ``querymask/<method>/figures.py``, which ``find_views`` imports; training does not.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

View = Callable[[nn.Module, dict[str, Any], np.ndarray, Sequence[str], float], np.ndarray]
"""(model in evaluation mode, its input for one image, the image as uint8 [H, W, 3] RGB at the input's height and width,
class names, least score drawn) -> picture as uint8 [H', W', 3] RGB, of the same size for the same H and W."""

METHOD_FOLDERS = ("solq", "isda", "istr", "effseg")

_VIEWS: dict[str, tuple[str, View]] = {}


def register_view(name: str, meta_architecture: str) -> Callable[[View], View]:
    """Decorator that makes a view of models of a meta-architecture known under a name."""

    def register(view: View) -> View:
        if name in _VIEWS:
            raise ValueError(f"there is a view {name!r} already: give this one another name")
        _VIEWS[name] = (meta_architecture, view)
        return view

    return register


def find_views() -> dict[str, tuple[str, View]]:
    """(meta-architecture, view) of every name."""
    for method in METHOD_FOLDERS:
        if importlib.util.find_spec(f"querymask.{method}.figures") is not None:
            importlib.import_module(f"querymask.{method}.figures")
    return dict(_VIEWS)


def choose_view(name: str, meta_architecture: str) -> View:
    """The view of a name.

    Raises:
        ValueError: there is none, or it is for other models.
    """
    views = find_views()
    fitting = ", ".join(sorted(n for n, (architecture, _) in views.items() if architecture == meta_architecture))
    if name not in views:
        raise ValueError(f"there is no view {name!r}; {meta_architecture} has {fitting or 'none'}")
    architecture, view = views[name]
    if architecture != meta_architecture:
        raise ValueError(f"view {name!r} is for {architecture}; {meta_architecture} has {fitting or 'none'}")
    return view
