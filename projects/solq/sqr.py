"""SOLQ's baseline with a separate query representation (SQR, figure 1 and Table 2 of the paper), as its release has it.

The mask is no vector of the query but the output of DETR's mask head: attention maps of the query over the coarsest
level, refined by convolutions that read finer maps of the backbone. Data flow (B images, C width, M heads, n queries,
h and w of the coarsest level)::

    hidden states of the last layer (n, C), memory of the coarsest level (B, h * w, C)
      -> attention maps (n, M, h, w)
    these with the projected features of that level (B, C, h, w)
      -> convolutions, three times enlarged and added to backbone maps of half the size and half the channels
      -> mask logits (n, 4h, 4w): stride 16 for three maps of strides 8, 16 and 32
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from querymask.common.losses import dice_loss, sigmoid_focal_loss
from querymask.common.masks import inside_boxes
from querymask.common.matching import Assignment
from querymask.common.precision import full_precision

NUM_SKIPS = 3
_GROUPS = 8
_NARROWEST = 16  # the last convolution has the width divided by this


class AttentionMaps(nn.Module):
    """Where queries look, without values: one softmax over all heads and positions together.

    Args:
        width: C.
        num_heads: M.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        for linear in (self.query, self.key):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """
        Args:
            queries: (n, C) hidden states.
            keys: (n, S, C) keys of each query's image: ``self.key`` of its memory.
            padding: (n, S) bool, true on padding.

        Returns:
            (n, M, S), zero on padding; the sum over heads and positions is 1.
        """
        shape = (self.num_heads, queries.shape[-1] // self.num_heads)
        scores = torch.einsum(
            "nmd,nsmd->nms", self.query(queries).unflatten(-1, shape) * shape[1] ** -0.5, keys.unflatten(-1, shape)
        )
        scores = full_precision(scores).masked_fill(padding[:, None], -torch.inf)
        return scores.flatten(1).softmax(-1).view_as(scores)


class MaskHead(nn.Module):
    """DETR's convolutional mask head (Carion et al. 2020, section 4.3).

    Args:
        width: C, a multiple of 128: the narrowest convolution has C / 16 channels in 8 groups.
        num_heads: M, a multiple of 8.
        skip_channels: of the three maps that are added, coarse to fine.
    """

    def __init__(self, width: int, num_heads: int, skip_channels: Sequence[int]) -> None:
        super().__init__()
        if width % (_GROUPS * _NARROWEST) or num_heads % _GROUPS:
            raise ValueError(
                f"the mask head of SQR needs a width that is a multiple of {_GROUPS * _NARROWEST}, not {width}, and a "
                f"number of heads that is a multiple of {_GROUPS}, not {num_heads}: change HIDDEN_DIM or NUM_HEADS"
            )
        widths = [width + num_heads, width // 2, width // 4, width // 8, width // _NARROWEST]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(_GROUPS, b), nn.ReLU())
            for a, b in zip(widths[:1] + widths[:-1], widths, strict=True)
        )
        self.adapters = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(skip_channels, widths[1:-1], strict=True))
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def prepare(self, features: torch.Tensor, skips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What all queries of an image share.

        A convolution is the sum of those of its input's parts, and the features are the larger part.

        Args:
            features: (B, C, h, w).
            skips: (B, ., ., .) coarse to fine.

        Returns:
            the first convolution's sum over the features (B, C + M, h, w), and the adapted skips.
        """
        shared = F.conv2d(features, self.blocks[0][0].weight[:, : features.shape[1]], padding=1)
        return shared, [adapter(skip) for adapter, skip in zip(self.adapters, skips, strict=True)]

    def forward(
        self, maps: torch.Tensor, shared: torch.Tensor, skips: Sequence[torch.Tensor], image: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            maps: (n, M, h, w) attention maps.
            shared, skips: of ``prepare``.
            image: (n,) index of each query's image.

        Returns:
            (n, h', w') logits at the size of the last skip.
        """
        convolution, *rest = self.blocks[0]
        x = F.conv2d(maps, convolution.weight[:, -maps.shape[1] :], convolution.bias, padding=1) + shared[image]
        for module in rest:
            x = module(x)
        x = self.blocks[1](x)
        for block, skip in zip(self.blocks[2:], skips, strict=True):
            x = block(skip[image] + F.interpolate(x, size=skip.shape[-2:], mode="nearest"))
        return self.output(x)[:, 0]


@dataclass
class MaskContext:
    """What the masks of all queries of a batch are made of.

    Attributes:
        keys: (B, h * w, C).
        padding: (B, h, w) bool, true on padding.
        shared, skips: of ``MaskHead.prepare``.
    """

    keys: torch.Tensor
    padding: torch.Tensor
    shared: torch.Tensor
    skips: list[torch.Tensor]


class SQRMaskBranch(nn.Module):
    """Masks of queries by attention maps and convolutions.

    Args:
        width: C.
        num_heads: M.
        feature_channels: of the three backbone maps, fine to coarse.
    """

    def __init__(self, width: int, num_heads: int, feature_channels: Sequence[int]) -> None:
        super().__init__()
        if len(feature_channels) != NUM_SKIPS:
            raise ValueError(
                f"the mask head of SQR reads {NUM_SKIPS} backbone maps, not {len(feature_channels)}: name as many in "
                "IN_FEATURES"
            )
        coarse_to_fine = list(reversed(feature_channels))
        self.attention = AttentionMaps(width, num_heads)
        self.skips = nn.ModuleList(nn.Conv2d(c, c // 2, 3, stride=2, padding=1) for c in coarse_to_fine)
        self.head = MaskHead(width, num_heads, [c // 2 for c in coarse_to_fine])

    def prepare(
        self, features: Sequence[torch.Tensor], level: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor
    ) -> MaskContext:
        """Compute once what does not depend on the queries.

        Args:
            features: three backbone maps (B, ., ., .), fine to coarse.
            level: (B, C, h, w) the coarsest projected level.
            memory: (B, h * w, C) what the encoder makes of it.
            padding: (B, h, w) bool.
        """
        halves = [skip(feature) for skip, feature in zip(self.skips, reversed(features), strict=True)]
        shared, skips = self.head.prepare(level, halves)
        return MaskContext(self.attention.key(memory), padding, shared, skips)

    def forward(self, hidden: torch.Tensor, context: MaskContext, image: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, C) of queries of the images (n,) -> mask logits (n, h', w')."""
        padding = context.padding[image]
        maps = self.attention(hidden, context.keys[image], padding.flatten(1)).unflatten(-1, padding.shape[1:])
        return self.head(maps, context.shared, context.skips, image)


@dataclass
class SeparateMasks:
    """Masks of the last layer's queries, computed for those that are asked for.

    Attributes:
        branch: makes them.
        context: of the batch.
        hidden: (B, Q, C) of the last layer.
        padded_size: (H, W) of the batch.
        image_sizes: (H, W) of every image without padding.
    """

    branch: SQRMaskBranch
    context: MaskContext
    hidden: torch.Tensor
    padded_size: tuple[int, int]
    image_sizes: Sequence[tuple[int, int]]

    def logits(self, image: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """(n,) and (n,) indices -> (n, H, W) logits at the size of the padded batch."""
        maps = full_precision(self.branch(self.hidden[image, query], self.context, image))
        return F.interpolate(maps[:, None], size=self.padded_size, mode="bilinear", align_corners=False)[:, 0]

    def detected(
        self, image: int, queries: torch.Tensor, size: tuple[int, int], boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Masks of queries (n,) of one image, scaled to (height, width): (n, height, width) bool.

        Args:
            boxes: (n, 4) XYXY in pixels of the scaled image, outside of which nothing is foreground; None: as they are.
        """
        height, width = self.image_sizes[image]
        masks = self.logits(torch.full_like(queries, image), queries)[:, :height, :width] > 0
        masks = F.interpolate(masks[None].to(torch.uint8), size=size, mode="nearest")[0].to(torch.bool)
        return masks if boxes is None else masks & inside_boxes(boxes, *size)


def separate_mask_losses(
    masks: SeparateMasks, truth: torch.Tensor, assignment: Assignment, count: torch.Tensor, focal_alpha: float
) -> dict[str, torch.Tensor]:
    """``loss_mask``, focal loss averaged over the pixels of the padded batch, and ``loss_dice``, of the last layer.

    Args:
        masks: of the last layer.
        truth: (sum of counts, H, W) bool, at most as large as the padded batch.
        assignment: of all layers.
        count: what sums over the matched pairs are divided by.
        focal_alpha: alpha of the focal loss.
    """
    last = slice(len(assignment.layer) - assignment.pairs_per_layer(), None)
    logits = masks.logits(assignment.image[last], assignment.query[last])
    truth = truth[assignment.target[last]]
    missing = [full - part for full, part in zip(masks.padded_size, truth.shape[1:], strict=True)]
    truth = F.pad(truth, (0, missing[1], 0, missing[0])).to(logits.dtype)
    pixels = sigmoid_focal_loss(logits, truth, focal_alpha).flatten(1).mean(1)
    dice = dice_loss(logits.sigmoid(), truth, squared=False, smooth=1.0, eps=0.0)
    return {"loss_mask": pixels.sum() / count, "loss_dice": dice.sum() / count}
