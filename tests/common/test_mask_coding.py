"""DCT coding of masks against SciPy and a walk along the diagonals."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch.autograd import gradcheck

from querymask.common.mask_coding import DCTMaskCoding, binarize_at_half_range, zigzag_order


@pytest.fixture
def double() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def walk(size: int) -> list[tuple[int, int]]:
    """Cells in zig-zag order, by moving from cell to cell and turning at the edges."""
    row, column, rising, cells = 0, 0, True, []
    while len(cells) < size * size:
        cells.append((row, column))
        if rising:
            if column == size - 1:
                row, rising = row + 1, False
            elif row == 0:
                column, rising = column + 1, False
            else:
                row, column = row - 1, column + 1
        elif row == size - 1:
            column, rising = column + 1, True
        elif column == 0:
            row, rising = row + 1, True
        else:
            row, column = row + 1, column - 1
    return cells


def random_masks(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, size, size, generator=generator) < 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 8, 128])
def test_zigzag_order(size: int) -> None:
    assert list(zigzag_order(size)) == walk(size)


@pytest.mark.parametrize(("size", "length"), [(1, 1), (2, 3), (7, 20), (28, 60), (28, 784), (64, 256), (128, 256)])
def test_dct(double: None, size: int, length: int) -> None:
    masks = random_masks(3, size)
    coding = DCTMaskCoding(size, length)
    vectors = coding.encode(masks)
    coefficients = dctn(masks.numpy().astype(float), type=2, norm="ortho", axes=(1, 2))
    rows, columns = zip(*walk(size)[:length], strict=True)
    expected = coefficients[:, rows, columns]
    assert vectors.shape == (3, length)
    assert np.allclose(vectors, expected, rtol=0, atol=1e-12)
    assert torch.equal(vectors, coding.encode(masks.double()))

    kept = np.zeros_like(coefficients)
    kept[:, rows, columns] = expected
    maps = coding.decode(vectors)
    assert np.allclose(maps, idctn(kept, type=2, norm="ortho", axes=(1, 2)), rtol=0, atol=1e-12)
    if length == size**2:
        assert torch.allclose(maps, masks.double(), rtol=0, atol=1e-12)


def test_dct_is_neither_centred_nor_scaled() -> None:
    vectors = DCTMaskCoding(128, 256).encode(torch.ones(1, 128, 128))
    assert vectors[0, 0].item() == pytest.approx(128, rel=1e-5)
    assert vectors[0, 1:].abs().max() < 1e-4


def test_dct_of_nothing() -> None:
    coding = DCTMaskCoding(28, 60)
    assert coding.encode(torch.zeros(0, 28, 28, dtype=torch.bool)).shape == (0, 60)
    assert coding.decode(torch.zeros(0, 60)).shape == (0, 28, 28)


def test_gradient_of_decoding(double: None) -> None:
    """For losses on decoded maps."""
    assert gradcheck(DCTMaskCoding(6, 10).decode, (torch.randn(2, 10, requires_grad=True),))


def test_autocast_does_not_change_codes() -> None:
    coding = DCTMaskCoding(32, 100)
    masks = random_masks(2, 32)
    vectors = coding.encode(masks)
    maps = coding.decode(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coding.encode(masks), vectors)
        assert torch.equal(coding.decode(vectors), maps)


def test_checkpoints_hold_no_tables() -> None:
    coding = DCTMaskCoding(28, 60)
    assert not coding.state_dict() and not list(coding.parameters())
    assert coding.double().encode(random_masks(1, 28)).dtype == torch.float64


@pytest.mark.parametrize("length", [0, 785])
def test_impossible_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"a 28x28 mask has 784 DCT coefficients, not {length}"):
        DCTMaskCoding(28, length)


def test_binarize_at_half_range() -> None:
    """The threshold is each map's own, also where all of it lies above 0.5; strictly above."""
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.6]], [[2.0, 4.0], [3.0, 3.1]], [[0.7, 0.7], [0.7, 0.7]]])
    expected = [[[False, True], [False, True]], [[False, True], [False, True]], [[False, False], [False, False]]]
    assert binarize_at_half_range(maps).tolist() == expected
    assert binarize_at_half_range(maps[:0]).shape == (0, 2, 2)
