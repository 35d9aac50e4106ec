"""The CUDA kernels, translated and run on the CPU, against the PyTorch twins; README.md tells what else is checked."""

from collections.abc import Callable

import pytest
from check_kernels import wanted_cases
from kernel_build import REPOSITORY, Builder, missing
from kernel_mistakes import missing_texts
from kernel_simulation import Simulation

CASES = [(name, run) for name, run in wanted_cases([]) if "-large-" not in name]
ORDERS = ("forward", "reverse", "random")


@pytest.fixture(scope="session")
def simulation() -> Simulation:
    if reason := missing():
        pytest.skip(reason)
    return Simulation(Builder(REPOSITORY / "csrc", "plain").build())


@pytest.mark.parametrize(
    ("run", "order"), [(run, ORDERS[i % 3]) for i, (_, run) in enumerate(CASES)], ids=[name for name, _ in CASES]
)
def test_kernel(run: Callable[[], None], order: str, simulation: Simulation) -> None:
    simulation.set_order(order, seed=1)
    simulation.take_findings()  # of a test before that stopped
    run()
    assert simulation.take_findings() == []


def test_mistakes_have_their_places() -> None:
    """A kernel that changed where ``check_kernels.py --mistakes`` plants one needs another mistake there."""
    assert missing_texts(REPOSITORY / "csrc") == []
