"""Multi-scale deformable attention. Its kernels are in csrc/msda."""

from querymask.common.ops.msda.operator import multi_scale_deformable_attention
from querymask.common.ops.msda.reference import multi_scale_deformable_attention_reference

__all__ = ["multi_scale_deformable_attention", "multi_scale_deformable_attention_reference"]
