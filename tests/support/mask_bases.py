"""Random bases for learned mask codings."""

import numpy as np

from querymask.common.mask_coding import (
    AutoencoderMaskCoding,
    MaskCoding,
    PCABasis,
    PCAMaskCoding,
    PixelPCAMaskCoding,
    SparseBasis,
    SparseMaskCoding,
)


def give_basis(coding: MaskCoding | None) -> None:
    """Give a learned coding a random basis; leave another one as it is."""
    if coding is None:
        return
    rng, size, length = np.random.default_rng(0), coding.mask_size, coding.length
    values: MaskCoding
    if isinstance(coding, PCAMaskCoding | PixelPCAMaskCoding):
        components = np.linalg.qr(rng.standard_normal((size**2, length)))[0].T
        mean, variance = rng.standard_normal(size**2), np.geomspace(100, 1, length)
        if isinstance(coding, PCAMaskCoding):
            values = PCAMaskCoding(size, length, PCABasis(components, mean, variance, variance))
        else:
            kind = "pca_pixels" if coding.centred else "pca_linear"
            basis = PCABasis(components, mean, variance, variance, kind)
            values = PixelPCAMaskCoding(size, length, basis, coding.centred)
    elif isinstance(coding, SparseMaskCoding):
        atoms = rng.standard_normal((length, size**2))
        basis = SparseBasis(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), 0.3)
        values = SparseMaskCoding(size, length, basis)
    elif isinstance(coding, AutoencoderMaskCoding):
        values = AutoencoderMaskCoding(size, length, initialise=True)
    else:
        return
    coding.load_state_dict(values.state_dict())
