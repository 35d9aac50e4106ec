"""Convolution on structure-preserving sparsity. Its kernels are in csrc/sps."""

from querymask.common.ops.sps.deformable import deformable_sparse_conv2d
from querymask.common.ops.sps.operator import multi_dilation_sparse_conv2d, sparse_conv2d
from querymask.common.ops.sps.reference import sparse_conv2d_reference

__all__ = ["deformable_sparse_conv2d", "multi_dilation_sparse_conv2d", "sparse_conv2d", "sparse_conv2d_reference"]
