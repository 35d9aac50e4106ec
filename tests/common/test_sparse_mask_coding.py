"""Sparse coding of masks against coordinate descent and the optimality conditions of the Lasso."""

from pathlib import Path

import numpy as np
import pytest
import torch

from querymask.common.mask_coding import (
    MissingBasisError,
    SparseBasis,
    SparseMaskCoding,
    build_mask_coding,
    fill_missing_bases,
)

SIZE = 8


def random_masks(count: int) -> torch.Tensor:
    return torch.rand(count, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5


def random_basis(length: int, penalty: float = 0.3) -> SparseBasis:
    dictionary = np.random.default_rng(0).standard_normal((length, SIZE**2))
    return SparseBasis(dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True), penalty)


def make_coding(length: int, penalty: float = 0.3) -> SparseMaskCoding:
    """In float64, also the dictionary."""
    basis = random_basis(length, penalty)
    coding = SparseMaskCoding(SIZE, length, basis).double()
    coding.dictionary.data = torch.from_numpy(basis.dictionary)
    coding.penalty.data.fill_(penalty)
    return coding


def coordinate_descent(signal: np.ndarray, dictionary: np.ndarray, penalty: float) -> np.ndarray:
    """The Lasso, one entry after the other until nothing changes."""
    code = np.zeros(len(dictionary))
    residual = signal.copy()
    for _ in range(5000):
        largest = 0.0
        for k, atom in enumerate(dictionary):
            old = code[k]
            value = atom @ residual + old * (atom @ atom)
            code[k] = np.sign(value) * max(abs(value) - penalty, 0) / (atom @ atom)
            residual -= (code[k] - old) * atom
            largest = max(largest, abs(code[k] - old))
        if largest < 1e-12:
            return code
    raise AssertionError("coordinate descent has not converged")


@pytest.mark.parametrize("penalty", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("length", [5, 40])
def test_codes_are_those_of_coordinate_descent(length: int, penalty: float) -> None:
    coding, masks = make_coding(length, penalty), random_masks(3)
    codes = coding.encode(masks)
    dictionary = coding.dictionary.numpy()
    expected = [coordinate_descent(mask.numpy().ravel().astype(float), dictionary, penalty) for mask in masks]
    assert np.allclose(codes, expected, rtol=0, atol=1e-9)
    assert torch.equal(codes, coding.encode(masks.double()))
    maps = coding.decode(codes)
    assert np.allclose(maps.flatten(1), codes.numpy() @ dictionary, rtol=0, atol=1e-12)
    assert maps.shape == (3, SIZE, SIZE)


def test_optimality_with_more_atoms_than_pixels() -> None:
    """The gradient of the square is -+penalty where an entry is not zero, and within it elsewhere."""
    coding, masks = make_coding(90), random_masks(4)
    codes = coding.encode(masks)
    gradient = (codes @ coding.dictionary - masks.flatten(1).double()) @ coding.dictionary.T
    used = codes != 0
    assert 0.05 < used.double().mean() < 0.95, "both cases must occur"
    assert (gradient + 0.3 * codes.sign())[used].abs().max() < 1e-6
    assert gradient[~used].abs().max() < 0.3 + 1e-6


def test_penalty_decides_how_sparse() -> None:
    masks = random_masks(3)
    used = [int((make_coding(40, penalty).encode(masks) != 0).sum()) for penalty in (0.01, 0.5, 1.5, 100.0)]
    assert used == sorted(used, reverse=True) and len(set(used)) == 4 and used[-1] == 0


def test_orthonormal_dictionary() -> None:
    """Then the Lasso is soft thresholding."""
    basis = SparseBasis(np.linalg.qr(np.random.default_rng(1).standard_normal((SIZE**2, 30)))[0].T, 0.4)
    coding, masks = SparseMaskCoding(SIZE, 30, basis), random_masks(3)
    projections = masks.flatten(1).float() @ coding.dictionary.T
    expected = projections.sign() * (projections.abs() - 0.4).clamp(min=0)
    assert torch.allclose(coding.encode(masks), expected, atol=1e-5)


def test_dictionary_is_frozen_and_in_the_checkpoint() -> None:
    coding = make_coding(12)
    assert set(coding.state_dict()) == {"dictionary", "penalty"}
    assert not any(parameter.requires_grad for parameter in coding.parameters())
    vectors = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    coding.decode(vectors).square().sum().backward()
    assert vectors.grad.all()
    other = SparseMaskCoding(SIZE, 12).double()
    with pytest.raises(MissingBasisError, match="fit_mask_basis.py.*MODEL.MASK_CODING.BASIS"):
        other.encode(random_masks(1))
    other.load_state_dict(coding.state_dict())
    assert torch.equal(other.encode(random_masks(2)), coding.encode(random_masks(2)))


def test_masks_of_nothing_and_no_masks() -> None:
    coding = make_coding(12)
    assert not coding.encode(torch.zeros(1, SIZE, SIZE)).any()
    assert coding.encode(random_masks(0)).shape == (0, 12)
    assert coding.decode(torch.zeros(0, 12)).shape == (0, SIZE, SIZE)


def test_autocast_does_not_change_codes() -> None:
    coding, masks = SparseMaskCoding(SIZE, 12, random_basis(12)), random_masks(2)
    vectors = coding.encode(masks)
    maps = coding.decode(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coding.encode(masks), vectors) and torch.equal(coding.decode(vectors), maps)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.npz"
    random_basis(12).save(path, statistics="a note")
    coding = build_mask_coding("sparse", SIZE, 12, basis=str(path))
    expected = SparseMaskCoding(SIZE, 12, random_basis(12))
    assert torch.equal(coding.encode(random_masks(2)), expected.encode(random_masks(2)))
    with pytest.raises(ValueError, match=r"shape \(12, 64\), but vectors of 13 for masks of 8x8 need \(13, 64\)"):
        build_mask_coding("sparse", SIZE, 13, basis=str(path))
    np.savez(tmp_path / "pca.npz", components_c=np.zeros((1, 5, 64)))
    for name in ("pca.npz", "absent.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a dictionary of masks"):
            SparseBasis.load(tmp_path / name)
    with pytest.raises(ValueError, match="at least one atom, not 0"):
        SparseMaskCoding(SIZE, 0)


def test_placeholder() -> None:
    coding = SparseMaskCoding(SIZE, 3)
    fill_missing_bases(coding)
    assert torch.isfinite(coding.decode(coding.encode(random_masks(1)))).all()
