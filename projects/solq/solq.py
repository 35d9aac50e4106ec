"""SOLQ (Dong et al., NeurIPS 2021): Deformable DETR whose queries also regress a coded mask.

Data flow (B images, L levels, Q queries, C width, N decoder layers, K entries of a mask vector)::

    images (B, 3, H, W) -> backbone C3..C5
      -> DeformableDETR (detector.py): hidden states (N, B, Q, C), classes and boxes
      -> VectorBranch (vectors.py): mask vectors (., K) of matched or selected queries, decoded and pasted

With SQRBranch (sqr.py) instead of the vectors it is the paper's baseline, without a mask branch Deformable DETR.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.meta_arch import QuerySegmenter
from querymask.solq.checkpoint import MOVED
from querymask.solq.detector import DeformableDETR
from querymask.solq.sqr import SQRBranch
from querymask.solq.vectors import VectorBranch

MASK_BRANCHES = {"vector": VectorBranch, "sqr": SQRBranch}


@META_ARCH_REGISTRY.register()
class SOLQ(QuerySegmenter):
    """The meta-architecture."""

    detector_type = DeformableDETR
    moved = MOVED

    @classmethod
    def own_mask_branch(cls, cfg: CfgNode) -> str:
        """What ``MODEL.SOLQ`` says."""
        solq = cfg.MODEL.SOLQ
        if solq.MASK_BRANCH not in MASK_BRANCHES:
            raise ValueError(f"MODEL.SOLQ.MASK_BRANCH is {solq.MASK_BRANCH!r}: choose one of {tuple(MASK_BRANCHES)}")
        return MASK_BRANCHES[solq.MASK_BRANCH].__name__ if solq.MASK_ON else "none"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        freeze = cfg.MODEL.SOLQ.FREEZE_DETECTOR
        if freeze and cls.mask_branch_name(cfg) == "none":
            raise ValueError("MODEL.SOLQ.FREEZE_DETECTOR leaves nothing to train where MASK_ON is False: set it False")
        return {**super().from_config(cfg), "freeze_detector": freeze}
