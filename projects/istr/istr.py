"""ISTR (Hu et al. 2021): query boxes that are refined stage by stage, each with a coded mask.

Data flow (B images, Q queries, C width, N stages, K entries of a mask vector)::

    images (B, 3, H, W) -> ResNet and feature pyramid p2..p5 (B, C, H_l, W_l)
      -> RecurrentBoxes (detector.py): N stages of classes, boxes and object features (N, B, Q, C)
      -> CodeBranch (codes.py): mask codes (., K) of all, matched or selected queries, decoded and pasted

With PixelBranch (pixels.py) instead of the codes it has the mask head of Mask R-CNN.
"""

from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.meta_arch import QuerySegmenter
from querymask.istr.checkpoint import MOVED
from querymask.istr.codes import CodeBranch
from querymask.istr.detector import RecurrentBoxes


@META_ARCH_REGISTRY.register()
class ISTR(QuerySegmenter):
    """The meta-architecture."""

    detector_type = RecurrentBoxes
    own_mask_branch = CodeBranch
    moved = MOVED
