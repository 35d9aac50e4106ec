"""From kernels and mask features to masks, and from ground-truth masks to targets."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from querymask.common.masks import Bands, bilinear_weights
from querymask.common.ops.exporting import exportable

# Elements of the largest intermediate map while masks are resized: bounds the memory
CHUNK_ELEMENTS = 2**24


def apply_kernels(kernels: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """Dynamic 1x1 convolution without bias.

    Args:
        kernels: (..., C) of one image.
        mask_features: (C, h, w) of this image.

    Returns:
        (..., h, w).
    """
    return (kernels @ mask_features.flatten(1)).unflatten(-1, mask_features.shape[1:])


def maskness(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean of the probabilities above a threshold: how sure a mask is of its foreground. 0 where there are none.

    Args:
        probabilities: (n, h, w), padding included.

    Returns:
        (n,)
    """
    above = probabilities > threshold
    return (probabilities * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-5)


def _resize_by_products(
    probabilities: torch.Tensor,
    stride: int,
    image_size: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> torch.Tensor:
    rows, columns = (
        _resizing_weights(cells, stride, old, new, probabilities)
        for cells, old, new in zip(probabilities.shape[1:], image_size, size, strict=True)
    )
    return rows @ probabilities @ columns.T > threshold


def _resizing_weights(cells: int, stride: int, old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """(new, cells): both bilinear steps of one axis at once, from ``cells`` to ``old`` pixels to ``new``."""
    place = ((torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * old / new - 0.5).clamp(min=0)
    low = place.floor()
    share = (place - low)[:, None]

    def of_pixels(pixels: torch.Tensor) -> torch.Tensor:
        return _enlarging_weights(pixels.clamp(max=old - 1), stride, cells)

    return (1 - share) * of_pixels(low) + share * of_pixels(low + 1)


def _enlarging_weights(pixels: torch.Tensor, stride: int, cells: int) -> torch.Tensor:
    """(n, cells): what pixels (n,) of one axis take of ``cells`` that are ``stride`` times as large."""
    return bilinear_weights(((pixels + 0.5) / stride - 0.5).clamp(min=0).clamp(max=cells - 1), cells)


@exportable(_resize_by_products)
def resize_probabilities(
    probabilities: torch.Tensor,
    stride: int,
    image_size: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> torch.Tensor:
    """Enlarge to the padded image, cut the padding off, resize to the original image, threshold; a few at a time.

    Probabilities are interpolated, not logits.

    Args:
        probabilities: (n, h, w).
        stride: size of the padded image over that of the maps.
        image_size: (height, width) of the image in the batch.
        size: (height, width) of the result.

    Returns:
        (n, height, width) bool.
    """
    masks = torch.empty((len(probabilities), *size), dtype=torch.bool, device=probabilities.device)
    for rows in _chunks(probabilities, stride, size):
        maps = F.interpolate(probabilities[rows, None], scale_factor=stride, mode="bilinear", align_corners=False)
        maps = maps[..., : image_size[0], : image_size[1]]
        if tuple(image_size) != tuple(size):
            maps = F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
        torch.gt(maps[:, 0], threshold, out=masks[rows])
    return masks


def _enlarge_by_products(probabilities: torch.Tensor, stride: int) -> Bands:
    def weights(first: int, last: int, cells: int) -> torch.Tensor:
        pixels = torch.arange(first, last, dtype=probabilities.dtype, device=probabilities.device)
        return _enlarging_weights(pixels, stride, cells)

    def band(numbers: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        height, width = probabilities.shape[1:]
        rows, columns = weights(top, bottom, height), weights(0, width * stride, width)
        return rows @ probabilities[numbers] @ columns.T

    return band


@exportable(_enlarge_by_products)
def enlarged_bands(probabilities: torch.Tensor, stride: int) -> Bands:
    """Bands of the masks that bilinear interpolation enlarges to the padded image.

    Args:
        probabilities: (n, h, w).
        stride: size of the padded image over that of the maps.
    """

    def band(numbers: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        first = max(top // stride - 1, 0)  # a row above and one below are all that interpolation reads
        maps = probabilities[numbers, None, first : -(-bottom // stride) + 1]
        maps = F.interpolate(maps, scale_factor=stride, mode="bilinear", align_corners=False)[:, 0]
        return maps[:, top - first * stride : bottom - first * stride]

    return band


def _chunks(probabilities: torch.Tensor, stride: int, size: tuple[int, int]) -> Iterator[slice]:
    count, height, width = probabilities.shape
    largest = max(height * width * stride**2, size[0] * size[1])
    step = max(CHUNK_ELEMENTS // largest, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)


def reduce_masks(masks: torch.Tensor, stride: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Soft targets at the resolution of the mask features: bilinear reduction without antialiasing.

    For an even stride that is the mean of the four pixels in the middle of each ``stride x stride`` block.

    Args:
        masks: (n, H, W) bool; zero beyond, at the right and the bottom.
        stride: an even number.
        size: (h, w), with h * stride >= H.
        dtype: of the result.

    Returns:
        (n, h, w) of 0, 1/4, 1/2, 3/4 and 1.
    """
    height, width = size
    masks = F.pad(masks, (0, width * stride - masks.shape[2], 0, height * stride - masks.shape[1]))
    middle = slice(stride // 2 - 1, stride // 2 + 1)
    blocks = masks.unflatten(2, (width, stride)).unflatten(1, (height, stride))
    return blocks[:, :, middle, :, middle].sum((2, 4), dtype=dtype) / 4
