"""FQDet (Picron et al., "FQDet: Fast-converging Query-based Detector", https://arxiv.org/abs/2210.02318) and FQDetV2,
the detector of EffSeg's release: a dense head picks anchors, and a transformer's decoder refines their features.

Data flow (B images, A anchors, S cells of all maps, Q queries, C width, K classes)::

    maps P_l (B, C, H_l, W_l)
      -> selector on every map: logits of anchors (B, A) -> the highest Q of each image
      -> feature at the anchor's cell -> transition, one for each shape of anchor -> queries (B, Q, C)
      -> decoder layers: deformable attention around the anchor, self-attention, feed-forward network
      -> class head (B, Q, K + 1), box head (B, Q, 4): deltas from the anchors

Anchors are fixed: boxes are not refined between layers, and only the last layer has heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from querymask.common.deformable_attention import DeformableAttention, flatten_levels
from querymask.common.precision import full_precision, without_autocast
from querymask.common.transfer import numbers_to_device
from querymask.effseg.anchors import ANCHORS_PER_CELL, apply_deltas, make_anchors
from querymask.effseg.grouping import group_rows

PRIOR_PROBABILITY = 0.01  # of an anchor being selected, at first
NORM_GROUPS = 8
BOTTLENECK = 4  # width of the selector over that of its bottleneck
CANDIDATES = 1000  # pairs of query and class that enter NMS
MAX_EXTENT = 2.0**20  # pixels over which boxes may be spread for one NMS of all classes


class NormActLinear(nn.Sequential):
    """LayerNorm, ReLU, Linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))


class NormActConv(nn.Sequential):
    """GroupNorm, ReLU, convolution with padding."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 1) -> None:
        super().__init__(
            nn.GroupNorm(NORM_GROUPS, in_dim),
            nn.ReLU(),
            nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2),
        )


class Residual(nn.Module):
    """x + layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Selector(nn.Module):
    """Scores the anchors of every cell, with the same weights on all maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // BOTTLENECK
        bottleneck = nn.Sequential(NormActConv(width, inner), NormActConv(inner, inner, 3), NormActConv(inner, width))
        self.layers = nn.Sequential(NormActConv(width, width), Residual(bottleneck), nn.ReLU())
        self.projection = nn.Conv2d(width, ANCHORS_PER_CELL, 1)
        nn.init.constant_(self.projection.bias, -math.log(1 / PRIOR_PROBABILITY - 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H_l, W_l) -> logits (B, A), in the order of the anchors."""
        logits = [self.projection(self.layers(feature)) for feature in maps]
        return torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)


class CrossAttention(nn.Module):
    """Adds what deformable attention around the anchors finds; pre-norm."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor | None,
        anchors: Tensor,
        tokens: Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, C).
            positions: (B, Q, C), added to the normalised queries, or None.
            anchors: (B, Q, 4) cx, cy, w, h relative to the padded image.
            tokens: (B, S, C) cells of all maps.
            shapes: (height, width) of the maps.
        """
        found = self.norm(queries)
        found = found if positions is None else found + positions
        reference = anchors[:, :, None].expand(-1, -1, len(shapes), -1)
        return queries + self.attention(found, reference, tokens, shapes)


