"""One refinement stage of ISTR (section 3.3): queries attend to each other and to their boxes' crops, then move them.

Letters: B images, Q queries, C width, n = B * Q, D inner width of the dynamic layers, S^2 bins of a crop.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from querymask.common.layers import Recomputable, SelfAttention
from querymask.common.precision import full_precision, without_autocast
from querymask.common.pyramid import FeaturePyramid

CENTRE_DIVISOR = 2.0
"""Deltas of centres are in units of half of the box's side."""
MAX_LOG_SCALE = math.log(100000.0 / 16)
"""A side grows at most by this factor's logarithm in one stage."""


def move_boxes(boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """Move and scale boxes relative to themselves.

    Args:
        boxes: (..., 4) XYXY.
        deltas: (..., 4): shifts of the centre in half sides, logarithms of the scales.

    Returns:
        (..., 4) XYXY, not clipped.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    size = high - low
    centre = low + 0.5 * size + size * deltas[..., :2] / CENTRE_DIVISOR
    size = size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def head_layers(width: int, number: int) -> nn.Sequential:
    """Linear layers without bias, each with LayerNorm and ELU, in place: its input need not be kept."""
    modules: list[nn.Module] = []
    for _ in range(number):
        modules += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ELU(inplace=True)]
    return nn.Sequential(*modules)


class DynamicInteraction(nn.Module):
    """Linear layers whose weights are made of the query, over every bin of its crop (Sparse R-CNN's, with ELU).

    Args:
        width: C.
        dim_dynamic: D.
        pool_size: S.
        num_layers: 2, from C to D and back, or the first one alone (equation 11).
    """

    def __init__(self, width: int, dim_dynamic: int, pool_size: int, num_layers: int = 2) -> None:
        if num_layers not in (1, 2):
            raise ValueError(f"MODEL.ISTR.DYNAMIC_LAYERS is {num_layers}: choose 1 or 2")
        super().__init__()
        self.dim_dynamic = dim_dynamic
        self.dynamic_layer = nn.Linear(width, num_layers * width * dim_dynamic)
        self.norm1 = nn.LayerNorm(dim_dynamic)
        self.norm2 = nn.LayerNorm(width) if num_layers == 2 else None
        self.out_layer = nn.Linear(pool_size**2 * (dim_dynamic if self.norm2 is None else width), width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, queries: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
        """(n, C), (n, S^2, C) -> (n, C)."""
        width = queries.shape[1]
        first, *second = self.dynamic_layer(queries).split(width * self.dim_dynamic, dim=1)
        x = crops.to(first.dtype)
        # In place, ELU keeps its result, which the next layer keeps anyway, and not its input as well
        x = F.elu_(self.norm1(torch.bmm(x, first.view(-1, width, self.dim_dynamic))))
        if self.norm2 is not None:
            back = second[0].view(-1, self.dim_dynamic, width)
            x = F.elu_(self.norm2(torch.bmm(x.to(back.dtype), back)))
        return F.elu_(self.norm3(self.out_layer(x.flatten(1))))


class MultiHeadInteraction(nn.Module):
    """Attention of a query to the bins of its crop, instead of dynamic layers (Table 1d)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, queries: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
        """(n, C), (n, S^2, C) -> (n, C)."""
        crops = crops.to(queries.dtype)
        return self.attention(queries[:, None], crops, crops, need_weights=False)[0][:, 0]


@dataclass
class StageOutput:
    """Predictions of one stage.

    Attributes:
        logits: (B, Q, classes).
        boxes: (B, Q, 4) XYXY in pixels of the network's input, not clipped.
        features: (B, Q, C) object features.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    features: torch.Tensor


class RecurrentStage(Recomputable):
    """Self-attention, interaction with the crops, feed-forward network, class and box heads.

    Args:
        width: C.
        num_heads: of the attention.
        dim_feedforward: hidden width of the feed-forward network.
        pool_size: bins a side of the crops.
        attention: "dynamic" or "multi_head".
        dynamic_layers, dim_dynamic: number of the dynamic layers, and their inner width.
        num_logits: entries of the class head.
        num_head_layers: layers of the heads before the last one.
        dropout: in the attention and after each of the three parts.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        dim_feedforward: int,
        pool_size: int,
        attention: str,
        dynamic_layers: int,
        dim_dynamic: int,
        num_logits: int,
        num_head_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"MODEL.ISTR.HIDDEN_DIM {width} must be a multiple of MODEL.ISTR.NUM_HEADS {num_heads}")
        self.pool_size = pool_size
        self.self_attn = SelfAttention(width, num_heads, dropout)
        if attention == "dynamic":
            self.inst_interact: nn.Module = DynamicInteraction(width, dim_dynamic, pool_size, dynamic_layers)
        elif attention == "multi_head":
            self.inst_interact = MultiHeadInteraction(width, num_heads)
        else:
            raise ValueError(f"MODEL.ISTR.ATTENTION is {attention!r}: choose 'dynamic' or 'multi_head'")
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.cls_module = head_layers(width, num_head_layers)
        self.class_logits = nn.Linear(width, num_logits)
        self.reg_module = head_layers(width, num_head_layers)
        self.bboxes_delta = nn.Linear(width, 4)

    def forward(self, pyramid: FeaturePyramid, boxes: torch.Tensor, features: torch.Tensor) -> StageOutput:
        """Refine boxes (B, Q, 4) XYXY in pixels with queries (B, Q, C)."""
        batch, number = boxes.shape[:2]
        images = torch.arange(batch, device=boxes.device)[:, None].expand(-1, number).flatten()
        crops = pyramid.pool(boxes.flatten(0, 1), images, self.pool_size).flatten(2).transpose(1, 2)  # (n, S^2, C)

        # The first stage's queries are sums of maps that nothing has normalised: their products may exceed float16
        with without_autocast(features.device):
            queries = full_precision(features)
            attended = self.self_attn(queries, queries)
        x = self.norm1(features + self.dropout(attended))
        interaction = self.inst_interact(x.flatten(0, 1), crops).view_as(x)
        x = self.norm2(x + self.dropout(interaction))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.elu_(self.linear1(x))))))

        logits = self.class_logits(self.cls_module(x))
        deltas = self.bboxes_delta(self.reg_module(x))
        return StageOutput(logits, move_boxes(full_precision(boxes), full_precision(deltas)), x)

    def heads(self) -> list[nn.Module]:
        """What nothing but this stage's own losses trains."""
        return [self.cls_module, self.class_logits, self.reg_module, self.bboxes_delta]
