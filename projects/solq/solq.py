"""SOLQ (Dong et al., NeurIPS 2021): Deformable DETR whose queries also regress a coded mask.

Data flow (B images, L levels, Q queries, C width, N decoder layers, K entries of a mask vector)::

    images (B, 3, H, W) -> backbone C3..C5
      -> DeformableDETR (detector.py): hidden states (N, B, Q, C), classes and boxes
      -> VectorBranch (vectors.py): mask vectors (., K) of matched or selected queries, decoded and pasted

With SQRBranch (sqr.py) instead of the vectors it is the paper's baseline, without a mask branch Deformable DETR.
"""

from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.meta_arch import QuerySegmenter
from querymask.solq.checkpoint import MOVED
from querymask.solq.detector import DeformableDETR
from querymask.solq.vectors import VectorBranch


@META_ARCH_REGISTRY.register()
class SOLQ(QuerySegmenter):
    """The meta-architecture."""

    detector_type = DeformableDETR
    own_mask_branch = VectorBranch
    moved = MOVED
