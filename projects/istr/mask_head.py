"""What predicts the code of a mask: the paper's head on the query, the second release's on a crop."""

from dataclasses import dataclass

import torch
from torch import nn

from querymask.common.mask_coding import AutoencoderMaskCoding, MaskCoding
from querymask.common.mask_coding.autoencoder import CONTEXT_CHANNELS
from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.istr.stage import head_layers

MASK_HEADS = ("vector", "convolution")


@dataclass
class MaskCode:
    """Predicted codes of n queries.

    Attributes:
        vectors: (n, K).
        context: (n, 32, S, S) what the autoencoder's decoder adds, None for other codings.
    """

    vectors: torch.Tensor
    context: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor) -> "MaskCode":
        return MaskCode(self.vectors[rows], None if self.context is None else self.context[rows])

    def decode(self, coding: MaskCoding) -> torch.Tensor:
        """(n, mask_size, mask_size) soft maps."""
        vectors = full_precision(self.vectors)
        return coding.decode(vectors) if self.context is None else coding.decode(vectors, self.context)


class VectorMaskHead(nn.Module):
    """A small network on the object features (section 3.3)."""

    uses_batch_statistics = False

    def __init__(self, width: int, num_head_layers: int, length: int) -> None:
        super().__init__()
        self.mask_module = head_layers(width, num_head_layers)
        self.mask_logits = nn.Linear(width, length)

    def forward(
        self, features: torch.Tensor, boxes: torch.Tensor, images: torch.Tensor, pyramid: FeaturePyramid
    ) -> MaskCode:
        """Object features (n, C) -> vectors (n, K); the other arguments are those of the heads on crops."""
        return MaskCode(self.mask_logits(self.mask_module(features)))


class ConvolutionMaskHead(nn.Module):
    """Convolutions over a crop at the refined box, down to one cell (second release).

    Batch norms take their statistics from all crops of a call in training: call it for all queries of a stage.

    Args:
        width: channels of the pyramid.
        length: K.
        pool_size: bins a side of the crop, a multiple of 4.
        with_context: also map the crop to what the autoencoder's decoder adds.
    """

    uses_batch_statistics = True

    def __init__(self, width: int, length: int, pool_size: int, with_context: bool) -> None:
        super().__init__()
        if pool_size % 4:
            raise ValueError(f"MODEL.MASK_BRANCH.CODE.POOL_SIZE is {pool_size}: it must be a multiple of 4")
        self.pool_size = pool_size
        modules: list[nn.Module] = []
        for _ in range(2):
            modules += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ELU(inplace=True)]
        self.mask_module = nn.Sequential(*modules, nn.Conv2d(width, length, pool_size // 4))
        self.ret_roi_layer_1 = _double_convolution(width, 2 * CONTEXT_CHANNELS) if with_context else None
        self.ret_roi_layer_2 = _double_convolution(2 * CONTEXT_CHANNELS, CONTEXT_CHANNELS) if with_context else None

    def forward(
        self, features: torch.Tensor, boxes: torch.Tensor, images: torch.Tensor, pyramid: FeaturePyramid
    ) -> MaskCode:
        """Boxes (n, 4) in pixels of images (n,) -> vectors (n, K), and the context where there is one."""
        crops = pyramid.pool(boxes, images, self.pool_size)
        vectors = self.mask_module(crops).flatten(1)
        if self.ret_roi_layer_1 is None or self.ret_roi_layer_2 is None:
            return MaskCode(vectors)
        return MaskCode(vectors, self.ret_roi_layer_2(self.ret_roi_layer_1(crops)))


def _double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        modules += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ELU(inplace=True)]
    return nn.Sequential(*modules)


def build_mask_head(kind: str, coding: MaskCoding, width: int, num_head_layers: int, pool_size: int) -> nn.Module:
    """The head that ``MODEL.MASK_BRANCH.CODE.HEAD`` names.

    Raises:
        ValueError: the kind is unknown, or does not go with the coding or the sizes.
    """
    with_context = isinstance(coding, AutoencoderMaskCoding)
    if kind == "vector":
        return VectorMaskHead(width, num_head_layers, coding.length)
    if kind == "convolution":
        if with_context and coding.mask_size != 4 * pool_size:
            raise ValueError(
                f"MODEL.MASK_BRANCH.CODE.POOL_SIZE is {pool_size}: the autoencoder of "
                f"{coding.mask_size}x{coding.mask_size} masks needs {coding.mask_size // 4}"
            )
        return ConvolutionMaskHead(width, coding.length, pool_size, with_context)
    raise ValueError(f"MODEL.MASK_BRANCH.CODE.HEAD is {kind!r}: choose one of {', '.join(MASK_HEADS)}")
