"""What mask branches share that predict a code of the mask within a box."""

from dataclasses import dataclass

import torch
from torch import Tensor

from querymask.common.mask_coding import MaskCoding
from querymask.common.masks import crop_masks
from querymask.common.predictions import Targets


@dataclass(frozen=True)
class CodedTargets:
    """Masks of targets, cut out at their boxes.

    Attributes:
        crops: (sum of counts, S, S) bool.
        vectors: (sum of counts, K) their codes; None where the coding gives others at every call.
    """

    crops: Tensor
    vectors: Tensor | None


@torch.no_grad()
def encode_targets(coding: MaskCoding, targets: Targets, dtype: torch.dtype, keep: bool) -> CodedTargets:
    """Cut out and, once for all layers, encode.

    Args:
        dtype: of the vectors.
        keep: the coding gives the same vectors at every call.
    """
    parts, start = [], 0
    for masks, count in zip(targets.masks, targets.counts, strict=True):
        parts.append(crop_masks(masks, targets.boxes[start : start + count], coding.mask_size))
        start += count
    crops = torch.cat(parts)
    return CodedTargets(crops, coding.encode(crops).to(dtype) if keep else None)
