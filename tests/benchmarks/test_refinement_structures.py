"""The structures of benchmarks/refinement_structures.py compute the same, but for what they say they ignore."""

from types import ModuleType
from typing import Any

import pytest
import torch
from tool_loader import load_tool
from torch import Tensor

REGIONS, COUNT, WIDTH = 3, 150, 4
EXACT = ["Dense", "Neighbors", "SparseOnDense", "SPS"]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_tool("refinement_structures", "benchmarks")


def make_case(module: ModuleType, side: int, dilations: list[int] | None = None) -> Any:
    weights = module.Weights.draw(WIDTH, dilations or [1, 2, 5], torch.float64, "cpu")
    return module.Case(side, REGIONS, COUNT, weights)


def slowly(case: Any) -> Tensor:
    """Child by child, from the dense map and the definition of the refinement."""
    coarse, scores = case.sparse.dense().permute(0, 2, 3, 1), case.scores.tolist()
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    refined = [tuple(case.sparse.cells[row].tolist()) for row in sorted(order[: case.count])]
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).clone()
    children = []
    for region, y, x in refined:
        added = case.weights.child @ coarse[region, y, x] + case.weights.child_bias
        for child in range(4):
            place = region, 2 * y + child // 2, 2 * x + child % 2
            fine[place] = coarse[region, y, x] + added[WIDTH * child : WIDTH * child + WIDTH]
            children.append(place)
    outputs = []
    for region, y, x in children:
        total = torch.zeros(WIDTH, dtype=fine.dtype)
        for kernel, bias, dilation in zip(case.weights.kernels, case.weights.biases, case.weights.dilations):
            result = bias
            for i in range(3):
                for j in range(3):
                    row, column = y + dilation * (i - 1), x + dilation * (j - 1)
                    if 0 <= row < fine.shape[1] and 0 <= column < fine.shape[2]:
                        result = result + kernel[:, :, i, j] @ fine[region, row, column]
            total = total + result.relu()
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("side", [14, 28])
@torch.no_grad()
def test_results(module: ModuleType, side: int) -> None:
    """All that see neighbours give what the definition does; Pointwise, what it does without neighbours."""
    case = make_case(module, side)
    expected = slowly(case)
    assert len(expected) == 4 * COUNT and (len(case.sparse.passive) > 0) == (side > 14)
    for name in EXACT:
        assert torch.allclose(module.STRUCTURES[name](case).refine()[0], expected), name
    pointwise = module.Pointwise(case)
    assert not torch.allclose(pointwise.refine()[0], expected, rtol=0.1)
    for kernel in case.weights.kernels:
        middle = kernel[:, :, 1, 1].clone()
        kernel.zero_()[:, :, 1, 1] = middle
    torch.testing.assert_close(pointwise.refine()[0], slowly(case))


def test_gradients(module: ModuleType) -> None:
    """Of the weights they are the same."""
    case = make_case(module, 28)
    leaves = case.weights.leaves()
    expected = torch.autograd.grad(module.SPS(case).refine()[0].square().sum(), leaves)
    for name in EXACT:
        found = torch.autograd.grad(module.STRUCTURES[name](case).refine()[0].square().sum(), leaves)
        for one, other in zip(found, expected):
            assert torch.allclose(one, other), name


@torch.no_grad()
def test_storage(module: ModuleType) -> None:
    """In features: every cell, every child, with its neighbours, and each feature once."""
    case = make_case(module, 28, dilations=[1, 3])
    cells = REGIONS * 56**2
    passive = len(case.sparse.passive) + len(case.sparse.active) - COUNT
    numbers = {
        "Dense": cells,
        "Pointwise": 4 * COUNT,
        "Neighbors": 4 * COUNT * (9 + 8),
        "SparseOnDense": cells,
        "SPS": 4 * COUNT + passive,
    }
    for name, number in numbers.items():
        assert module.STRUCTURES[name](case).refine()[1][0].numel() == number * WIDTH, name
