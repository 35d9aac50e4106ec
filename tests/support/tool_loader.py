"""The scripts in tools/ and benchmarks/, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_tool(name: str, folder: str = "tools") -> ModuleType:
    """The module of ``FOLDER/NAME.py``, once for all tests."""
    key = f"{folder}_{name}"
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))  # as when a tool runs: some import others
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[key] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[key]
