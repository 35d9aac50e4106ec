"""PCA of logits, pixels and the autoencoder as mask codings."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from querymask.common.mask_coding import (
    AutoencoderMaskCoding,
    FlattenMaskCoding,
    MissingBasisError,
    PCABasis,
    PCAMaskCoding,
    PixelPCAMaskCoding,
    build_mask_coding,
    fill_missing_bases,
    label_logits,
)

SIZE = 8


def random_masks(count: int, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(0)) < 0.5


def random_basis(length: int, coding: str = "pca") -> PCABasis:
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.standard_normal((SIZE**2, length)))[0].T
    mean = rng.standard_normal(SIZE**2)
    return PCABasis(components, mean, np.geomspace(50, 2, length), np.full(length, 0.01), coding)


def test_logits_of_masks() -> None:
    masks = torch.tensor([0.0, 1.0, 1.0, 1.0])
    logits = label_logits(masks, torch.tensor([0.5, 0.5, 0.0, 1.0]))
    assert logits.tolist() == pytest.approx([-3.66356, 3.66356, 4.59512, 2.94444], abs=1e-5)
    assert torch.equal(label_logits(masks)[:2], logits[:2])
    with_noise = label_logits(torch.ones(100_000), torch.rand(100_000))
    assert (with_noise == with_noise.max()).float().mean().item() == pytest.approx(0.2, abs=0.01)


def test_pca_is_whitened_and_lossless_with_all_components() -> None:
    coding = PCAMaskCoding(SIZE, SIZE**2, random_basis(SIZE**2), noise=None).double()
    masks = random_masks(5)
    vectors = coding.encode(masks)
    centred = label_logits(masks.flatten(1).double()) - coding.means
    expected = torch.einsum("kp,np->nk", coding.components, centred) / coding.explained_variances.sqrt()
    assert torch.allclose(vectors, expected)
    maps = coding.decode(vectors)
    assert torch.allclose(maps, 0.025 + 0.95 * masks.double(), atol=1e-5)  # the basis was float32
    assert torch.allclose(coding.decode_logits(vectors).sigmoid(), maps)


def test_pca_keeps_its_constants_frozen_and_in_the_checkpoint() -> None:
    coding = PCAMaskCoding(SIZE, 5, random_basis(5))
    assert set(coding.state_dict()) == {"components", "explained_variances", "means"}
    assert not any(parameter.requires_grad for parameter in coding.parameters())
    vectors = torch.randn(3, 5, requires_grad=True)
    coding.decode(vectors).sum().backward()
    assert vectors.grad.all()


def test_pca_draws_noise_in_every_call() -> None:
    coding, masks = PCAMaskCoding(SIZE, 5, random_basis(5)), random_masks(3)
    assert coding.is_random and not torch.equal(coding.encode(masks), coding.encode(masks))
    quiet = PCAMaskCoding(SIZE, 5, random_basis(5), noise=None)
    assert not quiet.is_random and torch.equal(quiet.encode(masks), quiet.encode(masks))
    assert torch.equal(coding.encode(masks, torch.full((3, SIZE**2), 0.5)), quiet.encode(masks))


@pytest.mark.parametrize("name", ["pca_pixels", "pca_linear"])
def test_pca_of_pixels_against_loops(name: str) -> None:
    """Neither logits nor whitening; without a mean it is linear (ISTR, equation 3)."""
    basis = random_basis(5, name)
    coding = PixelPCAMaskCoding(SIZE, 5, basis, centred=name == "pca_pixels").double()
    constants = {"components", "means"} if name == "pca_pixels" else {"components"}
    assert set(coding.state_dict()) == constants and not coding.is_random
    assert not any(parameter.requires_grad for parameter in coding.parameters())
    masks, vectors = random_masks(3), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found, maps = coding.encode(masks), coding.decode(vectors)
    rows = coding.components.tolist()  # the basis was float32
    mean = coding.means.tolist() if name == "pca_pixels" else [0.0] * SIZE**2
    for mask, vector, code, map_ in zip(masks.flatten(1).tolist(), vectors.tolist(), found, maps, strict=True):
        expected = [sum(v * (x - m) for v, x, m in zip(row, mask, mean, strict=True)) for row in rows]
        assert code.tolist() == pytest.approx(expected, abs=1e-12)
        pixels = [m + sum(r * row[i] for r, row in zip(vector, rows, strict=True)) for i, m in enumerate(mean)]
        assert map_.flatten().tolist() == pytest.approx(pixels, abs=1e-12)
    maps.sum().backward()
    assert vectors.grad.all()
    whole = PixelPCAMaskCoding(SIZE, SIZE**2, random_basis(SIZE**2, name), centred=name == "pca_pixels").double()
    assert torch.allclose(whole.decode(whole.encode(masks)), masks.double(), atol=1e-5), "lossless with all components"


def test_a_basis_is_for_one_coding(tmp_path: Path) -> None:
    """What a file was learned for is in it; those of the releases, which do not say it, are for "pca"."""
    path = tmp_path / "basis.npz"
    random_basis(5, "pca_linear").save(path)
    assert build_mask_coding("pca_linear", SIZE, 5, basis=str(path)).length == 5
    for name in ("pca", "pca_pixels"):
        message = f"one for MODEL.MASK_CODING.NAME 'pca_linear', not '{name}': set NAME to that, or .*--method {name}"
        with pytest.raises(ValueError, match=message):
            build_mask_coding(name, SIZE, 5, basis=str(path))
    random_basis(5).save(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file if key != "coding"}
    np.savez(path, **arrays)
    assert build_mask_coding("pca", SIZE, 5, basis=str(path)).length == 5
    with pytest.raises(ValueError, match="one for MODEL.MASK_CODING.NAME 'pca', not 'pca_pixels'"):
        build_mask_coding("pca_pixels", SIZE, 5, basis=str(path))


def test_basis_files(tmp_path: Path) -> None:
    random_basis(5).save(tmp_path / "basis.npz", statistics="a note")
    loaded = PCABasis.load(tmp_path / "basis.npz")
    assert np.allclose(loaded.components, random_basis(5).components)
    (tmp_path / "other.npz").write_bytes(b"nothing")
    for name in ("other.npz", "absent.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a PCA basis"):
            PCABasis.load(tmp_path / name)


@pytest.mark.parametrize("logits", [False, True])
def test_pixels(logits: bool) -> None:
    coding, masks = FlattenMaskCoding(SIZE, logits), random_masks(4)
    vectors = coding.encode(masks)
    assert vectors.shape == (4, coding.length) and coding.length == SIZE**2
    assert torch.equal(vectors > (0 if logits else 0.5), masks.flatten(1))
    assert torch.allclose(coding.decode(vectors), 0.025 + 0.95 * masks.float() if logits else masks.float())


@pytest.mark.parametrize("coding", [PCAMaskCoding(16, 5), PixelPCAMaskCoding(16, 5), AutoencoderMaskCoding(16, 5)])
def test_without_a_basis(coding: PCAMaskCoding | PixelPCAMaskCoding | AutoencoderMaskCoding) -> None:
    with pytest.raises(MissingBasisError, match="has no basis yet"):
        coding.encode(random_masks(1, 16))
    with pytest.raises(MissingBasisError, match="MODEL.MASK_CODING.BASIS"):
        coding.decode(torch.zeros(1, 5))
    coding.load_state_dict({key: torch.ones_like(value) for key, value in coding.state_dict().items()})
    assert torch.isfinite(coding.eval().decode(torch.zeros(1, 5))).all()


def test_autoencoder() -> None:
    coding = AutoencoderMaskCoding(32, 6, initialise=True)
    masks = random_masks(3, 32)
    assert {name for name, p in coding.named_parameters() if not p.requires_grad} == {
        f"encoder.{name}" for name, _ in coding.encoder.named_parameters()
    }
    together = coding.encode(masks)
    assert together.shape == (3, 6) and not torch.allclose(together[:2], coding.encode(masks[:2])), "batch statistics"
    coding.eval()
    vectors = coding.encode(masks)
    assert torch.allclose(vectors[:2], coding.encode(masks[:2]), atol=1e-6)
    maps = coding.decode(vectors)
    assert maps.shape == (3, 32, 32) and 0 < maps.min() and maps.max() < 1
    context = torch.randn(3, 32, 8, 8, requires_grad=True)
    assert torch.allclose(coding.decode(vectors, torch.zeros_like(context)), maps)
    coding.decode(vectors, context).sum().backward()
    assert context.grad.any()
    assert coding.decode(vectors[:0], context[:0]).shape == (0, 32, 32) and coding.encode(masks[:0]).shape == (0, 6)


def test_autocast_does_not_change_codes() -> None:
    masks = random_masks(2, 16)
    for coding in (
        PCAMaskCoding(SIZE, 5, random_basis(5), noise=None),
        PixelPCAMaskCoding(SIZE, 5, random_basis(5, "pca_pixels")),
        AutoencoderMaskCoding(16, 5, initialise=True),
    ):
        cut = masks[:, : coding.mask_size, : coding.mask_size]
        vectors = coding.eval().encode(cut)
        maps = coding.decode(vectors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(coding.encode(cut), vectors) and torch.equal(coding.decode(vectors), maps)


def test_build_errors() -> None:
    for message, arguments in {
        "MODEL.MASK_CODING.NAME is 'wavelet': choose one of pca, dct, sparse": ("wavelet", 8, 5),
        "64 entries: set LENGTH to that, not 5": ("flatten", 8, 5),
        "8x8 mask has 64 DCT coefficients, not 65": ("dct", 8, 65),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            build_mask_coding(*arguments)


def test_placeholders() -> None:
    """To measure models without a basis; a basis that is there stays."""
    coding, known = PCAMaskCoding(SIZE, 5), PCAMaskCoding(SIZE, 5, random_basis(5))
    before = {key: value.clone() for key, value in known.state_dict().items()}
    fill_missing_bases(torch.nn.ModuleList([coding, known, AutoencoderMaskCoding(16, 5)]))
    assert torch.isfinite(coding.decode(coding.encode(random_masks(1)))).all()
    assert all(torch.equal(value, before[key]) for key, value in known.state_dict().items())
