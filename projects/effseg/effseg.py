"""EffSeg (Picron and Tuytelaars 2023): FQDet, and a segmentation head on its queries.

Data flow (B images, Q queries, C width, K classes, n regions, S side of a mask)::

    images (B, 3, H, W) -> backbone C2..C5
      -> FQDet (fqdet/): levels P_l (B, C, H_l, W_l); queries (B, Q, C), class logits (B, Q, K + 1), boxes
      -> EffSegBranch (region_branch.py) or that of a head it is compared with: matched or selected queries become
         regions; segmentation head: regions -> probabilities (n, S, S) -> pasted, scored, thresholded

Without a mask branch this is FQDet.
"""

from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.meta_arch import QuerySegmenter
from querymask.effseg.checkpoint import MOVED
from querymask.effseg.fqdet import FQDet
from querymask.effseg.region_branch import EffSegBranch


@META_ARCH_REGISTRY.register()
class EffSeg(QuerySegmenter):
    """The meta-architecture."""

    detector_type = FQDet
    own_mask_branch = EffSegBranch
    moved = MOVED
