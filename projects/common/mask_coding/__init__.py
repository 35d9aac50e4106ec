"""Masks as short vectors: one interface, ``encode(masks) -> vectors`` and ``decode(vectors) -> maps``."""

from querymask.common.mask_coding.autoencoder import AutoencoderMaskCoding
from querymask.common.mask_coding.base import (
    LearnedMaskCoding,
    MaskCoding,
    MissingBasisError,
    binarize_at_half_range,
    fill_missing_bases,
)
from querymask.common.mask_coding.build import MASK_CODINGS, build_mask_coding, coding_from_config
from querymask.common.mask_coding.dct import DCTMaskCoding, zigzag_order
from querymask.common.mask_coding.flatten import FlattenMaskCoding
from querymask.common.mask_coding.pca import PCABasis, PCAMaskCoding, PixelPCAMaskCoding, label_logits
from querymask.common.mask_coding.sparse import SparseBasis, SparseMaskCoding

__all__ = [
    "MASK_CODINGS",
    "AutoencoderMaskCoding",
    "DCTMaskCoding",
    "FlattenMaskCoding",
    "LearnedMaskCoding",
    "MaskCoding",
    "MissingBasisError",
    "PCABasis",
    "PCAMaskCoding",
    "PixelPCAMaskCoding",
    "SparseBasis",
    "SparseMaskCoding",
    "binarize_at_half_range",
    "build_mask_coding",
    "coding_from_config",
    "fill_missing_bases",
    "label_logits",
    "zigzag_order",
]
