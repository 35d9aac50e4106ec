"""The coding that a config names."""

import torch
from detectron2.config import CfgNode

from querymask.common.checkpoint import read_checkpoint
from querymask.common.mask_coding.autoencoder import AutoencoderMaskCoding
from querymask.common.mask_coding.base import MaskCoding
from querymask.common.mask_coding.dct import DCTMaskCoding
from querymask.common.mask_coding.flatten import FlattenMaskCoding
from querymask.common.mask_coding.pca import PCABasis, PCAMaskCoding, PixelPCAMaskCoding
from querymask.common.mask_coding.sparse import SparseBasis, SparseMaskCoding

MASK_CODINGS = ("pca", "dct", "sparse", "autoencoder", "flatten", "flatten_logits", "pca_pixels", "pca_linear")


def coding_from_config(cfg: CfgNode) -> MaskCoding:
    """Build the coding of ``MODEL.MASK_CODING``; raises as ``build_mask_coding``."""
    coding = cfg.MODEL.MASK_CODING
    return build_mask_coding(
        coding.NAME, coding.SIZE, coding.LENGTH, basis=coding.BASIS, label_noise=coding.LABEL_NOISE
    )


def build_mask_coding(
    name: str, mask_size: int, length: int, *, basis: str = "", label_noise: bool = True
) -> MaskCoding:
    """Build a coding by its name in a config.

    Args:
        name: one of ``MASK_CODINGS``.
        mask_size, length: side of the masks and entries of a vector.
        basis: file with the basis of a PCA or of "sparse", or the weights of "autoencoder"; "": they come with a
            checkpoint.
        label_noise: "pca" draws noise on the labels in every call of ``encode``.

    Raises:
        ValueError: the name is unknown, or another value does not go with it.
    """
    if name == "pca":
        noise = torch.rand_like if label_noise else None
        return PCAMaskCoding(mask_size, length, PCABasis.load(basis) if basis else None, noise)
    if name in ("pca_pixels", "pca_linear"):
        components = PCABasis.load(basis) if basis else None
        return PixelPCAMaskCoding(mask_size, length, components, centred=name == "pca_pixels")
    if name == "sparse":
        return SparseMaskCoding(mask_size, length, SparseBasis.load(basis) if basis else None)
    if name == "autoencoder":
        coding = AutoencoderMaskCoding(mask_size, length)
        if basis:
            coding.load_state_dict(read_checkpoint(basis))
        return coding
    if basis:
        raise ValueError(
            f"MODEL.MASK_CODING.BASIS is {basis!r}, but MODEL.MASK_CODING.NAME {name!r} needs none: set it ''"
        )
    if name == "dct":
        return DCTMaskCoding(mask_size, length)
    if name in ("flatten", "flatten_logits"):
        if length != mask_size**2:
            raise ValueError(
                f"MODEL.MASK_CODING.NAME is {name!r}, whose vectors for {mask_size}x{mask_size} masks have "
                f"{mask_size**2} entries: set LENGTH to that, not {length}"
            )
        return FlattenMaskCoding(mask_size, logits=name == "flatten_logits")
    raise ValueError(f"MODEL.MASK_CODING.NAME is {name!r}: choose one of {', '.join(MASK_CODINGS)}")
