"""ISDA (Ying et al. 2022): a transformer's queries make position-aware kernels, and those make masks. No boxes, no NMS.

Data flow (B images, L levels, Q queries, C width, N decoder layers)::

    images (B, 3, H, W), padded to multiples of the coarsest backbone stride -> backbone C2..C5
      -> BoxFreeDETR (detector.py): P2..P6, hidden states (N, B, Q, C), reference points (B, Q, 2), classes
      -> KernelBranch (kernels.py): mask features (B, C, H / 4, W / 4), kernels (N, B, Q, C), masks
"""

from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.meta_arch import QuerySegmenter
from querymask.isda.checkpoint import MOVED
from querymask.isda.detector import BoxFreeDETR
from querymask.isda.kernels import KernelBranch


@META_ARCH_REGISTRY.register()
class ISDA(QuerySegmenter):
    """The meta-architecture."""

    detector_type = BoxFreeDETR
    own_mask_branch = KernelBranch
    moved = MOVED
