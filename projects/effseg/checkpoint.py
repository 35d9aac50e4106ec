"""The published checkpoints of EffSeg's release, whose two generations differ in the detector: FQDet and FQDetV2."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint import (
    Drop,
    Format,
    Options,
    Rename,
    Report,
    Rule,
    State,
    apply_rules,
    register_format,
)
from querymask.common.checkpoint.formats import (
    drop_class_head,
    drop_mask_branch,
    new_if_dropped,
    own_format,
    resnet_rules,
    resnet_settings,
    without_masks,
)

MOVED = (
    (r"^mask_head\.", "mask_branch.head."),
    (r"^neck\.", "detector.neck."),
)
"""Names in checkpoints from before the parts had names, and those of today."""
PANOPTIC_CLASSES = 133
"""Of COCO's panoptic annotations: 80 things, 53 of stuff."""
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


# Backbone and feature pyramid
_BODY_RULES: list[Rule] = [
    Drop(r"^backbone\.in_norm_(mean|std)$", "pixel statistics, in MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"),
    *resnet_rules(r"^backbone\.body\.", "backbone."),
    Rename(r"^core\.body\.lateral_convs\.(\d+)\.conv\.", r"detector.neck.laterals.\1."),
    Rename(r"^core\.body\.fpn_convs\.(\d+)\.conv\.", r"detector.neck.outputs.\1."),
]

# A key that only files with this segmentation head have -> MODEL.MASK_BRANCH.NAME. PointRend's has all of Mask R-CNN's.
_BRANCHES = (
    (r"\.heads\.2\.fuse_td\.", "EffSegBranch"),
    (r"\.heads\.2\.point_head\.", "PointRendBranch"),
    (r"\.heads\.2\.mask_head\.semantic_convs\.", "RefineMaskBranch"),
    (r"\.heads\.2\.mask_head\.conv_logits\.", "MaskRCNNBranch"),
)
# The class head (in FQDet a network of its own), and the layers of segmentation heads with a mask or an input for each
# class: the last layers of Mask R-CNN's and PointRend's, those of RefineMask's stages, PointRend's point layers
_CLASS_LAYERS = (
    r"^(detector\.class_head\."
    r"|mask_branch\.head\.((coarse_)?layers\.classifier|classifiers\.[0-2]|point_layers\..+)\.[^.]+$)"
)


def convert(
    state: Mapping[str, Tensor | np.ndarray],
    class_ids: object = None,
    *,
    drop_classes: bool = False,
    detector_only: bool = False,
) -> tuple[State, Report]:
    """Turn a state dict of EffSeg's release into one for ``querymask.effseg.EffSeg``.

    Args:
        state: the release's tensors by key, of any segmentation head on FQDet or FQDetV2, or of the detector alone.
        class_ids: not used: published heads have one row for each of COCO's 80 classes, of panoptic ones for each of
            the 133, in the model's order, and a last one for "no object".
        drop_classes: leave out the class head and the other layers that depend on the number of classes, for training
            on another data set.
        detector_only: leave the segmentation head out (``MODEL.MASK_BRANCH.NAME none``).

    Returns:
        the model's state dict, and the report of what was renamed and dropped.

    Raises:
        CheckpointError: two keys get the same name.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    rules = [
        *_BODY_RULES,
        *([drop_mask_branch(rf"{_HEADS}heads\.2\.")] if detector_only else _head_rules(_branch(state))),
        *_DETECTOR_RULES,
        Rename(r"^(?=(selector|transitions|anchor_encoder|layers|class_head|box_head)\.)", "detector."),
    ]
    if drop_classes:
        rules.append(drop_class_head(_CLASS_LAYERS))
    return apply_rules(state, rules)


# ---- What a file holds --------------------------------------------------------------------------------------------


def settings(state: State) -> dict[str, Any]:
    """The config keys that a file of the release demands, with their values, read off its shapes.

    The number of queries and the threshold of non-maximum suppression are not in the file.
    """
    layers = {match[1] for key in state if (match := re.match(r"heads\.gvd\.dec_layers\.(\d+)\.", key))}
    hidden, width = state["heads.gvd.dec_layers.0.2.mlp1.lin.weight"].shape
    first = "heads.gvd.group_init_sel."
    return {
        "MODEL.META_ARCHITECTURE": "EffSeg",
        **resnet_settings(state, "backbone.body."),
        "MODEL.EFFSEG.VERSION": 1 if f"{first}box_encoder.0.weight" in state else 2,
        "MODEL.EFFSEG.HIDDEN_DIM": width,
        "MODEL.EFFSEG.DEC_LAYERS": len(layers),
        "MODEL.EFFSEG.DIM_FEEDFORWARD": hidden,
        "MODEL.MASK_BRANCH.NAME": _branch(state),
    }


def _head_rules(branch: str) -> list[Rule]:
    """From the release's names of a segmentation head, which begin with heads.gvd.heads.2, to those of a branch."""
    if branch == "none":
        return []
    if branch == "EffSegBranch":
        from querymask.effseg.heads.checkpoint_effseg import EFFSEG_HEAD_RULES

        return EFFSEG_HEAD_RULES
    from querymask.effseg.heads.checkpoint_baselines import BASELINE_HEAD_RULES

    return BASELINE_HEAD_RULES[branch]


