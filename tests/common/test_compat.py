"""Detectron2 after ``import querymask``, in processes of their own, as what is imported first matters."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
from detectron2.data import build
from detectron2.structures import masks

from querymask.common import compat

SCRIPT = Path(__file__).parent / "first_lines.py"
DETECTRON2_FIRST = """
import sys, types
import PIL.Image
if not hasattr(PIL.Image, "LINEAR"):
    PIL.Image.LINEAR = PIL.Image.BILINEAR  # as users of Detectron2 0.5 do by themselves

import detectron2.config, detectron2.utils.events
try:
    import detectron2.data
    import detectron2.structures
except ImportError as error:  # without its compiled part
    assert "_C" in str(error)
{stub}
before = {{name: module for name, module in sys.modules.items() if name.startswith("detectron2.")}}
CfgNode, EventStorage = detectron2.config.CfgNode, detectron2.utils.events.EventStorage
Instances = sys.modules["detectron2.structures.instances"].Instances
storage = EventStorage()
with storage:
    import querymask

    assert detectron2.utils.events.get_event_storage() is storage
from detectron2.structures import Instances as AfterInstances
from detectron2.data import build

assert AfterInstances is Instances
assert isinstance(querymask.get_cfg(), CfgNode)
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import coco, load_coco_json

assert MetadataCatalog.get("shapes_train").json_file.startswith("chosen_folder")
assert coco.load_coco_json is load_coco_json is querymask.data.load_coco_json
for name, module in before.items():
    assert sys.modules[name] is module, name
build.print_instances_class_histogram([{{"annotations": [{{"category_id": 0}}]}}], ["cell"])
"""
STUB = """
# A stub of the user's own: everything can be imported before querymask
class Stub(types.ModuleType):
    is_placeholder = True
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return None
detectron2._C = sys.modules["detectron2._C"] = Stub("detectron2._C")
from detectron2.data import DatasetCatalog, MetadataCatalog
import detectron2.modeling, detectron2.engine
DatasetCatalog.register("mine", lambda: [1])
MetadataCatalog.get("mine").thing_classes = ["cell"]
"""
STUB_AFTER = """
from detectron2.data import DatasetCatalog as After, MetadataCatalog as Metadata
assert After is DatasetCatalog and After.get("mine") == [1] and Metadata.get("mine").thing_classes == ["cell"]
"""


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": "chosen_folder"}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def test_first_lines_of_users_scripts(tmp_path: Path) -> None:
    """Model zoo, default_setup, training, prediction, drawing, evaluation; other packages stay as they are."""
    run(str(SCRIPT), str(tmp_path))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Distribution of instances among all 2 categories" in log
    assert "Environment info" in log


def test_what_was_imported_before_is_kept() -> None:
    """No class and no module is there twice."""
    run("-c", DETECTRON2_FIRST.format(stub=""))


def test_what_was_registered_before_is_kept() -> None:
    run("-c", DETECTRON2_FIRST.format(stub=STUB) + STUB_AFTER)


def test_numpy_is_a_view_only_where_old_names_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build, masks):
        source = Path(str(module.__file__)).read_text()
        missing = [name for name in ("np.int", "np.bool", "np.float") if not hasattr(np, name[3:]) and name in source]
        assert (module.np is np) == (not compat._uses_old_names(module))
        assert not missing or module.np is not np
        assert module.np.float64 is np.float64
        assert module.np.linalg is np.linalg
    monkeypatch.setattr(compat, "OLD_NUMPY_NAMES", {"float64": np.float64})  # nothing is missing
    monkeypatch.setattr(build, "np", np)
    compat._mend(build)
    assert build.np is np


def test_functions_of_the_missing_part_say_so() -> None:
    """All but those that describe it, which Detectron2's default_setup writes down."""
    placeholder = compat._placeholder_extension()
    assert placeholder.get_compiler_version() == placeholder.get_cuda_version() == "none: not compiled"
    assert not placeholder.has_cuda()
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.nms_rotated was called, but .* without its compiled part"):
        placeholder.nms_rotated()
