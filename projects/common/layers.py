"""Small modules that several methods use."""

from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A layer of which training may keep the input alone: the backward pass then computes it again.

    Attributes:
        recompute: it does so (``MODEL.USE_CHECKPOINT``).
    """

    recompute = False

    def run(self, *args: Any) -> Any:
        """What calling the layer gives."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self, *args, use_reentrant=False)
        return self(*args)


def recompute_layers(model: nn.Module) -> None:
    """Let all layers that may be recomputed be so: less memory, a forward pass more time."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = True


class SelfAttention(nn.MultiheadAttention):
    """Multi-head attention of queries to each other, with ``torch.nn.MultiheadAttention``'s parameters and numbers.

    Queries and keys are the same, so they are projected at once; and what is batch first is not transposed, which would
    make linear layers of two operators each, and copies between them.

    Args:
        width: C.
        num_heads: M, a divisor of C.
        dropout: of the weights.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(width, num_heads, dropout=dropout, batch_first=True)

    def forward(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Attend.

        Args:
            query: (B, Q, C), which is the keys, too.
            value: (B, Q, C).

        Returns:
            (B, Q, C).
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is value:
            projected = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            parts = [2 * self.embed_dim, self.embed_dim]
            (of_queries, of_values), (bias, value_bias) = weight.split(parts), bias.split(parts)
            projected = (*F.linear(query, of_queries, bias).chunk(2, dim=-1), F.linear(value, of_values, value_bias))
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]
        attended = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout if self.training else 0.0)
        # In memory queries come before images, as in PyTorch's: a dropout behind it draws its numbers in this order
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


class MLP(nn.Module):
    """Linear layers with ReLU between them, as DETR's heads have."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskLayers(Recomputable):
    """The mask head of Mask R-CNN (He et al. 2017, figure 4): four convolutions, twice the size, a mask for each class.

    Args:
        width: C.
        num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.classifier):
            c2_msra_fill(layer)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, C, S, S) -> logits (n, K, 2 S, 2 S)."""
        for conv in self.convs:
            features = conv(features).relu()
        return self.classifier(self.upsample(features).relu())


class LevelProjections(nn.ModuleList):
    """Backbone maps to transformer levels of one width (Zhu et al. 2021, appendix A.4).

    One 1x1 convolution with GroupNorm per backbone map; every further level is a 3x3 convolution of stride 2 with
    GroupNorm, the first from the last backbone map itself, later ones from the level before. Entry ``l`` of the list is
    ``Sequential(convolution, norm)``.

    Args:
        in_channels: channels of the backbone maps, fine to coarse.
        width: channels of every level; a multiple of ``groups``.
        num_levels: number of levels, at least ``len(in_channels)``.
        bias: whether the convolutions have one.
        groups: groups of GroupNorm.
    """

    def __init__(
        self, in_channels: list[int], width: int, num_levels: int, bias: bool = True, groups: int = 32
    ) -> None:
        if num_levels < len(in_channels):
            raise ValueError(
                f"{num_levels} feature levels for {len(in_channels)} backbone maps: name fewer maps in IN_FEATURES or "
                "raise NUM_FEATURE_LEVELS"
            )
        if width % groups:
            raise ValueError(f"the width of the transformer, {width}, must be a multiple of {groups} (GroupNorm)")
        layers = [nn.Conv2d(channels, width, 1, bias=bias) for channels in in_channels]
        for extra in range(num_levels - len(in_channels)):
            source = in_channels[-1] if extra == 0 else width
            layers.append(nn.Conv2d(source, width, 3, stride=2, padding=1, bias=bias))
        for conv in layers:
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        super().__init__(nn.Sequential(conv, nn.GroupNorm(groups, width)) for conv in layers)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Backbone maps (B, C_i, H_i, W_i), fine to coarse -> levels (B, width, H_l, W_l)."""
        levels = [projection(feature) for projection, feature in zip(self, features, strict=False)]
        for index in range(len(features), len(self)):
            levels.append(self[index](features[-1] if index == len(features) else levels[-1]))
        return levels
