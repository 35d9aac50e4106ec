"""Names of EffSeg's refinement head in the release's checkpoints. The head becomes ``mask_branch.head``."""

from torch import Tensor

from querymask.common.checkpoint import Change, Rename, Rule

_HEAD = r"^heads\.gvd\.heads\.2\."
_PROCESSING = rf"{_HEAD}proc\.(\d+)\."
_TAPS = 9


def _dense_kernel(weight: Tensor) -> Tensor:
    """[C_out, taps * C_in], taps row-major and before the channels -> [C_out, C_in, 3, 3]."""
    return weight.view(weight.shape[0], 3, 3, weight.shape[1] // _TAPS).permute(0, 3, 1, 2).contiguous()


EFFSEG_HEAD_RULES: list[Rule] = [
    Rename(rf"{_HEAD}qry\.", "mask_branch.head.query_fusion.query."),
    Rename(rf"{_HEAD}fuse_qry\.", "mask_branch.head.query_fusion.fuse."),
    Rename(rf"{_HEAD}roi_ins\.(\d+)\.conv\.", r"mask_branch.head.convs.\1."),
    Rename(rf"{_HEAD}seg\.", "mask_branch.head.segmentation."),
    Rename(rf"{_HEAD}ref\.", "mask_branch.head.refinement."),
    Rename(rf"{_HEAD}fuse_td\.(\d+)\.0\.", r"mask_branch.head.stages.\1.child_features.expand."),
    Rename(rf"{_HEAD}fuse_td\.(\d+)\.3\.", r"mask_branch.head.stages.\1.child_features.shared."),
    Rename(rf"{_HEAD}fuse_key\.(\d+)\.", r"mask_branch.head.stages.\1.fusion.layers."),
    Rename(rf"{_HEAD}trans\.(\d+)\.", r"mask_branch.head.stages.\1.transition."),
    Rename(rf"{_PROCESSING}0\.", r"mask_branch.head.stages.\1.processing.before.0."),
    Rename(rf"{_PROCESSING}2\.sub_modules\.(\d+)\.0\.", r"mask_branch.head.stages.\1.processing.core.branches.\2."),
    Rename(rf"{_PROCESSING}3\.", r"mask_branch.head.stages.\1.processing.after.0."),
    Rename(rf"{_PROCESSING}5\.", r"mask_branch.head.stages.\1.processing.after.2."),
    Change(
        r"^mask_branch\.head\.stages\.\d+\.processing\.core\.branches\.\d+\.weight$",
        _dense_kernel,
        "kernel of 3 x 3 taps",
    ),
]
"""The head with SFM, the only one with published checkpoints; its keys begin with ``heads.gvd.heads.2``."""
