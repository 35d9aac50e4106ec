"""ISDA's own checkpoints, and COCO Deformable DETRs as its start.

The release stores the class and the kernel head six times, once for each decoder layer; the model has each once, so
the copies are checked and left out. Class rows are in the order of the data set's classes.

A Deformable DETR, one-stage and without box refinement, gives the backbone, the projections of C3 to C5, the
transformer, the queries and the class head. Its box head is left out; the projection of C2, the mask feature head and
the kernel head are new.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint import (
    CheckpointError,
    Copy,
    Drop,
    Format,
    Options,
    Rename,
    Report,
    Rule,
    State,
    apply_rules,
    pick_classes,
    register_format,
)
from querymask.common.checkpoint.formats import (
    drop_class_head,
    new_if_dropped,
    own_format,
    resnet_rules,
    resnet_settings,
)

_NEW_PARTS = r"^(detector\.fine_proj|mask_branch)\."
_CLASS_HEAD = r"^(detector\.)?class_embed\."
MOVED = (
    (r"^(transformer|fine_proj|input_proj|query_embed|class_embed)\.", r"detector.\1."),
    (r"^(mask_features|kernel_embed)\.", r"mask_branch.\1."),
)
"""Names without parts, as the rules below and older checkpoints have them, and those in the model."""
_MOVED_RULES = [Rename(*names) for names in MOVED]

# mmdetection's names of a transformer; version 3 has no `bbox_head.transformer` in front and named its attentions
_TRANSFORMER_RULES: list[Rule] = [
    Rename(r"^bbox_head\.transformer\.", "transformer."),
    Rename(r"^(?=(encoder|decoder|level_embed|reference_points_fc)\b)", "transformer."),
    Rename(r"^transformer\.reference_points_fc\.", "transformer.reference_points."),
    Rename(r"^transformer\.level_embeds$", "transformer.level_embed"),
    Rename(r"^(transformer\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    Rename(r"^(transformer\.decoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    Rename(r"^(transformer\.decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    Rename(r"^(transformer\.decoder\.layers\.\d+\.self_attn)\.attn\.", r"\1."),
    Rename(r"^(transformer\.\w+\.layers\.\d+)\.(?:ffns\.0|ffn)\.layers\.0\.0\.", r"\1.linear1."),
    Rename(r"^(transformer\.\w+\.layers\.\d+)\.(?:ffns\.0|ffn)\.layers\.1\.", r"\1.linear2."),
    Rename(r"^(transformer\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    Rename(r"^(transformer\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    # The decoder's norms in the order of their use: after self-attention, cross-attention, feed-forward network
    Rename(r"^(transformer\.decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    Rename(r"^(transformer\.decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    Rename(r"^(transformer\.decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
]


def _mmdetection_rules(extra_levels_after: int) -> list[Rule]:
    """From mmdetection's names to the model's; the neck has ``extra_levels_after`` maps of the backbone."""
    return [
        *_TRANSFORMER_RULES,
        Rename(r"^(bbox_head\.)?query_embedding\.", "query_embed."),
        Copy(r"^bbox_head\.cls_branches\.[1-9]\d*\.(.*)", r"bbox_head.cls_branches.0.\1"),
        Rename(r"^bbox_head\.cls_branches\.0\.", "class_embed."),
        Rename(r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
        Rename(r"^neck\.convs\.(\d+)\.gn\.", r"input_proj.\1.1."),
        Rename(r"^neck\.extra_convs\.(\d+)\.conv\.", lambda m: f"input_proj.{int(m[1]) + extra_levels_after}.0."),
        Rename(r"^neck\.extra_convs\.(\d+)\.gn\.", lambda m: f"input_proj.{int(m[1]) + extra_levels_after}.1."),
        *resnet_rules(r"^backbone\.", "backbone."),
    ]


def convert(state: Mapping[str, Tensor | np.ndarray], *, drop_classes: bool = False) -> tuple[State, Report]:
    """Turn a state dict of ISDA's release into one for ``querymask.isda.ISDA``.

    Args:
        state: the release's tensors by key.
        drop_classes: leave the class head out, for training on another data set.

    Returns:
        the model's state dict, and the report of what was used, renamed and dropped.

    Raises:
        CheckpointError: copies of a shared head differ.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    rules: list[Rule] = [
        *_mmdetection_rules(_count(state, r"^neck\.convs\.(\d+)\.")),
        Rename(r"^neck\.first_conv\.conv\.", "fine_proj.0.0."),
        Rename(r"^neck\.first_conv\.gn\.", "fine_proj.0.1."),
        Rename(r"^mask_feat_head\.convs_all_levels\.(\d+)\.conv(\d+)\.conv\.", r"mask_features.branches.\1.\2.0."),
        Rename(r"^mask_feat_head\.convs_all_levels\.(\d+)\.conv(\d+)\.gn\.", r"mask_features.branches.\1.\2.1."),
        Rename(r"^mask_feat_head\.conv_pred\.0\.conv\.", "mask_features.output.0."),
        Rename(r"^mask_feat_head\.conv_pred\.0\.gn\.", "mask_features.output.1."),
        Copy(r"^bbox_head\.kernel_branches\.[1-9]\d*\.(.*)", r"bbox_head.kernel_branches.0.\1"),
        # Linear layers alternate with ReLU
        Rename(r"^bbox_head\.kernel_branches\.0\.(\d+)\.", lambda m: f"kernel_embed.layers.{int(m[1]) // 2}."),
    ]
    return apply_rules(state, [*rules, *([drop_class_head(_CLASS_HEAD)] if drop_classes else []), *_MOVED_RULES])


