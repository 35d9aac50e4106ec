"""Names of the heads that EffSeg is compared with in the release's checkpoints. The head becomes ``mask_head``."""

from collections.abc import Mapping

from querymask.common.checkpoint import Rename, Rule

_HEAD = r"^heads\.gvd\.heads\.2\."
_MASKS = rf"{_HEAD}mask_head\."

_FUSION_RULES: list[Rule] = [
    Rename(rf"{_HEAD}qry\.", "mask_head.query_fusion.query."),
    Rename(rf"{_HEAD}fuse_qry\.", "mask_head.query_fusion.fuse."),
]
_MASK_RCNN_RULES: list[Rule] = [
    *_FUSION_RULES,
    Rename(rf"{_MASKS}convs\.(\d+)\.conv\.", r"mask_head.layers.convs.\1."),
    Rename(rf"{_MASKS}upsample\.", "mask_head.layers.upsample."),
    Rename(rf"{_MASKS}conv_logits\.", "mask_head.layers.classifier."),
]

BASELINE_HEAD_RULES: Mapping[str, list[Rule]] = {"mask_rcnn": _MASK_RCNN_RULES}
"""For each head; the release's keys of all heads begin with ``heads.gvd.heads.2``."""
