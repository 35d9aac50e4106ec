"""Frozen batch norm whose factors are made once."""

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn


class KeptFrozenBatchNorm2d(FrozenBatchNorm2d):
    """Detectron2's, which in training makes a factor and an offset of its four buffers in every step, with seven
    or more small operators a layer. Here they are made anew only when a buffer, or the type of the input, has changed.
    """

    _made: tuple[object, tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if not x.requires_grad or torch.compiler.is_compiling() or type(x) is not Tensor:  # a tracer's is not kept
            return super().forward(x)
        factor, offset = self._factors(x.dtype)
        return x * factor + offset

    @torch.no_grad()
    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) each."""
        buffers = self.weight, self.bias, self.running_mean, self.running_var
        state = (dtype, *((buffer.data_ptr(), buffer._version) for buffer in buffers))
        if self._made is None or self._made[0] != state:
            weight, bias, mean, variance = buffers
            factor = weight * (variance + self.eps).rsqrt()
            offset = bias - mean * factor
            made = factor.view(1, -1, 1, 1).to(dtype), offset.view(1, -1, 1, 1).to(dtype)
            self._made = state, tuple(buffer.detach() for buffer in buffers), made  # so their memory is not used again
        return self._made[2]


def keep_frozen_factors(backbone: nn.Module) -> nn.Module:
    """Let all frozen batch norms of a backbone be :class:`KeptFrozenBatchNorm2d`, in place."""
    for module in backbone.modules():
        if type(module) is FrozenBatchNorm2d:
            module.__class__ = KeptFrozenBatchNorm2d  # the same buffers, under the same names
    return backbone
