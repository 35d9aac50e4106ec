"""A library of translated kernels, loaded: the order of its threads, its findings, its results against exact ones."""

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class Simulation:
    """One for a process, ``Simulation.loaded``: the library registers ``torch.ops.querymask_simulated``."""

    loaded: "Simulation"

    def __init__(self, library: Path):
        torch.ops.load_library(str(library))
        self.library = library
        self.handle = ctypes.CDLL(str(library))
        self.handle.simulated_take_findings.restype = ctypes.c_char_p
        Simulation.loaded = self

    def set_order(self, order: str, seed: int = 0) -> None:
        """The order in which blocks, warps and lanes run, where they have the choice."""
        self.handle.simulated_set_order(ORDERS[order], ctypes.c_uint(seed))

    def take_findings(self) -> list[str]:
        """What the kernels did since the last call that they must not do; places are named by file and line."""
        lines = self.handle.simulated_take_findings().decode().splitlines()
        addresses = sorted({match for line in lines for match in re.findall(r"@(\d+)", line)})
        places = dict(zip(addresses, self.places(addresses)))
        named = [re.sub(r"@(\d+)", lambda match: places[match.group(1)], line) for line in lines]
        return list(dict.fromkeys(named))

    def places(self, addresses: list[str]) -> list[str]:
        command = ["addr2line", "-e", str(self.library), *(hex(int(address) - 1) for address in addresses)]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):
            return addresses
        return [line.partition(" ")[0].partition("csrc/")[2] or line for line in output]


def tolerance(exact: Tensor, dtype: torch.dtype, slack: float | None) -> float:
    """Allowed errors: rounding in sums, and for 16 bits also twice the error of the rounded exact numbers."""
    scale = exact.abs().nan_to_num(0, 0, 0).max().item() if exact.numel() else 0.0
    if dtype == torch.float64:
        return 1e-11 * scale
    if dtype == torch.float32:
        return (slack or 2e-5) * scale
    rounding = (exact.to(dtype).double() - exact).abs().nan_to_num(0, 0, 0).max().item() if exact.numel() else 0.0
    return 2 * rounding + (slack or 1e-5) * scale


def check_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    where: Tensor | None = None,
    slack: float | None = None,
) -> None:
    """Raises an AssertionError unless ``actual`` is in ``dtype`` and near ``exact`` (``where`` it counts)."""
    assert actual.dtype == dtype, f"{name} is in {actual.dtype}, not in {dtype}"
    assert actual.shape == exact.shape, f"{name} has the shape {list(actual.shape)}, not {list(exact.shape)}"
    error = (actual.double() - exact.double()).abs()
    wrong = ~(error <= tolerance(exact.double(), dtype, slack)) & ~(actual.isnan() & exact.isnan())
    wrong &= actual.double() != exact.double()  # equal infinities have no difference
    if where is not None:
        wrong &= where
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} is wrong in {int(wrong.sum())} of {wrong.numel()} places, first at {list(first)}: "
            f"{actual[first].item()} instead of {exact[first].item()}"
        )


def check_deterministic(run: Callable[[], list[Tensor]]) -> None:
    """Raises an AssertionError unless results are the same bits in all orders, where PyTorch shall be deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for order, seed in (("forward", 0), ("reverse", 0), ("random", 5)):
            Simulation.loaded.set_order(order, seed)
            results.append(run())
    finally:
        torch.use_deterministic_algorithms(False)
    for number, tensors in enumerate(zip(*results)):
        assert all(torch.equal(tensors[0], tensor) for tensor in tensors), f"result {number} depends on threads' order"


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy ``offset`` elements behind an address that is aligned to 64 bytes, with nothing behind it in memory."""
    size = tensor.element_size()
    memory = torch.empty(math.ceil(64 / size) + offset + tensor.numel(), dtype=tensor.dtype)
    start = -memory.data_ptr() % 64 // size + offset
    result = memory[start : start + tensor.numel()].view(tensor.shape)
    return result.copy_(tensor)
