"""The one place that knows how Detectron2 versions differ, and what old packages need on current libraries.

Supported: 0.5 (also without its compiled part, as the registry has it), 0.6 and main.
"""

import functools
import importlib
import importlib.resources
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Aliases that NumPy 1.24 took away; NumPy 2 has a ``bool`` of its own again
OLD_NUMPY_NAMES = {"bool": bool, "complex": complex, "float": float, "int": int, "object": object, "str": str}
MODEL_ZOO = "detectron2.model_zoo.model_zoo"
COCO_EVALUATION = "detectron2.evaluation.coco_evaluation"
ROI_ALIGN = "torchvision.ops.roi_align"
COMPILER = "torch._dynamo.utils"


def detectron2_available() -> bool:
    """Whether a Detectron2 is installed. The operators in ``querymask.common.ops`` work without one."""
    return importlib.util.find_spec("detectron2") is not None


def _placeholder_extension() -> types.ModuleType:
    """A stand-in for ``detectron2._C`` whose functions say what is missing when they are called."""
    module = types.ModuleType("detectron2._C", "Placeholder: this Detectron2 was installed without its compiled part.")

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                f"detectron2._C.{name} was called, but this Detectron2 was installed without its compiled part. "
                "QueryMask does not need it; rotated boxes and deformable convolution of Detectron2 do: build "
                "Detectron2 from source to use them."
            )

        return function

    module.__getattr__ = missing  # type: ignore[method-assign]
    module.is_placeholder = True  # type: ignore[attr-defined]
    # What Detectron2's default_setup writes to the log
    module.get_compiler_version = module.get_cuda_version = lambda: "none: not compiled"  # type: ignore[attr-defined]
    module.has_cuda = lambda: False  # type: ignore[attr-defined]
    return module


def detectron2_cfg() -> "CfgNode":
    """Detectron2's default config, with the keys of its PointRend project where that is installed."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    if importlib.util.find_spec("detectron2.projects.point_rend") is not None:
        from detectron2.projects.point_rend import add_pointrend_config

        add_pointrend_config(cfg)
    return cfg


def detectron2_is_compiled() -> bool:
    """Whether Detectron2's own extension is there (its fast COCO evaluation needs it)."""
    if importlib.util.find_spec("detectron2") is None:
        return False
    loaded = sys.modules.get("detectron2._C")
    if loaded is not None:
        return not getattr(loaded, "is_placeholder", False)
    return importlib.util.find_spec("detectron2._C") is not None