class SelfAttention(nn.Module):
    """Adds what the queries of an image tell each other; pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, queries: Tensor, positions: Tensor | None) -> Tensor:
        value = self.norm(queries)
        key = value if positions is None else value + positions
        return queries + self.attention(key, key, value, need_weights=False)[0]


class DecoderLayer(nn.Module):
    """Cross-attention, self-attention, feed-forward network, in this order."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(width, num_heads, num_levels, num_points)
        self.self_attention = SelfAttention(width, num_heads)
        self.ffn = Residual(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, width))
        )

    def forward(
        self,
        queries: Tensor,
        positions: Tensor | None,
        anchors: Tensor,
        tokens: Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """As :class:`CrossAttention`."""
        queries = self.cross_attention(queries, positions, anchors, tokens, shapes)
        return self.ffn(self.self_attention(queries, positions))


@dataclass(frozen=True)
class FQDetOutput:
    """What the detector says about a batch, in full precision.

    Attributes:
        selection_logits: (B, A) of the anchors.
        anchors: (A, 4) cx, cy, w, h in pixels, those of every image.
        selected: (B, Q) numbers of the queries' anchors, ascending.
        queries: (B, Q, C) after the last layer.
        class_logits: (B, Q, K + 1); the last class is "no object".
        deltas: (B, Q, 4) from the anchors.
        boxes: (B, Q, 4) x0, y0, x1, y1 in pixels, not clipped.
    """

    selection_logits: Tensor
    anchors: Tensor
    selected: Tensor
    queries: Tensor
    class_logits: Tensor
    deltas: Tensor
    boxes: Tensor

    @property
    def query_anchors(self) -> Tensor:
        """(B, Q, 4) cx, cy, w, h in pixels."""
        return self.anchors[self.selected]


class FQDet(nn.Module):
    """The detector on a feature pyramid.

    Args:
        width: C of maps and queries.
        levels: l of each map, fine to coarse; its cells have sides of 2^l pixels.
        num_queries: Q.
        num_classes: K.
        num_layers, num_heads, num_points, ffn_dim: of the decoder.
        version: 1 for the paper's model: encodings of the anchors are added to the queries, class and box head have
            residual layers. 2 for the release's: no encodings, the class head is linear, the box head a plain MLP.
    """

    def __init__(
        self,
        width: int = 256,
        levels: Sequence[int] = (2, 3, 4, 5, 6, 7),
        num_queries: int = 300,
        num_classes: int = 80,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 1,
        ffn_dim: int = 1024,
        version: int = 1,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"FQDet has the versions 1 and 2, not {version}")
        self.levels = tuple(levels)
        self.num_queries = num_queries
        self.selector = Selector(width)
        self.transitions = nn.ModuleList(NormActLinear(width, width) for _ in range(ANCHORS_PER_CELL))
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, len(levels), num_points, ffn_dim) for _ in range(num_layers)
        )
        if version == 1:
            self.anchor_encoder = nn.Sequential(nn.Linear(4, width), Residual(NormActLinear(width, width)))
            self.class_head, self.box_head = (
                nn.Sequential(NormActLinear(width, width), Residual(NormActLinear(width, width)), nn.Linear(width, out))
                for out in (num_classes + 1, 4)
            )
        else:
            self.anchor_encoder = None
            self.class_head = nn.Linear(width, num_classes + 1)
            self.box_head = nn.Sequential(
                nn.Linear(width, width),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, 4),
            )

    def forward(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> FQDetOutput:
        """Detect.

        Args:
            maps: (B, C, H_l, W_l) for every level, fine to coarse.
            image_size: (height, width) of the padded images.

        Raises:
            ValueError: not as many maps as levels, or fewer anchors than queries.
        """
        if len(maps) != len(self.levels):
            raise ValueError(f"FQDet is built for the levels {self.levels}, got {len(maps)} maps")
        shapes = tuple((feature.shape[2], feature.shape[3]) for feature in maps)
        tokens = flatten_levels(maps)
        anchors = make_anchors(shapes, self.levels, torch.promote_types(tokens.dtype, torch.float32), tokens.device)
        if len(anchors) < self.num_queries:
            raise ValueError(
                f"an image of {image_size[0]} x {image_size[1]} has {len(anchors)} anchors, fewer than the "
                f"{self.num_queries} queries: use larger images or fewer queries"
            )
        logits = full_precision(self.selector(maps))
        selected = logits.detach().topk(self.num_queries, dim=1).indices.sort(dim=1).values
        queries = full_precision(self._transit(tokens, selected))  # and so are the sums along the layers
        query_anchors = anchors[selected]
        sides = numbers_to_device([image_size[1], image_size[0]] * 2, query_anchors.dtype, query_anchors.device)
        relative = query_anchors / sides
        with without_autocast(tokens.device):
            positions = None if self.anchor_encoder is None else self.anchor_encoder(relative)
        for layer in self.layers:
            queries = layer(queries, positions, relative, tokens, shapes)
        deltas = full_precision(self.box_head(queries))
        boxes = apply_deltas(query_anchors, deltas)
        class_logits = full_precision(self.class_head(queries))
        return FQDetOutput(logits, anchors, selected, queries, class_logits, deltas, boxes)

    def _transit(self, tokens: Tensor, selected: Tensor) -> Tensor:
        """The features at the selected anchors' cells, through the layer of each anchor's shape."""
        cells = (selected // ANCHORS_PER_CELL)[..., None].expand(-1, -1, tokens.shape[2])
        features = tokens.gather(1, cells).flatten(0, 1)
        rows = group_rows((selected % ANCHORS_PER_CELL).flatten(), ANCHORS_PER_CELL)
        queries = [transition(features[own]) for transition, own in zip(self.transitions, rows, strict=True)]
        return torch.cat(queries)[torch.cat(rows).argsort()].unflatten(0, selected.shape)


@dataclass(frozen=True)
class Detections:
    """The detections of one image, by descending score, on the CPU.

    Attributes:
        queries: (D,) numbers of their queries.
        labels: (D,) classes.
        scores: (D,) probabilities.
        boxes: (D, 4) x0, y0, x1, y1 in pixels, not clipped.
    """

    queries: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor


def detect(
    class_logits: Tensor, boxes: Tensor, nms_threshold: float, max_detections: int = 100, drop_empty: bool = True
) -> Detections:
    """Picks the detections of one image: the highest pairs of query and class, then NMS within each class.

    The candidates are copied to the host at once, as how many remain must be known there anyway: a GPU is waited for
    only once.

    Args:
        class_logits: (Q, K + 1), the last class being "no object".
        boxes: (Q, 4) x0, y0, x1, y1.
        nms_threshold: a box whose IoU with a better one of its class is higher is left out.
        max_detections: how many are kept.
        drop_empty: leave out boxes without a positive size first.
    """
    scores = class_logits[:, :-1].sigmoid()
    if drop_empty:
        scores = scores.masked_fill(((boxes[:, 2:] <= boxes[:, :2]).any(1))[:, None], -1)
    num_classes = scores.shape[1]
    scores, pairs = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    columns = (boxes[pairs // num_classes].double(), scores.double()[:, None], pairs.double()[:, None])
    candidates = torch.cat(columns, 1).cpu()  # float64 has room for all of them
    candidates = candidates[candidates[:, 4] >= 0]
    labels = candidates[:, 5].long() % num_classes
    kept = nms_within_classes(candidates[:, :4], candidates[:, 4], labels, nms_threshold)[:max_detections]
    queries = candidates[kept, 5].long() // num_classes
    return Detections(queries, labels[kept], candidates[kept, 4].to(scores.dtype), candidates[kept, :4].to(boxes.dtype))


def nms_within_classes(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """NMS of every class on its own; a box that is huge or not finite matters to its class alone.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in float64, anywhere.
        scores: (n,).
        labels: (n,) classes.
        threshold: a box whose IoU with a better one of its class is higher is left out.

    Returns:
        (kept,) numbers of the boxes that stay, by descending score.
    """
    if len(boxes) == 0:
        return labels
    low, high = boxes.aminmax()
    if high - low < MAX_EXTENT:
        # Side by side, so that one NMS does. Whole numbers of pixels, which float64 adds to float32 boxes exactly
        return nms(boxes + (labels * ((high - low).floor() + 1))[:, None], scores, threshold)
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    kept = torch.cat([rows[nms(boxes[rows], scores[rows], threshold)] for rows in members]).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]
