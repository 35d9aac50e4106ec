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


class SpsInputs(NamedTuple):
    """Arguments of ``sparse_conv2d``, in its order."""

    features: Tensor
    index_map: Tensor
    cells: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: tuple[int, ...]

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, list[int]]:
        """Arguments of the operator in ``torch.ops.querymask``."""
        return *self[:5], list(self.dilation)

    @property
    def tensors(self) -> list[Tensor]:
        """Those with gradients."""
        return [self.features, self.weight, *([] if self.bias is None else [self.bias])]

    def replace_tensors(self, tensors: Sequence[Tensor]) -> "SpsInputs":
        """The same inputs with other features, weight and bias, in the order of ``tensors``."""
        bias = None if self.bias is None else tensors[2]
        return self._replace(features=tensors[0], weight=tensors[1], bias=bias)


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


@pytest.fixture(scope="session")  # for hypothesis
def make_sps_inputs() -> Callable[..., SpsInputs]:
    """A function that makes inputs where several cells share a row, some rows have no cell, and cells come in no order.

    The first cells are the corners of the last region, as far as there are that many.
    """

    def make(
        rows: int = 30,
        regions: int = 2,
        size: tuple[int, int] = (5, 7),
        active: int = 23,
        channels: tuple[int, int] = (4, 3),
        kernel_size: tuple[int, int] = (3, 3),
        dilation: tuple[int, ...] = (1, 1),
        bias: bool = True,
        dtype: torch.dtype = torch.float64,
        index_dtype: torch.dtype = torch.int32,
        device: str = "cpu",
        seed: int = 0,
    ) -> SpsInputs:
        generator = torch.Generator().manual_seed(seed)
        sizes = (regions, *size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        index_map = torch.randint(max(rows, 1), sizes, generator=generator)
        cells = torch.stack([torch.randint(max(n, 1), (active,), generator=generator) for n in sizes], 1)
        corners = torch.tensor([[regions - 1, y, x] for y in (0, size[0] - 1) for x in (0, size[1] - 1)])
        cells[:4] = corners[:active]
        inputs, outputs = channels
        return SpsInputs(
            normal(rows, inputs),
            index_map.to(device, index_dtype),
            cells.to(device, index_dtype),
            normal(outputs, inputs, *kernel_size),
            normal(outputs) if bias else None,
            dilation,
        )

    return make