def apply_shims() -> None:
    """Make Detectron2 work with current NumPy, Pillow and setuptools and without its compiled part.

    And have torchvision, which it imports, leave torch's compiler alone until something is compiled.
    Modules of Detectron2 that are imported already are kept, and with them their classes and what was registered.
    Nothing is touched that works by itself (most of official main).
    """
    import PIL.Image

    # Said once for every scripted function of Detectron2, torchvision and fvcore while they are imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    # Said by Detectron2's way of gathering objects from several processes
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, r"detectron2\.utils\.comm")
    if not hasattr(PIL.Image, "LINEAR"):  # removed in Pillow 10; Detectron2 <= 0.6 names it in a default argument
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]
    if not any(isinstance(finder, _MendingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MendingFinder())
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2."):
            _mend(module)
    if detectron2_is_compiled():
        return
    try:
        import detectron2.layers  # noqa: F401
    except ImportError as error:
        if "_C" not in str(error):
            raise
        import detectron2

        # Python has dropped the modules that failed, and only those: the next import executes them anew
        placeholder = _placeholder_extension()
        sys.modules["detectron2._C"] = placeholder
        detectron2._C = placeholder


class _MendingFinder:
    """Finds modules as Python does, and mends those of Detectron2 when they are executed: none is imported early."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith("detectron2.") and name != ROI_ALIGN:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_mend(module: types.ModuleType) -> None:
            with {MODEL_ZOO: _package_resources, ROI_ALIGN: _compiler_when_called}.get(name, nullcontext)():
                execute(module)
            _mend(module)

        spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


@contextmanager
def _package_resources() -> Iterator[None]:
    """Lends the model zoo, main's as well, what it asks of ``pkg_resources``, which setuptools 82 took away.

    Everybody else still finds the package missing.
    """
    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    module = types.ModuleType("pkg_resources", "Stand-in: the one function that Detectron2 uses.")
    module.resource_filename = lambda package, name: str(  # type: ignore[attr-defined]
        importlib.resources.files(package).joinpath(name)
    )
    sys.modules["pkg_resources"] = module
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


@contextmanager
def _compiler_when_called() -> Iterator[None]:
    """Lends torchvision the one function that it imports of torch's compiler.

    To import the compiler takes as long as to import all that is needed without it.
    """
    if COMPILER in sys.modules:
        yield
        return
    module = types.ModuleType(COMPILER, "Stand-in: the one function that torchvision uses.")

    def is_compile_supported(device_type: Any) -> bool:
        return importlib.import_module(COMPILER).is_compile_supported(device_type)

    def whatever_else(name: str) -> Any:  # that another torchvision uses
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(COMPILER)
        return getattr(importlib.import_module(COMPILER), name)

    is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as the real one
    module.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    module.__getattr__ = whatever_else  # type: ignore[method-assign]
    sys.modules[COMPILER] = module
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is module:
            del sys.modules[COMPILER]


def _mend(module: types.ModuleType) -> None:
    """Give an executed module of Detectron2 what it lacks at run time."""
    import numpy

    if getattr(module, "np", None) is numpy and _uses_old_names(module):
        module.np = _old_numpy()  # type: ignore[attr-defined]
    if module.__name__ == COCO_EVALUATION and getattr(sys.modules.get("detectron2._C"), "is_placeholder", False):
        module.COCOeval_opt = module.COCOeval  # type: ignore[attr-defined]  # main's choice; the same numbers, slower
    if module.__name__ == MODEL_ZOO:
        configs = Path(str(module.__file__)).parent / "configs"
        if not configs.is_dir():  # as in the registry's wheel of 0.5

            def get_config_file(config_path: str) -> str:
                raise RuntimeError(
                    f"{config_path}: this Detectron2 was installed without the configs of its model zoo ({configs} "
                    "does not exist). Copy the folder configs of Detectron2's repository there, or give the path of "
                    "the file to cfg.merge_from_file."
                )

            module.get_config_file = get_config_file  # type: ignore[attr-defined]


def _uses_old_names(module: types.ModuleType) -> bool:
    """Whether the module's source names something that this NumPy lacks."""
    import numpy

    missing = [name for name in OLD_NUMPY_NAMES if name not in vars(numpy)]
    source = getattr(module.__loader__, "get_source", lambda name: None)(module.__name__)
    return bool(missing) and re.search(rf"\bnp\.({'|'.join(missing)})\b", source or "") is not None


@functools.cache
def _old_numpy() -> types.ModuleType:
    """A view of NumPy that has the names it has lost. NumPy stays as it is for all others."""
    import numpy

    view = types.ModuleType("numpy", "NumPy with the names of its versions before 1.24.")
    view.__dict__.update({**OLD_NUMPY_NAMES, **vars(numpy)})
    return view


def coco_evaluation() -> Any:
    """The class that evaluates by COCO's rules: Detectron2's fast one where it is compiled, else pycocotools'."""
    if detectron2_is_compiled():
        from detectron2.evaluation.fast_eval_api import COCOeval_opt

        return COCOeval_opt
    from pycocotools.cocoeval import COCOeval

    return COCOeval


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes share this machine (0.5 knows no public function for it)."""
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    import torch.distributed as dist

    machine = dist.get_rank() // processes_per_machine
    for i in range(dist.get_world_size() // processes_per_machine):  # every process has to take part in every group
        group = dist.new_group(list(range(i * processes_per_machine, (i + 1) * processes_per_machine)))
        if i == machine:
            comm._LOCAL_PROCESS_GROUP = group


def has_event_storage() -> bool:
    """Whether a training loop is running (main has this function, 0.5 has not)."""
    from detectron2.utils import events

    return len(events._CURRENT_STORAGE_STACK) > 0