def convert_mmdetection_detector(
    state: Mapping[str, Tensor | np.ndarray], *, drop_classes: bool = False
) -> tuple[State, Report]:
    """Turn a Deformable DETR of mmdetection (2 or 3) into the start of an ISDA.

    Raises:
        CheckpointError: it refines boxes or is two-stage: its class heads differ, or its queries are made of proposals.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    if any(re.search(r"(^|\.)(enc_output|memory_trans_fc)\.", key) for key in state):
        raise CheckpointError("This is a two-stage Deformable DETR. " + _WANTED)
    if not torch.equal(state["bbox_head.reg_branches.0.0.weight"], state["bbox_head.reg_branches.1.0.weight"]):
        raise CheckpointError("This is a Deformable DETR with box refinement. " + _WANTED)
    rules = [
        Drop(r"^bbox_head\.reg_branches\.", "box head: ISDA has no boxes"),
        *_mmdetection_rules(_count(state, r"^neck\.convs\.(\d+)\.")),
    ]
    return apply_rules(state, [*rules, *([drop_class_head(_CLASS_HEAD)] if drop_classes else []), *_MOVED_RULES])


def convert_original_detector(
    state: Mapping[str, Tensor | np.ndarray], class_ids: Sequence[int] | None, *, drop_classes: bool = False
) -> tuple[State, Report]:
    """Turn a Deformable DETR, of its authors' release or of this project, into the start of an ISDA.

    Args:
        class_ids: rows of the class head to keep, in the order of the model's classes. Published heads have 91 rows,
            one for each raw COCO category id. None keeps all rows.

    Raises:
        CheckpointError: it refines boxes or is two-stage.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    flat = {key.removeprefix("detector."): value for key, value in state.items()}
    if "query_embed.weight" not in flat:
        raise CheckpointError("This is a two-stage Deformable DETR. " + _WANTED)
    own = not any(key.startswith("backbone.0.") for key in state)
    # With refinement the release's decoder has the box heads, and this project's model one for every layer
    if any(re.match(r"bbox_embed\.1\." if own else r"transformer\.decoder\.bbox_embed\.", key) for key in flat):
        raise CheckpointError("This is a Deformable DETR with box refinement. " + _WANTED)
    rules: list[Rule] = [
        Rename(r"^detector\.", ""),
        Drop(r"(^|\.)total_(params|ops)$", "left over by a profiler"),
        Drop(r"^(bbox_embed|vector_embed|coding|mask_branch)\.", "head that ISDA does not have"),
        Drop(r"^input_proj\.\d+\.0\.bias$", "ISDA's projections have no bias"),
        Copy(r"^class_embed\.[1-9]\d*\.(.*)", r"class_embed.0.\1"),
        Rename(r"^class_embed\.0\.", "class_embed."),
        *([] if own else resnet_rules(r"^backbone\.0\.body\.", "backbone.")),
    ]
    if drop_classes:
        rules.append(drop_class_head(_CLASS_HEAD))
    elif class_ids is not None:
        rules.append(pick_classes(r"^class_embed\.(weight|bias)$", flat["class_embed.0.bias"].shape[0], class_ids))
    return apply_rules(state, [*rules, *_MOVED_RULES])


_WANTED = (
    "ISDA has learned queries, constant reference points and one class head for all layers: it starts from a one-stage "
    "model without box refinement."
)


def _count(state: State, pattern: str) -> int:
    """How many numbers the group of a pattern takes among the keys."""
    return len({match[1] for key in state if (match := re.search(pattern, key))})


# ---- What a file holds --------------------------------------------------------------------------------------------


