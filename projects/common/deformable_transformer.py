"""The deformable transformer (Zhu et al., ICLR 2021): encoder, decoder with refinement, two-stage proposals.

Letters: B images, Q queries, C width, L levels, M heads, P points, S tokens, N decoder layers; see
``deformable_attention`` for tokens and positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from yacs.config import CfgNode

from querymask.common.boxes import inverse_sigmoid
from querymask.common.deformable_attention import (
    DeformableAttention,
    SpatialShapes,
    encoder_reference_points,
    flatten_levels,
    of_tokens,
    token_centres,
    valid_ratios,
)
from querymask.common.layers import Recomputable, SelfAttention
from querymask.common.position_encoding import sine_box_encoding, sine_position_encoding
from querymask.common.precision import full_precision, without_autocast

Refine = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def _feed_forward(layer: "EncoderLayer | DecoderLayer", x: torch.Tensor) -> torch.Tensor:
    # The same as dropout after ReLU, whose result is then what the second layer keeps, and nothing else is kept of it
    return layer.dropout(layer.linear2(F.relu(layer.dropout(layer.linear1(x)))))


class EncoderLayer(Recomputable):
    """Deformable self-attention of the tokens, then the feed-forward network; post-norm."""

    def __init__(
        self, embed_dim: int, dim_feedforward: int, dropout: float, num_heads: int, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        reference: torch.Tensor,
        shapes: SpatialShapes,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens (B, S, C), their positions (B, S, C) and references (B, S, L, 2) -> (B, S, C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, shapes, padding_mask)))
        return self.norm2(x + _feed_forward(self, x))


class DecoderLayer(Recomputable):
    """Self-attention of the queries, deformable attention to the memory, feed-forward network; post-norm."""

    def __init__(
        self, embed_dim: int, dim_feedforward: int, dropout: float, num_heads: int, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attn = SelfAttention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        reference: torch.Tensor,
        memory: torch.Tensor,
        shapes: SpatialShapes,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries (B, Q, C), positions (B, Q, C), references (B, Q, L, 2 or 4), memory (B, S, C) -> (B, Q, C)."""
        x = self.norm2(x + self.dropout(self.self_attn(x + position, x)))
        x = self.norm1(x + self.dropout(self.cross_attn(x + position, reference, memory, shapes, padding_mask)))
        return self.norm3(x + _feed_forward(self, x))


