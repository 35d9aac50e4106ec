"""Packages that only some uses need."""

import importlib
from typing import Any


def import_package(module: str, purpose: str, install: str) -> Any:
    """A module of a package that may be missing.

    Args:
        purpose: what needs the package, with the verb: "slices of images need".
        install: what pip installs.

    Raises:
        ImportError: it is not installed, or does not load; says what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} the package {package} ({error}): pip install '{install}'") from error