def settings(state: State) -> dict[str, Any]:
    """The config keys that a file of the release demands, with their values, read off its shapes."""
    transformer = "bbox_head.transformer."
    width = state[transformer + "level_embeds"].shape[1]
    kernel_layers = _count(state, r"^bbox_head\.kernel_branches\.0\.(\d+)\.weight$")
    kernel_length = state[f"bbox_head.kernel_branches.0.{2 * kernel_layers - 2}.bias"].shape[0]
    branches = _count(state, r"^mask_feat_head\.convs_all_levels\.(\d+)\.")
    first_units = _count(state, r"^mask_feat_head\.convs_all_levels\.1\.conv(\d+)\.")
    coarsest = state[f"mask_feat_head.convs_all_levels.{branches - 1}.conv0.conv.weight"]
    result = {
        "MODEL.META_ARCHITECTURE": "ISDA",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        **resnet_settings(state, "backbone."),
        "MODEL.ISDA.NUM_QUERIES": state["bbox_head.query_embedding.weight"].shape[0],
        "MODEL.ISDA.HIDDEN_DIM": width,
        "MODEL.ISDA.NUM_FEATURE_LEVELS": state[transformer + "level_embeds"].shape[0],
        "MODEL.ISDA.ENC_LAYERS": _count(state, r"\.encoder\.layers\.(\d+)\."),
        "MODEL.ISDA.DEC_LAYERS": _count(state, r"\.decoder\.layers\.(\d+)\."),
        "MODEL.ISDA.DIM_FEEDFORWARD": state[transformer + "encoder.layers.0.ffns.0.layers.0.0.bias"].shape[0],
        "MODEL.MASK_BRANCH.KERNEL.NUM_FCS": kernel_layers - 1,
        "MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE": 8 if branches == 3 else 4 if first_units == 1 else 2,
        "MODEL.MASK_BRANCH.KERNEL.MASK_FEATURE_DIM": coarsest.shape[0],
        "MODEL.MASK_BRANCH.KERNEL.MASK_POSITIONS": coarsest.shape[1] == width + 2,
    }
    if kernel_length == width:  # which of the two other forms a file has, no shape tells
        result["MODEL.MASK_BRANCH.KERNEL.POSITIONS"] = "none"
    return result


def describe(state: State) -> str:
    """What a file of the release holds, in a line."""
    found = settings(state)
    parts = [
        f"R{found['MODEL.RESNETS.DEPTH']}",
        f"width {found['MODEL.ISDA.HIDDEN_DIM']}",
        f"mask features at 1/{found['MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE']}",
        f"{'with' if found['MODEL.MASK_BRANCH.KERNEL.MASK_POSITIONS'] else 'without'} coordinate channels",
        f"kernels {'without' if 'MODEL.MASK_BRANCH.KERNEL.POSITIONS' in found else 'with'} positions",
        f"{state['bbox_head.cls_branches.0.bias'].shape[0]} class rows",
    ]
    return f"ISDA ({', '.join(parts)})"


# ---- Formats ------------------------------------------------------------------------------------------------------


def _release_settings(state: State, options: Options) -> dict[str, Any]:
    found = settings(state)
    if not options.drop_classes:
        found["MODEL.ISDA.NUM_CLASSES"] = state["bbox_head.cls_branches.0.bias"].shape[0]
    return found


def _new_keys_of_start(options: Options) -> str:
    return _NEW_PARTS + (f"|{_CLASS_HEAD}" if options.drop_classes else "")


register_format(
    Format(
        "ISDA",
        (r"^bbox_head\.kernel_branches\.", r"^mask_feat_head\."),
        describe=describe,
        settings=_release_settings,
        convert=lambda state, options: convert(state, drop_classes=options.drop_classes),
        new_keys=new_if_dropped(_CLASS_HEAD),
    )
)
register_format(
    own_format(
        "ISDA",
        (r"^(detector\.)?transformer\.level_embed$", r"^(mask_branch\.)?kernel_embed\."),
        _CLASS_HEAD,
        r"^(mask_features|kernel_embed|mask_branch)\.",
        MOVED,
    )
)
register_format(
    Format(
        "Deformable DETR of mmdetection, as the start of an ISDA",
        (r"^(bbox_head\.transformer\.)?decoder\.layers\.0\..*sampling_offsets\.", r"^bbox_head\.reg_branches\."),
        excluded=(r"^bbox_head\.kernel_branches\.", r"dn_query_generator|denoising"),
        meta_architecture="ISDA",
        convert=lambda state, options: convert_mmdetection_detector(state, drop_classes=options.drop_classes),
        new_keys=_new_keys_of_start,
    )
)
register_format(
    Format(
        "Deformable DETR, as the start of an ISDA",
        (r"^transformer\.level_embed$", r"^class_embed\.0\.bias$", r"^backbone\.0\.body\."),
        excluded=(r"label_enc\.weight$",),
        meta_architecture="ISDA",
        convert=lambda state, options: convert_original_detector(
            state, options.class_ids, drop_classes=options.drop_classes
        ),
        new_keys=_new_keys_of_start,
    )
)
register_format(
    Format(
        "Deformable DETR in QueryMask's own names, as the start of an ISDA",
        (
            r"^(detector\.)?transformer\.level_embed$",
            r"^(detector\.)?bbox_embed\.0\.",
            r"^backbone\.stem\.",
        ),
        meta_architecture="ISDA",
        convert=lambda state, options: convert_original_detector(state, None, drop_classes=options.drop_classes),
        new_keys=_new_keys_of_start,
    )
)
