"""CUDA graphs without a GPU: what a capture launches is written down, operator by operator, and a replay repeats that.

As on a GPU, Python runs at the capture alone, a replay reads and writes the captured tensors, and an operator that the
host would have to wait for is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave"}
"""Operators whose result or its size the host must know."""


def storages(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Recorder(TorchDispatchMode):
    """Inside, operators are appended to ``launches``."""

    def __init__(self, launches: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        if name in WAITING or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        output = function(*args, **kwargs)
        self.launches.append((function, args, kwargs, output))
        return output


class RecordedGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, output in self.launches:
            given = storages((args, kwargs))
            for old, new in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and not given & storages(old):
                    old.copy_(new)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Put the recorder in the place of CUDA's functions.

    Returns:
        the graphs that are captured from now on.
    """
    graphs: list[RecordedGraph] = []

    @contextmanager
    def graph(recorded: RecordedGraph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        graphs.append(recorded)
        with Recorder(recorded.launches):
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return graphs
