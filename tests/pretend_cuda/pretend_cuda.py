"""Lets torch believe in one CUDA device, which is the host's memory and processor (see README.md)."""

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE = HERE / "host_device.cpp"
TORCH = Path(torch.__file__).parent
NAME = "Pretended GPU"


class Event(NamedTuple):
    """Something between host and device.

    Attributes:
        kind: "wait" of the host for the device, blocking "upload" from the host, "async_upload", "async_download".
        operator: such as ``aten::nonzero``.
        detail: of what.
        line: the innermost line of the project that it came from, or of a test.
        node: the backward function that it came from, or "".
    """

    kind: str
    operator: str
    detail: str
    line: str
    node: str

    @property
    def blocks(self) -> bool:
        """Whether the host stands still for it."""
        return not self.kind.startswith("async")

    def __str__(self) -> str:
        node = f" in {self.node}" if self.node else ""
        return f"{self.kind} at {self.line}: {self.operator}{node} ({self.detail})"


_listeners: list[Callable[[Event], None]] = []
_library: ModuleType | None = None


def missing() -> str | None:
    """Why the device cannot be had here; None if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if torch.version.cuda is None:
        return "needs a torch built for CUDA"
    if _library is None and torch.cuda.is_available():
        return "there is a real GPU"
    return None if shutil.which("g++") else "needs g++"


def install() -> None:
    """Puts the device in place, for good. Builds it where it has to.

    Raises:
        RuntimeError: it cannot be had here.
    """
    global _library
    if _library is not None:
        return
    if reason := missing():
        raise RuntimeError(f"no pretended GPU: {reason}")
    import torchvision  # noqa: F401  its operators must be there to be replaced

    library = _build()
    library.install(_on_event)
    _library = library
    _replace_cuda_functions(library)
    torch.backends.cudnn.enabled = False
    torch.autograd.set_multithreading_enabled(False)  # whatever happens in a backward pass has the caller's line
    torch._C._jit_override_can_fuse_on_gpu(False)  # TorchScript would compile for it
    torch._C._jit_set_texpr_fuser_enabled(False)


def adopt_querymask() -> None:
    """Serves the project's operators by their CPU kernels, as if they had been built with CUDA."""
    from querymask.common.ops import extension, registration

    if extension.EXTENSION.error is not None or extension.EXTENSION.build["cuda"] == NAME:
        return
    for name in registration.OPERATORS:
        _library.adopt(f"querymask::{name}")
    extension.EXTENSION.build["cuda"] = NAME


@contextmanager
def events() -> Iterator[list[Event]]:
    """Collects what happens inside between host and device."""
    found: list[Event] = []
    _listeners.append(found.append)
    try:
        yield found
    finally:
        _listeners.remove(found.append)


@contextmanager
def never_blocks() -> Iterator[None]:
    """Raises AssertionError where something inside makes the host stand still."""

    def refuse(event: Event) -> None:
        assert not event.blocks, str(event)

    _listeners.append(refuse)
    try:
        yield
    finally:
        _listeners.remove(refuse)


def _on_event(kind: str, operator: str, detail: str = "") -> None:
    if _listeners:
        node = torch._C._current_autograd_node()
        event = Event(kind, operator, detail, _project_line(), node.name() if node is not None else "")
        for listener in list(_listeners):
            listener(event)


def _project_line() -> str:
    """The innermost line of the project; where there is none, of its tests; else the innermost one outside of torch."""
    best, best_rank = "?", 0
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        inside = file.startswith(f"{ROOT}/") and not file.startswith((f"{ROOT}/.venv/", str(HERE / "pretend_cuda.py")))
        rank = 0 if file.startswith((str(TORCH), str(HERE / "pretend_cuda.py"))) else 1
        if inside:
            rank = 2 if file.startswith(f"{ROOT}/tests/") else 3
        if rank > best_rank:
            best, best_rank = f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno}", rank
        frame = frame.f_back
    return best


def _build() -> ModuleType:
    """Compiles the device, once for each state of its source and of torch; several processes may ask at a time."""
    versions = f"{torch.__version__} {sys.version}"
    state = hashlib.sha256(SOURCE.read_bytes() + versions.encode()).hexdigest()[:12]
    library = ROOT / "build" / "pretend_cuda" / f"host_device_{state}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process that dies gives it back
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            include = TORCH / "include"
            command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", f"-isystem{include}"]
            command += [f"-isystem{include}/torch/csrc/api/include", f"-isystem{sysconfig.get_path('include')}"]
            command += [str(SOURCE), "-o", str(unfinished), f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", "-ltorch_python"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the pretended GPU cannot be built: {' '.join(command)}\n{done.stderr}")
            unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("host_device", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Event:
    """Stands for ``torch.cuda.Event``: all work is done when it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end._time - self._time)

    def synchronize(self) -> None:
        _on_event("wait", "torch.cuda.Event.synchronize")

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        """Of a stream, not of the host."""


class _Stream:
    """Stands for ``torch.cuda.Stream``; there is but one order."""

    cuda_stream, device_index = 0, 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        _on_event("wait", "torch.cuda.Stream.synchronize")

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None:
        pass


class _CUDAGraph:
    """Stands for ``torch.cuda.CUDAGraph``: the operators that were captured, run again on the same memory.

    Within a capture, as on a GPU, whatever makes the host wait raises.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph: Any = None

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        _library.begin_capture()

    def capture_end(self) -> None:
        self._graph = _library.end_capture()

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph = None

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class _Capture:
    """Stands for ``torch.cuda.graph``."""

    default_capture_stream = None

    def __init__(self, cuda_graph: _CUDAGraph, *args: Any, **kwargs: Any) -> None:
        self.cuda_graph = cuda_graph

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self.cuda_graph.capture_begin()

    def __exit__(self, *args: object) -> None:
        self.cuda_graph.capture_end()


def _replace_cuda_functions(library: ModuleType) -> None:
    """Replaces what would ask the driver."""
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32, gcnArchName=""
    )
    stream = _Stream()
    driver = {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda device: None,
        "_cuda_synchronize": lambda: _on_event("wait", "torch.cuda.synchronize"),
        "_cuda_emptyCache": lambda: None,
        "_cuda_memoryStats": lambda device: {},
        "_cuda_resetPeakMemoryStats": lambda device: None,
    }
    for name, value in driver.items():
        assert hasattr(torch._C, name), f"this torch has no torch._C.{name}"
        setattr(torch._C, name, value)
    public = {
        "device_count": lambda: 1,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: stream or _Stream(),
        "graph_pool_handle": lambda: (0, 0),
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _CUDAGraph,
        "graph": _Capture,
        "_sleep": lambda cycles: None,
    }
    for name, value in public.items():
        setattr(torch.cuda, name, value)
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = library.is_capturing
    torch.cuda._cached_device_count = 1
    torch.cuda._initialized = True
    torch.cuda.default_generators = (library.default_generator(),)

    plain_new = torch.UntypedStorage.__new__

    def new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        """Storages that are made by themselves (deepcopy, torch.load) come from CUDA's own allocator."""
        if device is not None and torch.device(device).type == "cuda" and all(isinstance(a, int) for a in args):
            return torch.empty(*args or (0,), dtype=torch.uint8, device=device).untyped_storage()
        return plain_new(cls, *args, **({} if device is None else {"device": device}), **kwargs)

    torch.UntypedStorage.__new__ = new_storage
