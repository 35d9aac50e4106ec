"""Inputs for the operators' tests."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class MsdaInputs(NamedTuple):
    """Arguments of ``multi_scale_deformable_attention``, in its order."""

    value: Tensor
    spatial_shapes: list[tuple[int, int]]
    sampling_locations: Tensor
    attention_weights: Tensor

    @property
    def flat(self) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """Arguments of the operator in ``torch.ops.querymask``."""
        return self[0], [size for shape in self[1] for size in shape], self[2], self[3]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[0], self[2], self[3]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_msda_inputs() -> Callable[..., MsdaInputs]:
    """A function that makes inputs with a third of the samples outside, and some on the border's pixel centres."""

    def make(
        spatial_shapes: Sequence[tuple[int, int]] = ((5, 4), (3, 6), (1, 1)),
        batch: int = 2,
        queries: int = 5,
        heads: int = 3,
        channels: int = 7,
        points: int = 2,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
    ) -> MsdaInputs:
        generator = torch.Generator().manual_seed(seed)
        levels = len(spatial_shapes)
        tokens = sum(height * width for height, width in spatial_shapes)
        value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
        locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64)
        locations = 1.6 * locations - 0.3
        weights = torch.rand(batch, queries, heads, levels, points, generator=generator, dtype=torch.float64)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return MsdaInputs(
            value.to(device, dtype), list(spatial_shapes), locations.to(device, exact), weights.to(device, dtype)
        )

    return make
