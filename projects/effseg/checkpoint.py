"""The published checkpoints of EffSeg's release, whose two generations differ in the detector: FQDet and FQDetV2."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint import Drop, Rename, Report, Rule, State, apply_rules

_HEADS = r"^heads\.gvd\."

# The release's NormActLinear and NormActConv, stored as `norm` and `lin` or `conv`, are entries 0 and 2 of a Sequential
_DETECTOR_RULES: list[Rule] = [
    Rename(rf"{_HEADS}group_init_sel\.logits\.pre\.0\.norm\.", "selector.layers.0.0."),
    Rename(rf"{_HEADS}group_init_sel\.logits\.pre\.0\.conv\.", "selector.layers.0.2."),
    *(
        Rename(rf"{_HEADS}group_init_sel\.logits\.pre\.1\.{name}\.{part}\.", f"selector.layers.1.layer.{unit}.{index}.")
        for unit, name in enumerate(("proj", "bottle", "expansion"))
        for part, index in (("norm", 0), ("conv", 2))
    ),
    Rename(rf"{_HEADS}group_init_sel\.logits\.proj\.conv\.", "selector.projection."),
    Rename(rf"{_HEADS}group_init_sel\.post\.0\.module_list\.(\d+)\.norm\.", r"transitions.\1.0."),
    Rename(rf"{_HEADS}group_init_sel\.post\.0\.module_list\.(\d+)\.lin\.", r"transitions.\1.2."),
    Rename(rf"{_HEADS}group_init_sel\.box_encoder\.", "anchor_encoder."),
    Rename(rf"{_HEADS}dec_layers\.", "layers."),
    Rename(r"^(layers\.\d+)\.0\.attn\.norm\.", r"\1.cross_attention.norm."),
    Rename(r"^(layers\.\d+)\.0\.attn\.msda\.", r"\1.cross_attention.attention."),
    Rename(r"(\.cross_attention\.attention)\.attn_weights\.", r"\1.attention_weights."),
    Rename(r"(\.cross_attention\.attention)\.val_proj\.", r"\1.value_proj."),
    Rename(r"(\.cross_attention\.attention)\.out_proj\.", r"\1.output_proj."),
    Rename(r"^(layers\.\d+)\.1\.norm\.", r"\1.self_attention.norm."),
    Rename(r"^(layers\.\d+)\.1\.mha\.", r"\1.self_attention.attention."),
    Rename(r"^(layers\.\d+)\.2\.mlp1\.norm\.", r"\1.ffn.layer.0."),
    Rename(r"^(layers\.\d+)\.2\.mlp1\.lin\.", r"\1.ffn.layer.1."),
    Rename(r"^(layers\.\d+)\.2\.mlp2\.lin\.", r"\1.ffn.layer.3."),
    Rename(rf"{_HEADS}heads\.0\.logits\.", "class_head."),
    Rename(rf"{_HEADS}heads\.1\.logits\.", "box_head."),
    # FQDet's heads and encoder: a layer, and one with a skip connection
    Rename(r"^(class_head|box_head)\.0\.norm\.", r"\1.0.0."),
    Rename(r"^(class_head|box_head)\.0\.lin\.", r"\1.0.2."),
    Rename(r"^(class_head|box_head|anchor_encoder)\.1\.norm\.", r"\1.1.layer.0."),
    Rename(r"^(class_head|box_head|anchor_encoder)\.1\.lin\.", r"\1.1.layer.2."),
]


def convert_detector(state: Mapping[str, Tensor | np.ndarray]) -> tuple[State, Report]:
    """Turn a state dict of the release into one for :class:`querymask.effseg.fqdet.FQDet`.

    The backbone, the feature pyramid and the segmentation head are left out.

    Args:
        state: the release's tensors by key, of FQDet or FQDetV2.

    Returns:
        the detector's state dict, and the report of what was renamed and dropped.

    Raises:
        CheckpointError: two keys get the same name.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    rules = [
        Drop(r"^(backbone|core)\.", "backbone or feature pyramid"),
        Drop(rf"{_HEADS}heads\.2\.", "segmentation head"),
        *_DETECTOR_RULES,
    ]
    return apply_rules(state, rules)
