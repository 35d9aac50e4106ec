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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from querymask.common.detector import Detector
from querymask.common.losses import dice_loss
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.masks import Bands, pad_masks
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets
from querymask.solq.detector import DeformableDETR
from querymask.solq.predictions import DETRPredictions

NUM_SKIPS = 3
_GROUPS = 8
QUERIES_AT_ONCE = 16
"""Of those of a panoptic map, of which there are more than of detections."""
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


@dataclass(frozen=True)
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


@MASK_BRANCH_REGISTRY.register()
class SQRBranch(MaskBranch):
    """Masks of the last layer's queries by attention maps and convolutions.

    Args:
        width: C.
        num_heads: M.
        in_features: names of the three backbone maps, fine to coarse.
        feature_channels: of these.
        weights: of ``loss_mask`` and ``loss_dice``.
        focal_alpha: of ``loss_mask``.
        crop_masks: cut masks off at their boxes, as the paper says; the release does not.
    """

    sections = ("MASK_BRANCH.SQR",)

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        in_features: Sequence[str],
        feature_channels: Sequence[int],
        weights: Mapping[str, float],
        focal_alpha: float = 0.25,
        crop_masks: bool = False,
    ) -> None:
        super().__init__()
        if len(feature_channels) != NUM_SKIPS:
            raise ValueError(
                f"the mask head of SQR reads {NUM_SKIPS} backbone maps, not {len(feature_channels)}: name as many in "
                "IN_FEATURES"
            )
        self.in_features = list(in_features)
        self.weights = dict(weights)
        self.focal_alpha = focal_alpha
        self.crop_masks = crop_masks
        coarse_to_fine = list(reversed(feature_channels))
        self.attention = AttentionMaps(width, num_heads)
        self.skips = nn.ModuleList(nn.Conv2d(c, c // 2, 3, stride=2, padding=1) for c in coarse_to_fine)
        self.head = MaskHead(width, num_heads, [c // 2 for c in coarse_to_fine])

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "SQRBranch":
        """What ``MODEL.MASK_BRANCH.SQR`` describes, on a Deformable DETR with the attention heads of its own."""
        if not isinstance(detector, DeformableDETR):
            raise ValueError(
                f"SQRBranch reads the memory of a Deformable DETR's encoder, which {type(detector).__name__} does not "
                "have: choose another MODEL.MASK_BRANCH.NAME"
            )
        sqr = cfg.MODEL.MASK_BRANCH.SQR
        return cls(
            width=detector.width,
            num_heads=cfg.MODEL.SOLQ.NUM_HEADS,
            in_features=detector.in_features,
            feature_channels=[shapes[name].channels for name in detector.in_features],
            weights={"loss_mask": sqr.MASK_WEIGHT, "loss_dice": sqr.DICE_WEIGHT},
            focal_alpha=cfg.MODEL.SOLQ.FOCAL_ALPHA,
            crop_masks=sqr.CROP_MASKS,
        )

    def forward(self, found: DETRPredictions) -> MaskContext:
        """What does not depend on the queries."""
        features = [found.features[name] for name in self.in_features]
        halves = [skip(feature) for skip, feature in zip(self.skips, reversed(features), strict=True)]
        shared, skips = self.head.prepare(found.levels[-1], halves)
        padding = found.padding[-1]
        assert found.memory is not None
        return MaskContext(self.attention.key(found.memory[:, -padding[0].numel() :]), padding, shared, skips)

    def coarse_logits(self, hidden: torch.Tensor, context: MaskContext, image: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, C) of queries of the images (n,) -> mask logits (n, h', w')."""
        padding = context.padding[image]
        maps = self.attention(hidden, context.keys[image], padding.flatten(1)).unflatten(-1, padding.shape[1:])
        return self.head(maps, context.shared, context.skips, image)

    def logits(
        self, found: Predictions, context: MaskContext, image: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        """(n,) and (n,) indices -> (n, H, W) logits at the size of the padded batch."""
        maps = full_precision(self.coarse_logits(found.hidden[-1][image, query], context, image))
        return enlarge(maps, found.canvas.size)

    def encode(self, targets: Targets, found: Predictions) -> torch.Tensor:
        """(sum of counts, H, W) bool on the padded canvas."""
        return torch.cat([pad_masks(masks, found.canvas.size) for masks in targets.masks])

    def losses(
        self,
        found: Predictions,
        made: MaskContext,
        truth: torch.Tensor,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """Of the last layer: ``loss_mask``, the focal loss averaged over the pixels of the batch, and ``loss_dice``."""
        pairs = assignment.last()
        logits = self.logits(found, made, pairs.image, pairs.query)
        wanted = truth[pairs.target].to(logits.dtype)
        pixels = sigmoid_focal_loss(logits, wanted, self.focal_alpha).flatten(1).mean(1)
        dice = dice_loss(logits.sigmoid(), wanted, squared=False, smooth=1.0, eps=0.0)
        values = {"loss_mask": pixels.sum() / normalizers.targets, "loss_dice": dice.sum() / normalizers.targets}
        return [LossTerm(name, value, self.weights[name]) for name, value in values.items()]

    def add_masks(
        self, found: Predictions, made: MaskContext, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """Masks of the last layer, scaled from the image in the batch; see :class:`MaskBranch`."""
        queries, size = detections.pred_queries, detections.image_size
        height, width = found.image_sizes[image]
        masks = self.logits(found, made, torch.full_like(queries, image), queries)[:, :height, :width] > 0
        masks = F.interpolate(masks[None].to(torch.uint8), size=size, mode="nearest")[0].to(torch.bool)
        if self.crop_masks:
            masks &= inside_boxes(detections.pred_boxes.tensor, *size)
        detections.pred_masks = masks
        return detections

    def bands(
        self, found: Predictions, made: MaskContext, image: int, queries: torch.Tensor, labels: torch.Tensor
    ) -> Bands:
        """See :class:`MaskBranch`; inside of the boxes where masks are cut off at them."""
        images, hidden = torch.full_like(queries, image), found.hidden[-1, image, queries]
        parts = zip(hidden.split(QUERIES_AT_ONCE), images.split(QUERIES_AT_ONCE))
        maps = full_precision(torch.cat([self.coarse_logits(own, made, own_images) for own, own_images in parts]))
        boxes = found.pixel_boxes(images, queries)

        def band(numbers: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
            parts = [enlarge(maps[rows], found.canvas.size)[:, top:bottom] for rows in numbers.split(QUERIES_AT_ONCE)]
            probabilities = torch.cat(parts).sigmoid()
            if self.crop_masks:
                probabilities *= inside_boxes(boxes[numbers], *found.canvas.size)[:, top:bottom]
            return probabilities

        return band


def enlarge(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(n, h', w') -> (n, *size), bilinear."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def inside_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Which pixel centres of an image lie inside of each box: (n, 4) XYXY in pixels -> (n, height, width) bool."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]
