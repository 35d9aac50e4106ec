"""Operators with compiled kernels. Needs torch alone: nothing here imports Detectron2."""

from querymask.common.ops.flops import flop_formulas, fvcore_handles
from querymask.common.ops.msda import multi_scale_deformable_attention
from querymask.common.ops.msda_reference import multi_scale_deformable_attention_reference
from querymask.common.ops.sps import multi_dilation_sparse_conv2d, sparse_conv2d
from querymask.common.ops.sps_deformable import deformable_sparse_conv2d
from querymask.common.ops.sps_reference import sparse_conv2d_reference

__all__ = [
    "deformable_sparse_conv2d",
    "flop_formulas",
    "fvcore_handles",
    "multi_dilation_sparse_conv2d",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_reference",
    "sparse_conv2d",
    "sparse_conv2d_reference",
]