def _branch(state: State) -> str:
    for pattern, name in _BRANCHES:
        if any(re.search(pattern, key) for key in state):
            return name
    return "none"


def _num_classes(state: State) -> int:
    """Without "no object"."""
    (last,) = (value for key, value in state.items() if re.fullmatch(r"heads\.gvd\.heads\.0\.logits(\.2)?\.bias", key))
    return len(last) - 1


def _is_panoptic(state: State) -> bool:
    """Nothing else in a file tells."""
    return _num_classes(state) == PANOPTIC_CLASSES


def describe(state: State) -> str:
    """What a file of the release holds, in a line."""
    found = settings(state)
    detector = {1: "FQDet", 2: "FQDetV2"}[found["MODEL.EFFSEG.VERSION"]]
    head = {
        "EffSegBranch": f"EffSeg on {detector}",
        "MaskRCNNBranch": f"Mask R-CNN++ on {detector}",
        "PointRendBranch": f"PointRend++ on {detector}",
        "RefineMaskBranch": f"RefineMask++ on {detector}",
        "none": detector,
    }[found["MODEL.MASK_BRANCH.NAME"]]
    parts = [
        f"R{found['MODEL.RESNETS.DEPTH']}",
        f"{found['MODEL.EFFSEG.DEC_LAYERS']} layers",
        f"{_num_classes(state)} classes",
        *(["panoptic"] if _is_panoptic(state) else []),
    ]
    return f"{head} ({', '.join(parts)})"


# ---- Formats ------------------------------------------------------------------------------------------------------


def _convert_release(state: State, options: Options) -> tuple[State, Report]:
    return convert(state, drop_classes=options.drop_classes, detector_only=options.detector_only)


def _release_settings(state: State, options: Options) -> dict[str, Any]:
    found = settings(state)
    if options.detector_only:
        found = without_masks(found)
    if not options.drop_classes:
        found["MODEL.EFFSEG.NUM_CLASSES"] = _num_classes(state)
        if not options.detector_only:
            found["MODEL.PANOPTIC.ENABLED"] = _is_panoptic(state)
    return found


register_format(
    Format(
        "EffSeg or FQDet (DetSeg)",
        (r"^heads\.gvd\.group_init_sel\.", r"^backbone\.body\.", r"^core\.body\.lateral_convs\."),
        describe=describe,
        settings=_release_settings,
        convert=_convert_release,
        new_keys=new_if_dropped(_CLASS_LAYERS),
    )
)
register_format(
    own_format(
        "EffSeg",
        (r"^detector\.selector\.", r"^detector\.transitions\."),
        _CLASS_LAYERS,
        r"^mask_branch\.",
        MOVED,
    )
)
