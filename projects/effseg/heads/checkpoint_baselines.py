"""The release's names of the heads that EffSeg is compared with. The head becomes ``mask_branch.head``."""

from collections.abc import Mapping

from querymask.common.checkpoint import Rename, Rule

_HEAD = r"^heads\.gvd\.heads\.2\."
_MASKS = rf"{_HEAD}mask_head\."

_FUSION_RULES: list[Rule] = [
    Rename(rf"{_HEAD}qry\.", "mask_branch.head.query_fusion.query."),
    Rename(rf"{_HEAD}fuse_qry\.", "mask_branch.head.query_fusion.fuse."),
]
_MASK_RCNN_RULES: list[Rule] = [
    *_FUSION_RULES,
    Rename(rf"{_MASKS}convs\.(\d+)\.conv\.", r"mask_branch.head.layers.convs.\1."),
    Rename(rf"{_MASKS}upsample\.", "mask_branch.head.layers.upsample."),
    Rename(rf"{_MASKS}conv_logits\.", "mask_branch.head.layers.classifier."),
]

_POINTREND_RULES: list[Rule] = [
    *_FUSION_RULES,
    Rename(rf"{_MASKS}convs\.(\d+)\.conv\.", r"mask_branch.head.coarse_layers.convs.\1."),
    Rename(rf"{_MASKS}upsample\.", "mask_branch.head.coarse_layers.upsample."),
    Rename(rf"{_MASKS}conv_logits\.", "mask_branch.head.coarse_layers.classifier."),
    Rename(rf"{_HEAD}point_head\.fcs\.(\d+)\.conv\.", r"mask_branch.head.point_layers.layers.\1."),
    Rename(rf"{_HEAD}point_head\.fc_logits\.", "mask_branch.head.point_layers.classifier."),
]
_STAGES = rf"{_MASKS}stages\.(\d+)\."
_REFINE_MASK_RULES: list[Rule] = [
    *_FUSION_RULES,
    Rename(rf"{_MASKS}(instance|semantic)_convs\.(\d+)\.conv\.", r"mask_branch.head.\1_convs.\2."),
    Rename(rf"{_MASKS}stage_instance_logits\.", "mask_branch.head.classifiers."),
    Rename(rf"{_STAGES}semantic_transform_in\.", r"mask_branch.head.stages.\1.semantic."),
    Rename(rf"{_STAGES}fuse_conv\.0\.", r"mask_branch.head.stages.\1.reduce."),
    *(
        Rename(
            rf"{_STAGES}fuse_conv\.1\.dilation_conv_{number}\.conv\.",
            rf"mask_branch.head.stages.\1.fusion.branches.{number - 1}.",
        )
        for number in (1, 2, 3)
    ),
    Rename(rf"{_STAGES}fuse_conv\.1\.merge_conv\.conv\.", r"mask_branch.head.stages.\1.fusion.merge."),
    Rename(rf"{_STAGES}fuse_transform_out\.", r"mask_branch.head.stages.\1.narrow."),
]

BASELINE_HEAD_RULES: Mapping[str, list[Rule]] = {
    "MaskRCNNBranch": _MASK_RCNN_RULES,
    "PointRendBranch": _POINTREND_RULES,
    "RefineMaskBranch": _REFINE_MASK_RULES,
}
"""For each mask branch; the release's keys of all heads begin with ``heads.gvd.heads.2``."""
