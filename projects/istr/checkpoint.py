"""ISTR's published checkpoints, of the paper's release and of the second one.

The models are the same but for names: stages, mask heads and mask codings have folders of their own here.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint import (
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
    swin_rules,
    swin_settings,
    without_masks,
)

_BODY = "backbone.bottom_up."
_FIRST = "head.head_series.0."
_CLASS_HEAD = r"^(detector\.)?stages\.\d+\.class_logits\."
MOVED = (
    (r"^stages\.(\d+)\.mask_head\.", r"mask_branch.heads.\1."),
    (r"^(stages|pos_embeddings|init_proposal_boxes)\.", r"detector.\1."),
    (r"^coding\.", "mask_branch.coding."),
)
"""Names without parts, as the rules below and older checkpoints have them, and those in the model."""
_MASK_BRANCH = r"^(stages\.\d+\.mask_head|coding|mask_branch)\."
# Blocks of res4 -> depth
_DEPTHS = {6: 50, 23: 101, 36: 152}


def convert(
    state: Mapping[str, Tensor | np.ndarray],
    class_ids: object = None,
    *,
    drop_classes: bool = False,
    detector_only: bool = False,
) -> tuple[State, Report]:
    """Turn a state dict of one of ISTR's releases into one for ``querymask.istr.ISTR``.

    Args:
        state: the release's tensors by key.
        class_ids: not used: published heads have one row for each of COCO's 80 classes, in the model's order.
        drop_classes: leave the class heads out, for training on another data set.
        detector_only: leave the mask branch out (``MODEL.MASK_BRANCH.NAME none``).

    Returns:
        the model's state dict, and the report of what was used, renamed and dropped.
    """
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    rules: list[Rule] = [
        Rename(r"^head\.head_series\.", "stages."),
        Rename(r"^(stages\.\d+)\.(mask_module|mask_logits|ret_roi_layer_\d)\.", r"\1.mask_head.\2."),
        Rename(r"(\.ret_roi_layer_\d)\.conv\.", r"\1."),
        Rename(r"^mask_encoding\.", "coding."),
        Rename(r"^mask_E\.encoder\.", "coding.encoder."),
        Rename(r"^mask_D\.decoder\.", "coding.decoder."),
        Rename(r"^(coding\.decoder\.\d)\.up\.", r"\1."),
        *swin_rules(_BODY),
    ]
    if detector_only:
        rules.append(drop_mask_branch(_MASK_BRANCH))
    if drop_classes:
        rules.append(drop_class_head(_CLASS_HEAD))
    return apply_rules(state, [*rules, *(Rename(*names) for names in MOVED)])


# ---- What a file holds --------------------------------------------------------------------------------------------


def settings(state: State) -> dict[str, Any]:
    """The config keys that a file of a release demands, with their values, read off its shapes."""

    def count(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    hidden, width = state[_FIRST + "linear1.weight"].shape
    pool_area = state[_FIRST + "inst_interact.out_layer.weight"].shape[1] // width
    result: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": "ISTR",
        "MODEL.ISTR.NUM_QUERIES": state["init_proposal_boxes.weight"].shape[0],
        "MODEL.ISTR.HIDDEN_DIM": width,
        "MODEL.FPN.OUT_CHANNELS": state["backbone.fpn_output2.weight"].shape[0],
        "MODEL.ISTR.NUM_STAGES": count(r"head\.head_series\.(\d+)\."),
        "MODEL.ISTR.DIM_FEEDFORWARD": hidden,
        "MODEL.ISTR.DYNAMIC_LAYERS": 2,
        "MODEL.ISTR.DIM_DYNAMIC": state[_FIRST + "inst_interact.norm1.weight"].shape[0],
        "MODEL.ISTR.POOL_SIZE": round(pool_area**0.5),
        "MODEL.ISTR.USE_POSITION": "pos_embeddings.weight" in state,
    }
    if _BODY + "patch_embed.proj.weight" in state:
        result["MODEL.BACKBONE.NAME"] = "build_swin_fpn_backbone"
        result.update(swin_settings(state, _BODY))
    else:
        result["MODEL.BACKBONE.NAME"] = "build_resnet_fpn_backbone"
        result["MODEL.RESNETS.DEPTH"] = _DEPTHS.get(count(r"backbone\.bottom_up\.res4\.(\d+)\."))
        result["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    return {**result, **_mask_settings(state)}


def _mask_settings(state: State) -> dict[str, Any]:
    """Those of the mask branch."""
    if _FIRST + "mask_logits.weight" in state:
        length, head, scored = state[_FIRST + "mask_logits.weight"].shape[0], "vector", -1
    else:
        last = state[_FIRST + "mask_module.6.weight"]
        length, head, scored = last.shape[0], "convolution", 2
    result = {
        "MODEL.MASK_BRANCH.NAME": "CodeBranch",
        "MODEL.MASK_BRANCH.CODE.HEAD": head,
        "MODEL.MASK_CODING.LENGTH": length,
        "MODEL.ISTR.FIRST_SCORED_STAGE": scored,
    }
    if head == "convolution":
        result["MODEL.MASK_BRANCH.CODE.POOL_SIZE"] = 4 * last.shape[-1]
    if "mask_encoding.means" in state:
        result["MODEL.MASK_CODING.NAME"] = "pca"
        result["MODEL.MASK_CODING.SIZE"] = round(state["mask_encoding.means"].shape[0] ** 0.5)
    elif "mask_E.encoder.0.weight" in state:
        result["MODEL.MASK_CODING.NAME"] = "autoencoder"
        result["MODEL.MASK_CODING.SIZE"] = 16 * state["mask_E.encoder.12.weight"].shape[-1]
    else:
        result["MODEL.MASK_CODING.NAME"] = "dct"
    return result


def describe(state: State) -> str:
    """What a file of a release holds, in a line."""
    found = settings(state)
    release = "ISTR" if found["MODEL.MASK_BRANCH.CODE.HEAD"] == "vector" else "ISTR's second release"
    swin = found.get("MODEL.SWIN.EMBED_DIM")
    parts = [
        f"Swin of width {swin}" if swin else f"R{found['MODEL.RESNETS.DEPTH']}",
        f"{found['MODEL.ISTR.NUM_STAGES']} stages",
        f"{found['MODEL.ISTR.NUM_QUERIES']} queries",
        f"{state[_FIRST + 'class_logits.bias'].shape[0]} classes",
        f"{found['MODEL.MASK_CODING.NAME']} mask vectors of {found['MODEL.MASK_CODING.LENGTH']}",
    ]
    return f"{release} ({', '.join(parts)})"


# ---- Formats ------------------------------------------------------------------------------------------------------


def _convert_release(state: State, options: Options) -> tuple[State, Report]:
    return convert(state, drop_classes=options.drop_classes, detector_only=options.detector_only)


def _release_settings(state: State, options: Options) -> dict[str, Any]:
    found = settings(state)
    if options.detector_only:
        found = without_masks(found)
    if not options.drop_classes:
        found["MODEL.ISTR.NUM_CLASSES"] = state[_FIRST + "class_logits.bias"].shape[0]
    return found


for _format in (
    Format(
        "ISTR",
        (r"^head\.head_series\.0\.mask_logits\.", r"^mask_encoding\."),
        describe=describe,
        settings=_release_settings,
        convert=_convert_release,
        new_keys=new_if_dropped(_CLASS_HEAD),
    ),
    Format(
        "ISTR v2",
        (r"^head\.head_series\.0\.mask_module\.",),
        excluded=(r"^head\.head_series\.0\.mask_logits\.",),
        describe=describe,
        settings=_release_settings,
        convert=_convert_release,
        new_keys=new_if_dropped(_CLASS_HEAD),
    ),
    own_format(
        "ISTR",
        (r"^(detector\.)?stages\.0\.inst_interact\.", r"^(detector\.)?init_proposal_boxes\."),
        _CLASS_HEAD,
        _MASK_BRANCH,
        MOVED,
    ),
):
    register_format(_format)
