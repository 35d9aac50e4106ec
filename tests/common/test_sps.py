"""Structure-preserving sparsity: the structure itself, against dense maps."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from querymask.common import sps
from querymask.common.sps import SparseMap, keep_highest

shapes = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refine(dense: Tensor, steps: int, seed: int) -> tuple[SparseMap, Tensor]:
    """A map after steps of splitting, refining and changing the active features, and the same as a dense map."""
    sparse, regions = SparseMap.from_dense(dense), dense.shape[0]
    for step in range(steps):
        keep = normal(len(sparse.active), seed=seed + step) > 0
        sparse = sparse.split(keep).upsample()
        dense = interpolate(dense, scale_factor=2) if regions else dense.new_zeros(0, dense.shape[1], *_twice(dense))
        added = normal(*sparse.active.shape, seed=seed + 10 + step)
        sparse = sparse.replace_active(sparse.active + added)
        region, y, x = sparse.cells.long().unbind(1)
        dense[region, :, y, x] += added
    return sparse, dense


def _twice(dense: Tensor) -> tuple[int, int]:
    return 2 * dense.shape[2], 2 * dense.shape[3]


def test_docstring():
    """The example of the class."""
    found = doctest.testmod(sps, extraglobs={"torch": torch})
    assert found.attempted > 5
    assert found.failed == 0


@settings(max_examples=40, deadline=None)
@given(shape=shapes, steps=st.integers(0, 3), seed=st.integers(0, 1000))
def test_refinement_keeps_the_dense_map(shape, steps, seed):
    """A cell that is left behind keeps its feature; active ones are stored once, and know where they are."""
    sparse, dense = refine(normal(*shape, seed=seed), steps, seed)
    num_active, num_passive = len(sparse.active), len(sparse.passive)
    assert torch.equal(sparse.dense(), dense)
    assert sparse.index_map.dtype == sparse.cells.dtype == torch.int32
    region, y, x = sparse.cells.long().unbind(1)
    assert torch.equal(sparse.index_map[region, y, x], torch.arange(num_active, dtype=torch.int32))
    counts = sparse.index_map.long().flatten().bincount(minlength=num_active + num_passive)
    assert (counts[:num_active] == 1).all()
    assert (counts[num_active:] >= 1).all()  # none is stored in vain
    assert len(counts) == num_active + num_passive


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    steps=st.integers(0, 2),
    kernel_size=st.sampled_from([(1, 1), (3, 3), (3, 5)]),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_convolution_and_gathering(shape, steps, kernel_size, dilation, seed):
    sparse, dense = refine(normal(*shape, seed=seed), steps, seed)
    weight, bias = normal(3, shape[1], *kernel_size, seed=1), normal(3, seed=2)
    padding = [size // 2 * step for size, step in zip(kernel_size, dilation)]
    region, y, x = sparse.cells.long().unbind(1)
    expected = conv2d(dense, weight, bias, padding=padding, dilation=dilation)[region, :, y, x]
    torch.testing.assert_close(sparse.conv2d(weight, bias, dilation), expected)
    gathered = sparse.gather(kernel_size, dilation)
    assert gathered.shape == (len(sparse.active), kernel_size[0] * kernel_size[1], shape[1])
    product = torch.einsum("nkc,ock->no", gathered, weight.flatten(2)) + bias
    torch.testing.assert_close(product, expected)


def test_order_of_rows():
    """Regions, rows, columns at first; the newly passive ones after the old ones; children row-major."""
    dense = torch.arange(8.0).view(2, 1, 2, 2)
    sparse = SparseMap.from_dense(dense)
    assert sparse.active.flatten().tolist() == list(range(8))
    assert sparse.cells.tolist()[:5] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    keep = torch.tensor([False, True, True, False, False, True, True, True])
    sparse = sparse.split(keep)
    assert sparse.active.flatten().tolist() == [1, 2, 5, 6, 7]
    assert sparse.passive.flatten().tolist() == [0, 3, 4]
    sparse = sparse.split(torch.tensor([True, False, False, True, True]))
    assert sparse.active.flatten().tolist() == [1, 6, 7]
    assert sparse.passive.flatten().tolist() == [0, 3, 4, 2, 5]
    sparse = sparse.upsample()
    assert sparse.active.flatten().tolist() == [1, 1, 1, 1, 6, 6, 6, 6, 7, 7, 7, 7]
    assert sparse.cells.tolist()[4:8] == [[1, 2, 0], [1, 2, 1], [1, 3, 0], [1, 3, 1]]
    assert torch.equal(sparse.dense(), interpolate(dense, scale_factor=2))


def test_gradients_reach_active_and_passive_features():
    """A passive feature that fills several cells gets the sum over them."""
    dense = normal(1, 2, 2, 2, seed=0).requires_grad_()
    sparse = SparseMap.from_dense(dense).split(torch.tensor([True, False, False, False])).upsample()
    grad = normal(1, 2, 4, 4, seed=1)
    (actual,) = torch.autograd.grad(sparse.dense(), dense, grad)
    expected = grad.view(1, 2, 2, 2, 2, 2).sum((3, 5))
    torch.testing.assert_close(actual, expected)


def test_keep_highest():
    scores = torch.tensor([3.0, -1.0, 2.0, 5.0])
    assert keep_highest(scores, 2).tolist() == [True, False, False, True]
    assert keep_highest(scores, 4).all() and keep_highest(scores, 9).all()
    assert not keep_highest(scores, 0).any()
    assert keep_highest(scores[:0], 3).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 20])
def test_split_highest(count: int):
    sparse = SparseMap.from_dense(normal(2, 3, 2, 2, seed=0))
    for scores in (normal(8, seed=1), normal(min(count, 8), seed=2)):
        expected, sparse = sparse.split(keep_highest(scores, count)), sparse.split_highest(scores, count)
        for name in ("active", "passive", "index_map", "cells"):
            assert torch.equal(getattr(sparse, name), getattr(expected, name)), name
    with pytest.raises(ValueError, match=rf"scores must be \[{min(count, 8)}\], got shape \[9\]"):
        sparse.split_highest(torch.zeros(9), 2)


def test_replaced_features():
    """Their width may change, together."""
    sparse = SparseMap.from_dense(normal(1, 3, 2, 2, seed=0)).split(torch.tensor([True, False, True, True]))
    wider = sparse.replace_features(torch.ones(3, 5), torch.zeros(1, 5))
    assert wider.dense()[0, 4].tolist() == [[1, 0], [1, 1]]
    assert wider.index_map is sparse.index_map
    assert torch.equal(sparse.replace_active(sparse.active + 1).passive, sparse.passive)


def test_errors():
    sparse = SparseMap.from_dense(normal(1, 3, 2, 2, seed=0)).split(torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=r"features must be \[R, F, H, W\], got shape \[3, 4\]"):
        SparseMap.from_dense(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"keep must be \[3\] booleans, got shape \[4\] of torch.bool"):
        sparse.split(torch.ones(4).bool())
    with pytest.raises(ValueError, match=r"keep must be \[3\] booleans, got shape \[3\] of torch.float32"):
        sparse.split(torch.ones(3))
    with pytest.raises(ValueError, match=r"active must be \[3, 3\], with active's channels, got \[2, 3\]"):
        sparse.replace_active(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"passive must be \[1, 5\], with active's channels, got \[1, 3\]"):
        sparse.replace_active(torch.zeros(3, 5))