class Encoder(nn.Module):
    """A stack of encoder layers.

    Args:
        layers: the stack.
    """

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        shapes: SpatialShapes,
        valid_ratios: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens (B, S, C), their positions (B, S, C) and valid ratios (B, L, 2) -> memory (B, S, C)."""
        reference = encoder_reference_points(shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        for layer in self.layers:
            x = layer.run(x, position, reference, shapes, padding_mask)
        return x


@dataclass
class DecoderOutput:
    """What a decoder returns.

    Attributes:
        hidden: (N, B, Q, C) output of every layer.
        references: N + 1 references (B, Q, 2 or 4): the one that enters each layer, and the last refined one.
        boxes: (N, B, Q, 4) refined boxes with gradient, cx, cy, w, h in [0, 1]; None without refinement.
    """

    hidden: torch.Tensor
    references: list[torch.Tensor]
    boxes: torch.Tensor | None


class Decoder(nn.Module):
    """A stack of decoder layers with optional iterative refinement of the references."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        reference: torch.Tensor,
        memory: torch.Tensor,
        shapes: SpatialShapes,
        valid_ratios: torch.Tensor,
        padding_mask: torch.Tensor | None,
        refine: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
            x, position: (B, Q, C) initial content and position of the queries.
            reference: (B, Q, 2 or 4), relative to the unpadded image.
            memory: (B, S, C).
            refine: (layer index, hidden (B, Q, C), entering reference) -> boxes (B, Q, 4). Their values, detached,
                are the reference of the next layer.
        """
        hidden, boxes, references = [], [], [reference]
        scale = torch.cat((valid_ratios, valid_ratios), dim=-1)[:, None]
        for index, layer in enumerate(self.layers):
            relative = reference[:, :, None] * scale[..., : reference.shape[-1]]
            x = layer.run(x, position, relative, memory, shapes, padding_mask)
            hidden.append(x)
            if refine is not None:
                boxes.append(refine(index, x, reference))
                reference = boxes[-1].detach()
            references.append(reference)
        return DecoderOutput(torch.stack(hidden), references, torch.stack(boxes) if boxes else None)


@dataclass
class Proposals:
    """What the encoder proposes in the two-stage form.

    Attributes:
        logits: (B, S, K) class logits of every token.
        boxes: (B, S, 4) cx, cy, w, h in [0, 1].
    """

    logits: torch.Tensor
    boxes: torch.Tensor


@dataclass
class TransformerOutput(DecoderOutput):
    """A decoder's output with what came before it.

    Attributes:
        memory: (B, S, C) output of the encoder.
        shapes: (H, W) of every level.
        proposals: in the two-stage form.
    """

    memory: torch.Tensor
    shapes: SpatialShapes
    proposals: Proposals | None


class DeformableTransformer(nn.Module):
    """Encoder and decoder on a feature pyramid.

    Args:
        embed_dim, num_heads, dim_feedforward, dropout: of every layer.
        enc_layers, dec_layers: number of layers.
        num_levels: levels L of the pyramid.
        enc_points, dec_points: sampling points per head and level.
        num_proposals: queries are made of this many best proposals of the encoder (two-stage form); 0: queries are
            given to ``forward``.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        num_levels: int = 4,
        enc_points: int = 4,
        dec_points: int = 4,
        num_proposals: int = 0,
    ) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"the width {embed_dim} must be a multiple of 4: sine and cosine of x and y")
        self.embed_dim = embed_dim
        self.num_proposals = num_proposals
        common = (embed_dim, dim_feedforward, dropout, num_heads, num_levels)
        self.encoder = Encoder([EncoderLayer(*common, enc_points) for _ in range(enc_layers)])
        self.decoder = Decoder([DecoderLayer(*common, dec_points) for _ in range(dec_layers)])
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))
        if num_proposals:
            self.enc_output = nn.Linear(embed_dim, embed_dim)
            self.enc_output_norm = nn.LayerNorm(embed_dim)
            self.pos_trans = nn.Linear(embed_dim * 2, embed_dim * 2)
            self.pos_trans_norm = nn.LayerNorm(embed_dim * 2)
        else:
            self.reference_points = nn.Linear(embed_dim, 2)
        self.reset_parameters()

    @classmethod
    def from_section(cls, section: CfgNode, num_proposals: int = 0) -> "DeformableTransformer":
        """The transformer of a method's section of the config, such as ``cfg.MODEL.SOLQ``."""
        return cls(
            embed_dim=section.HIDDEN_DIM,
            num_heads=section.NUM_HEADS,
            enc_layers=section.ENC_LAYERS,
            dec_layers=section.DEC_LAYERS,
            dim_feedforward=section.DIM_FEEDFORWARD,
            dropout=section.DROPOUT,
            num_levels=section.NUM_FEATURE_LEVELS,
            enc_points=section.ENC_POINTS,
            dec_points=section.DEC_POINTS,
            num_proposals=num_proposals,
        )

    def reset_parameters(self) -> None:
        """Xavier for every matrix, then what deformable attention asks for."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not self.num_proposals:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        levels: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        query_embed: torch.Tensor | None = None,
        refine: Refine | None = None,
        proposal_heads: tuple[nn.Module, nn.Module] | None = None,
        padded: bool = True,
    ) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            levels: L maps (B, C, H_l, W_l).
            masks: L padding masks (B, H_l, W_l), true on padding.
            query_embed: (Q, 2C) position and initial content of the queries; None in the two-stage form.
            refine: see ``Decoder.forward``.
            proposal_heads: class head and box head of the encoder's proposals, in the two-stage form.
            padded: false if no mask holds padding; saves masking.
        """
        shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
        # Under autocast, positions and the sums along the layers are in float32.
        tokens = full_precision(flatten_levels(levels))
        dtype = tokens.dtype
        ratios = valid_ratios(masks, dtype)
        position = sine_position_encoding(masks, self.embed_dim // 2, dtype) + of_tokens(self.level_embed, shapes)
        padding_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
        memory = self.encoder(tokens, position, shapes, ratios, padding_mask)

        proposals = None
        if self.num_proposals:
            if proposal_heads is None:
                raise ValueError("the two-stage form needs proposal_heads")
            proposals, x, query_position, reference = self._propose(memory, masks, shapes, *proposal_heads)
        else:
            if query_embed is None:
                raise ValueError("the one-stage form needs query_embed")
            query_position, x = query_embed.expand(len(memory), -1, -1).chunk(2, dim=-1)
            with without_autocast(tokens.device):
                reference = self.reference_points(query_position).sigmoid()
        decoded = self.decoder(x, query_position, reference, memory, shapes, ratios, padding_mask, refine)
        return TransformerOutput(decoded.hidden, decoded.references, decoded.boxes, memory, shapes, proposals)

    def _propose(
        self,
        memory: torch.Tensor,
        masks: Sequence[torch.Tensor],
        shapes: SpatialShapes,
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> tuple[Proposals, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score every token as a proposal and make queries of the best ones (appendix A.4 of the paper).

        Returns:
            the proposals, then content (B, Q, C), position (B, Q, C) and reference boxes (B, Q, 4) of the queries.
        """
        priors, usable = proposal_boxes(masks, shapes, memory.dtype)
        output = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0)))
        logits = class_head(output)
        box_logits = box_head(output) + torch.log(priors / (1 - priors)).masked_fill(~usable, torch.inf)
        best = logits[..., 0].topk(min(self.num_proposals, logits.shape[1]), dim=1).indices
        reference = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        encoding = sine_box_encoding(reference, self.embed_dim // 2)
        position, content = full_precision(self.pos_trans_norm(self.pos_trans(encoding))).chunk(2, dim=-1)
        return Proposals(logits, box_logits.sigmoid()), content, position, reference


def proposal_boxes(
    masks: Sequence[torch.Tensor], shapes: SpatialShapes, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A box per token: at the cell's centre, with sides 0.05 * 2^level of the image.

    Returns:
        (B, S, 4) cx, cy, w, h relative to the unpadded image, and (B, S, 1) bool: inside the image and with all
        coordinates within (0.01, 0.99).
    """
    boxes = []
    for level, (mask, shape) in enumerate(zip(masks, shapes, strict=True)):
        valid_size = torch.stack(((~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1).to(dtype)
        centres = token_centres((shape,), like=valid_size) / valid_size[:, None]
        boxes.append(torch.cat((centres, torch.full_like(centres, 0.05 * 2.0**level)), dim=-1))
    priors = torch.cat(boxes, dim=1)
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)[..., None]
    usable = ((priors > 0.01) & (priors < 0.99)).all(-1, keepdim=True) & ~padding
    return priors, usable


def refine_box(delta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Move a reference by a predicted delta in logit space.

    Args:
        delta: (..., 4).
        reference: (..., 4) box or (..., 2) point, which moves the centre only.

    Returns:
        (..., 4) box in [0, 1].
    """
    logit = inverse_sigmoid(reference)
    if logit.shape[-1] == 2:
        logit = F.pad(logit, (0, 2))
    return (delta + logit).sigmoid()
