"""SOLQ's published checkpoints, and those of Deformable DETR, its detector.

The release stores shared modules once for every use: the box heads also below ``transformer.decoder``, the one mask
head for every decoder layer, and without box refinement one class and one box head for every layer. The model has each
once, so the copies are checked and left out. Everything but the backbone, the basis of the PCA coding and the mask
branch of the SQR baseline keeps its name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint import (
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
    drop_mask_branch,
    new_if_dropped,
    own_format,
    resnet_rules,
    resnet_settings,
    swin_rules,
    swin_settings,
    without_masks,
)

_BODY = "backbone.0.body."
_MASK_BRANCH = r"^(vector_embed|processor_pca|bbox_attention|mask_head|seg_input_proj)\."
_CLASS_HEAD = r"^(detector\.)?class_embed\."
MOVED = (
    (r"^(transformer|input_proj|query_embed|class_embed|bbox_embed)\.", r"detector.\1."),
    (r"^(vector_embed|coding)\.", r"mask_branch.\1."),
)
"""Names without parts, as the rules below and older checkpoints have them, and those in the model."""
# The release's names of the SQR baseline's mask branch, which count from 1
_SQR_RULES: list[Rule] = [
    Rename(r"^bbox_attention\.q_linear\.", "mask_branch.attention.query."),
    Rename(r"^bbox_attention\.k_linear\.", "mask_branch.attention.key."),
    Rename(r"^seg_input_proj\.", "mask_branch.skips."),
    Rename(r"^mask_head\.lay(\d)\.", lambda match: f"mask_branch.head.blocks.{int(match[1]) - 1}.0."),
    Rename(r"^mask_head\.gn(\d)\.", lambda match: f"mask_branch.head.blocks.{int(match[1]) - 1}.1."),
    Rename(r"^mask_head\.adapter(\d)\.", lambda match: f"mask_branch.head.adapters.{int(match[1]) - 1}."),
    Rename(r"^mask_head\.out_lay\.", "mask_branch.head.output."),
]


def convert(
    state: Mapping[str, Tensor | np.ndarray],
    class_ids: Sequence[int] | None,
    *,
    drop_classes: bool = False,
    detector_only: bool = False,
) -> tuple[State, Report]:
    """Turn a state dict of SOLQ's or Deformable DETR's release into one for ``querymask.solq.SOLQ``.

    Args:
        state: the release's tensors by key.
        class_ids: rows of the class head to keep, in the order of the model's classes. Published heads have 91 rows,
            one for each raw COCO category id. None keeps all rows.
        drop_classes: leave the class head out, for training on another data set.
        detector_only: leave the mask branch out: what remains is a Deformable DETR (``MODEL.MASK_BRANCH.NAME none``).

    Returns:
        the model's state dict, and the report of what was used, renamed and dropped.

    Raises:
        CheckpointError: copies that differ, or class ids beyond the head.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    rules: list[Rule] = [
        Drop(r"(^|\.)total_(params|ops)$", "left over by a profiler"),
        Drop(r"\.num_batches_tracked$", "counter of a batch norm, not used by a frozen one"),
        Rename(r"^detr\.", ""),
        Copy(r"^transformer\.decoder\.((class|bbox)_embed\..*)", r"\1"),
        Copy(r"^vector_embed\.[1-9]\d*\.(.*)", r"vector_embed.0.\1"),
        Rename(r"^vector_embed\.0\.", "vector_embed."),
    ]
    if not _has_refinement(state):
        rules.append(Copy(r"^(class|bbox)_embed\.[1-9]\d*\.(.*)", r"\1_embed.0.\2"))
    if detector_only:
        rules.append(drop_mask_branch(_MASK_BRANCH))
    rules += [Rename(r"^processor_pca\.", "coding."), *_SQR_RULES]
    if drop_classes:
        rules.append(drop_class_head(_CLASS_HEAD))
    elif class_ids is not None:
        rows = _detector(state)["class_embed.0.bias"].shape[0]
        rules.append(pick_classes(r"^class_embed\.\d+\.(weight|bias)$", rows, class_ids))
    if _is_swin(state):
        rules += [Rename(r"^backbone\.0\.body\.", "backbone."), *swin_rules("backbone.")]
    else:
        rules += resnet_rules(r"^backbone\.0\.body\.", "backbone.")
    return apply_rules(state, [*rules, *(Rename(*names) for names in MOVED)])


# ---- What a file holds --------------------------------------------------------------------------------------------


def _detector(state: State) -> State:
    """The state without the prefix ``detr.`` that the SQR baseline puts before its detector."""
    return {key.removeprefix("detr."): value for key, value in state.items()}


def _is_sqr(state: State) -> bool:
    return "detr.transformer.level_embed" in state


def _is_pca(state: State) -> bool:
    return any(key.startswith("processor_pca.") for key in state)


def _is_swin(state: State) -> bool:
    return _BODY + "patch_embed.proj.weight" in _detector(state)


