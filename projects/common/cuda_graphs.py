"""A network as CUDA graphs: one launch a call in place of more than a thousand, with which the host can be the slower.

A graph repeats the same kernels on the same memory, so there is one for every shape of the arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from querymask.common.transfer import capture


class CudaGraphs:
    """Calls of one function on tensors without gradient, captured by the shapes of its arguments.

    The first call with some shapes is an ordinary one; the second is captured, and further ones are replayed. All
    graphs share one pool of memory: **what a call returns is overwritten by the next call**, also one of other shapes.
    Parameters are read where they are: after they have moved, call :meth:`clear`.

    Args:
        limit: shapes that are remembered; beyond, those are dropped that were not used for the longest time.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"TEST.CUDA_GRAPHS.MAX_SIZES is {limit}: set at least 1")
        self.limit = limit
        self.clear()

    def __reduce__(self) -> tuple[type["CudaGraphs"], tuple[int]]:
        return CudaGraphs, (self.limit,)  # a copy captures for itself

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        self._calls: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._place: tuple[Any, Any] | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``.

        Args:
            function: the same in all calls; neither waits for the GPU nor copies from the host.
            arguments: tensors on the GPU, and hashable constants.
        """
        if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return function(*arguments)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (autocast, *(_signature(argument) for argument in arguments))
        if key not in self._calls:
            self._remember(key, None)
            return function(*arguments)
        captured = self._calls[key]
        if captured is None:
            if self._place is None:
                self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            captured = _Captured(function, arguments, autocast, *self._place)
        self._remember(key, captured)
        return captured.replay(arguments)

    def _remember(self, key: Hashable, captured: "_Captured | None") -> None:
        self._calls[key] = captured
        self._calls.move_to_end(key)
        while len(self._calls) > self.limit:
            self._calls.popitem(last=False)


class _Captured:
    """One graph, with the tensors that it reads and writes.

    Args:
        autocast: type of mixed precision, None for none.
        pool, stream: those of all graphs that share memory.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        autocast: torch.dtype | None,
        pool: Any,
        stream: Any,
    ) -> None:
        self.arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        self.graph = torch.cuda.CUDAGraph()
        # Weights that autocast has rounded and kept would be freed at its end, and the graph would read them
        with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose kernels and workspaces for a stream at their first call
                function(*self.arguments)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on: that of a data loader allocates pinned memory
            mode = "thread_local"
            with capture(), torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode=mode):
                self.outputs = function(*self.arguments)

    def replay(self, arguments: Sequence[Any]) -> Any:
        for own, given in zip(self.arguments, arguments, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(given)
        self.graph.replay()
        return self.outputs


def _signature(argument: Any) -> Hashable:
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype, argument.device
    return argument


def build_cuda_graphs(cfg: CfgNode) -> CudaGraphs | None:
    """The graphs that ``TEST.CUDA_GRAPHS`` asks for, None for none.

    Raises:
        ValueError: the model is not on a GPU.
    """
    if not cfg.TEST.CUDA_GRAPHS.ENABLED:
        return None
    if torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise ValueError(
            f"TEST.CUDA_GRAPHS.ENABLED is True, but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: CUDA graphs need an NVIDIA "
            "GPU. Set MODEL.DEVICE cuda, or TEST.CUDA_GRAPHS.ENABLED False"
        )
    return CudaGraphs(cfg.TEST.CUDA_GRAPHS.MAX_SIZES)
