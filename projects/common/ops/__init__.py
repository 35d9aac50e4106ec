"""Operators with compiled kernels. Needs torch alone: nothing here imports Detectron2."""

from querymask.common.ops.flops import flop_formulas, fvcore_handles
from querymask.common.ops.msda import multi_scale_deformable_attention
from querymask.common.ops.msda_reference import multi_scale_deformable_attention_reference

__all__ = [
    "flop_formulas",
    "fvcore_handles",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_reference",
]