def _has_refinement(state: State) -> bool:
    """Box refinement gives the decoder the box heads."""
    return "transformer.decoder.bbox_embed.0.layers.0.weight" in _detector(state)


def settings(state: State) -> dict[str, Any]:
    """The config keys that a file of the release demands, with their values, read off its shapes."""
    sqr, pca = _is_sqr(state), _is_pca(state)
    vectors = "vector_embed.0.layers.0.weight" in state
    state = _detector(state)
    levels, width = state["transformer.level_embed"].shape

    def layers(part: str) -> int:
        pattern = rf"transformer\.{part}\.layers\.(\d+)\."
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    result: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": "SOLQ",
        "MODEL.BACKBONE.NAME": "build_swin_backbone" if _is_swin(state) else "build_resnet_backbone",
        **(swin_settings(state, _BODY) if _is_swin(state) else resnet_settings(state, _BODY)),
        "MODEL.SOLQ.HIDDEN_DIM": width,
        "MODEL.SOLQ.NUM_FEATURE_LEVELS": levels,
        "MODEL.SOLQ.ENC_LAYERS": layers("encoder"),
        "MODEL.SOLQ.DEC_LAYERS": layers("decoder"),
        "MODEL.SOLQ.DIM_FEEDFORWARD": state["transformer.encoder.layers.0.linear1.bias"].shape[0],
        "MODEL.SOLQ.BOX_REFINE": _has_refinement(state),
        "MODEL.SOLQ.TWO_STAGE": "transformer.enc_output.weight" in state,
        "MODEL.MASK_BRANCH.NAME": "SQRBranch" if sqr else "VectorBranch" if vectors else "none",
    }
    if "query_embed.weight" in state:
        result["MODEL.SOLQ.NUM_QUERIES"] = state["query_embed.weight"].shape[0]
    if vectors:
        result["MODEL.MASK_CODING.NAME"] = "pca" if pca else "dct"
        if pca:
            result["MODEL.MASK_CODING.SIZE"] = round(state["processor_pca.means"].shape[0] ** 0.5)
        result["MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD"] = True
        result["MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM"] = state["vector_embed.0.layers.0.bias"].shape[0]
        result["MODEL.MASK_CODING.LENGTH"] = state["vector_embed.0.layers.2.bias"].shape[0]
    return result


def describe(state: State) -> str:
    """What a file of the release holds, in a line."""
    detector, found = _detector(state), settings(state)
    levels = found["MODEL.SOLQ.NUM_FEATURE_LEVELS"]
    if _is_sqr(state):
        name = "the SQR baseline of SOLQ"
    elif _is_pca(state):
        name = "SOLQ with PCA mask coding"
    else:
        name = "Deformable DETR" if found["MODEL.MASK_BRANCH.NAME"] == "none" else "SOLQ"
    parts = [
        f"Swin of width {found['MODEL.SWIN.EMBED_DIM']}" if _is_swin(state) else f"R{found['MODEL.RESNETS.DEPTH']}",
        f"width {found['MODEL.SOLQ.HIDDEN_DIM']}",
        f"{levels} level{'s' if levels > 1 else ''}",
        f"{'with' if found['MODEL.SOLQ.BOX_REFINE'] else 'without'} box refinement",
        "two-stage" if found["MODEL.SOLQ.TWO_STAGE"] else "one-stage",
        f"{detector['class_embed.0.bias'].shape[0]} class rows",
    ]
    if "MODEL.MASK_CODING.LENGTH" in found:
        parts.append(f"mask vectors of {found['MODEL.MASK_CODING.LENGTH']}")
    return f"{name} ({', '.join(parts)})"


# ---- Formats ------------------------------------------------------------------------------------------------------


def _convert_release(state: State, options: Options) -> tuple[State, Report]:
    return convert(state, options.class_ids, drop_classes=options.drop_classes, detector_only=options.detector_only)


def _release_settings(state: State, options: Options) -> dict[str, Any]:
    found = settings(state)
    if options.detector_only:
        found = without_masks(found)
    if not options.drop_classes:
        rows = _detector(state)["class_embed.0.bias"].shape[0]
        found["MODEL.SOLQ.NUM_CLASSES"] = rows if options.class_ids is None else len(options.class_ids)
    return found


register_format(
    Format(
        "SOLQ or Deformable DETR",
        (r"^(detr\.)?transformer\.level_embed$", r"^(detr\.)?class_embed\.0\.bias$", r"^(detr\.)?backbone\.0\.body\."),
        excluded=(r"label_enc\.weight$",),
        describe=describe,
        settings=_release_settings,
        convert=_convert_release,
        new_keys=new_if_dropped(_CLASS_HEAD),
    )
)
register_format(
    own_format(
        "SOLQ or Deformable DETR",
        (
            r"^(detector\.)?transformer\.level_embed$",
            r"^(detector\.)?bbox_embed\.0\.",
            r"^backbone\.(stem|patch_embed)\.",
        ),
        _CLASS_HEAD,
        r"^(vector_embed|coding|mask_branch)\.",
        MOVED,
    )
)
