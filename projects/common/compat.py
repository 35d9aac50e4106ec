"""The one place that knows how Detectron2 versions differ, and what old packages need on current libraries.

Supported: 0.5 (also without its compiled part, as the registry has it), 0.6 and main.
"""

import importlib.util
import sys
import types
import warnings
from typing import Any


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
                "QueryMask does not need it; rotated boxes, deformable convolution and the fast COCO evaluation of "
                "Detectron2 do: build Detectron2 from source to use them."
            )

        return function

    module.__getattr__ = missing  # type: ignore[method-assign]
    module.is_placeholder = True  # type: ignore[attr-defined]
    return module


def detectron2_is_compiled() -> bool:
    """Whether Detectron2's own extension is there (its fast COCO evaluation needs it)."""
    if importlib.util.find_spec("detectron2") is None:
        return False
    loaded = sys.modules.get("detectron2._C")
    if loaded is not None:
        return not getattr(loaded, "is_placeholder", False)
    return importlib.util.find_spec("detectron2._C") is not None


def apply_shims() -> None:
    """Make ``import detectron2`` work under current Pillow and without the compiled part, where it needs help.

    Nothing is touched where Detectron2 imports by itself (official main).
    """
    import PIL.Image

    # Said once for every scripted function of Detectron2, torchvision and fvcore while they are imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    # Said by Detectron2's way of gathering objects from several processes
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, r"detectron2\.utils\.comm")
    if not hasattr(PIL.Image, "LINEAR"):  # removed in Pillow 10; Detectron2 <= 0.6 names it in a default argument
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]
    if detectron2_is_compiled():
        return
    try:
        import detectron2.layers  # noqa: F401
    except ImportError as error:
        if "_C" not in str(error):
            raise
        for name in [n for n in sys.modules if n.startswith("detectron2.")]:
            del sys.modules[name]
        import detectron2

        placeholder = _placeholder_extension()
        sys.modules["detectron2._C"] = placeholder
        detectron2._C = placeholder


def mend_lvis() -> None:
    """Make the package lvis evaluate under current NumPy, which has lost a name that it uses. NumPy stays as it is."""
    import lvis.eval
    import numpy

    if not hasattr(numpy, "float"):
        mended = types.ModuleType("numpy", "NumPy with the name that lvis uses.")
        mended.__dict__.update(vars(numpy), float=float)
        lvis.eval.np = mended


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
