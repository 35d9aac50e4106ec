"""A convolutional autoencoder of masks (ISTR's second release, "SMT")."""

import torch
from torch import nn

from querymask.common.mask_coding.base import LearnedMaskCoding
from querymask.common.precision import without_autocast

REDUCTION = 16
"""Side of the mask by side of the innermost map."""
CONTEXT_CHANNELS = 32
"""Channels of the map that can be added inside the decoder."""
_CONTEXT_BLOCK = 6


def _down(in_channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ELU(inplace=True)]


def _up(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ELU(inplace=True),
    )


class AutoencoderMaskCoding(LearnedMaskCoding):
    """Binary masks to vectors and back to probabilities.

    The encoder halves the mask four times and folds the rest into the vector; the decoder does the reverse. In a
    detector the encoder is frozen, though its batch norms go on with the statistics of the current masks, and the
    decoder is trained. In evaluation mode both are fixed functions.

    Args:
        mask_size: side of the masks, a multiple of 16.
        length: entries of the vectors.
        train_encoder: for the autoencoder's own training; else the encoder's parameters are frozen.
        initialise: give the parameters random values; else they are nan until weights are loaded.
    """

    uses_batch_statistics = True

    def __init__(
        self, mask_size: int = 112, length: int = 256, train_encoder: bool = False, initialise: bool = False
    ) -> None:
        super().__init__()
        if mask_size % REDUCTION:
            raise ValueError(f"the autoencoder's masks have sides that are multiples of {REDUCTION}, not {mask_size}")
        self.mask_size = mask_size
        self.length = length
        inner = mask_size // REDUCTION
        self.encoder = nn.Sequential(
            *_down(1, 16), *_down(16, 32), *_down(32, 64), *_down(64, 128), nn.Conv2d(128, length, inner)
        )
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (length, 1, 1)),
            nn.ConvTranspose2d(length, 128, inner),
            nn.BatchNorm2d(128),
            nn.ELU(inplace=True),
            _up(128, 64),
            _up(64, CONTEXT_CHANNELS),
            _up(CONTEXT_CHANNELS, 16),
            _up(16, 16),
            nn.Conv2d(16, 1, 1),
            nn.Sigmoid(),
        )
        if not initialise:
            for parameter in self.parameters():
                nn.init.constant_(parameter, float("nan"))
        self.encoder.requires_grad_(train_encoder)

    def _witness(self) -> torch.Tensor:
        return self.encoder[0].weight

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, mask_size, mask_size) -> (n, length)."""
        self.require_basis()
        pixels = masks[:, None].to(self.encoder[0].weight.dtype)
        if not len(masks):  # batch norms have no statistics of nothing
            return pixels.new_zeros((0, self.length))
        with without_autocast(masks.device):
            return self.encoder(pixels).flatten(1)

    def decode(self, vectors: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """(n, length) -> (n, mask_size, mask_size) probabilities.

        Args:
            context: (n, 32, mask_size / 4, mask_size / 4), added to the input of the third of the four upsamplings.
        """
        self.require_basis()
        if not len(vectors):
            # Connected all the same, so that every trained parameter gets a gradient, of zeros
            unused = sum(parameter.sum() for parameter in self.decoder.parameters()) + vectors.sum()
            unused = unused if context is None else unused + context.sum()
            return vectors.new_zeros((0, self.mask_size, self.mask_size)) * unused
        with without_autocast(vectors.device):
            x = vectors
            for index, module in enumerate(self.decoder):
                if index == _CONTEXT_BLOCK and context is not None:
                    x = x + context.to(x.dtype)
                x = module(x)
        return x[:, 0]
