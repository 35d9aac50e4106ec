"""Refuse settings that a run would not read: what a config asks for happens, or the run says what serves instead."""

import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from querymask.common.compat import detectron2_cfg
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY
from querymask.common.meta_arch import mask_branch_name
from querymask.config import get_cfg

logger = logging.getLogger(__name__)

METHODS = ("SOLQ", "ISDA", "ISTR", "EffSeg")
"""Meta-architectures of the project."""

OTHERS_READ = ("MODEL", "INPUT.MASK_FORMAT", "VIS_PERIOD")
"""What models of Detectron2 and of others may read beside READ."""

READ = (
    "VERSION",
    "MODEL.DEVICE",
    "MODEL.META_ARCHITECTURE",
    "MODEL.WEIGHTS",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.BACKBONE",
    "MODEL.FPN",
    "MODEL.RESNETS",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.RANDOM_FLIP",
    "INPUT.FORMAT",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.ASPECT_RATIO_GROUPING",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "SOLVER",
    "TEST.EXPECTED_RESULTS",
    "TEST.EVAL_PERIOD",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.PRECISE_BN",
    "OUTPUT_DIR",
    "SEED",
    "CUDNN_BENCHMARK",
)
"""Keys and sections of Detectron2 that a run of the project's models reads, always or under a condition (below)."""

INSTEAD = {
    "MODEL.LOAD_PROPOSALS": "queries take the place of proposals",
    "MODEL.MASK_ON": "use MODEL.MASK_BRANCH.NAME, which is none for boxes only",
    "MODEL.KEYPOINT_ON": "there are no keypoints in this project",
    "MODEL.PROPOSAL_GENERATOR": "queries take the place of proposals; their number is MODEL.{section}.NUM_QUERIES",
    "MODEL.ANCHOR_GENERATOR": "{anchors}",
    "MODEL.RPN": "queries take the place of proposals; their number is MODEL.{section}.NUM_QUERIES",
    "MODEL.ROI_HEADS": "the keys of the heads are in MODEL.{section}",
    "MODEL.ROI_HEADS.NUM_CLASSES": "use MODEL.{section}.NUM_CLASSES",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "results are the TEST.DETECTIONS_PER_IMAGE best detections with their scores; "
    "VIS_SCORE_THRESHOLD and --confidence-threshold of demo.py limit what is drawn",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "{suppression}",
    "MODEL.ROI_BOX_HEAD": "the keys of the heads are in MODEL.{section}",
    "MODEL.ROI_BOX_CASCADE_HEAD": "the keys of the heads are in MODEL.{section}",
    "MODEL.ROI_MASK_HEAD": "the keys of mask branches are in MODEL.MASK_BRANCH",
    "MODEL.POINT_HEAD": "use MODEL.MASK_BRANCH.NAME PointRendBranch, whose keys are in MODEL.MASK_BRANCH.POINTREND",
    "MODEL.ROI_KEYPOINT_HEAD": "there are no keypoints in this project",
    "MODEL.SEM_SEG_HEAD": "stuff is found like things, with MODEL.PANOPTIC.ENABLED",
    "MODEL.PANOPTIC_FPN": "use MODEL.PANOPTIC",
    "MODEL.RETINANET": "the keys of the heads are in MODEL.{section}",
    "MODEL.RETINANET.NUM_CLASSES": "use MODEL.{section}.NUM_CLASSES",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "results are the TEST.DETECTIONS_PER_IMAGE best detections with their scores",
    "MODEL.RETINANET.NMS_THRESH_TEST": "{suppression}",
    "INPUT.CROP": "use INPUT.DETR_CROP or INPUT.LSJ",
    "INPUT.MASK_FORMAT": "polygons, run lengths and bitmaps are all read, without being asked",
    "DATASETS.PROPOSAL_FILES_TRAIN": "queries take the place of proposals",
    "DATASETS.PROPOSAL_FILES_TEST": "queries take the place of proposals",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": "queries take the place of proposals",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": "queries take the place of proposals",
    "DATALOADER.RANDOM_SUBSET_RATIO": "register a smaller data set",
    "TEST.AUG": "there is no test-time augmentation; INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST are the size of test images",
    "TEST.KEYPOINT_OKS_SIGMAS": "there are no keypoints in this project",
    "VIS_PERIOD": "VIS_NUM_IMAGES is the number of images drawn after the final evaluation",
    "FLOAT32_PRECISION": "use FLOAT32_MATMUL_PRECISION",
}
"""What serves instead of a key, or of those of a section, that is not read; the longest one counts."""

WORDS = {
    "SOLQ": {
        "anchors": "reference points take the place of anchors",
        "suppression": "nothing is suppressed: every object has one query",
    },
    "ISDA": {
        "anchors": "reference points take the place of anchors",
        "suppression": "nothing is suppressed: every object has one query",
    },
    "ISTR": {
        "anchors": "queries take the place of anchors",
        "suppression": "nothing is suppressed: every object has one query",
    },
    "EffSeg": {
        "anchors": "anchors follow from MODEL.EFFSEG.LEVELS",
        "suppression": "use MODEL.EFFSEG.NMS_THRESHOLD",
    },
}
"""Words of INSTEAD that depend on the method."""

PANOPTIC_UNUSED = (
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.MASK_BRANCH.CODE.PASTE_THRESHOLD",
    "MODEL.MASK_BRANCH.KERNEL.MASKNESS",
    "MODEL.MASK_BRANCH.KERNEL.MASKNESS_THRESHOLD",
    "MODEL.MASK_BRANCH.KERNEL.MASK_THRESHOLD",
    "MODEL.MASK_BRANCH.REGION.EXPORT",
)
"""What makes instances of queries, and no segments."""

BASIC_RESNET = ("DEPTH", "NORM", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "OUT_FEATURES")


def check_unused_keys(cfg: CfgNode) -> None:
    """Refuse a config that changes keys which the run does not read; warn of keys that another one switches off.

    Keys that only another choice makes useless, and that base files set for it (the steps of a schedule, the details of
    what is not enabled), are named in one warning. Keys that are no part of ``querymask.get_cfg()`` are let alone.

    Raises:
        ValueError: with every such key, its value, and what serves instead.
    """
    defaults = dict(leaves(get_cfg()))
    changed = {key: value for key, value in leaves(cfg) if key in defaults and not _same(value, defaults[key])}
    refused = dict(_never_read(cfg, changed))
    switched_off = {}
    for prefix, reason, is_error in _conditions(cfg):
        for key, value in changed.items():
            if _within(key, prefix) and not (isinstance(value, (list, tuple)) and not value):
                (refused if is_error else switched_off).setdefault(key, reason)
    if switched_off:
        lines = [f"{key} ({reason})" for key, reason in switched_off.items() if key not in refused]
        logger.warning(f"settings without effect in this run: {', '.join(lines)}")
    if refused:
        shown = "\n".join(f"  {key} {changed[key]!r}: {reason}" for key, reason in refused.items())
        raise ValueError(
            f"the config changes keys that a run of {cfg.MODEL.META_ARCHITECTURE} does not read. Take them out of the "
            f"config file or the command line, or set what serves instead:\n{shown}"
        )


def _never_read(cfg: CfgNode, changed: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what serves instead) of Detectron2's keys and other methods' that no run of this model reads."""
    name = cfg.MODEL.META_ARCHITECTURE
    detectron2_keys = dict(leaves(detectron2_cfg()))
    for key in changed:
        if name not in METHODS and any(_within(key, read) for read in OTHERS_READ):
            continue
        if key in detectron2_keys and not any(_within(key, read) for read in READ):
            sections = [section for section in INSTEAD if _within(key, section)]
            instead = INSTEAD[max(sections, key=len)] if sections else "nothing in this project reads it"
            yield key, instead.format(section=name.upper(), **WORDS.get(name, {}))
        for other in METHODS:
            if other != name and _within(key, f"MODEL.{other.upper()}"):
                own = key.replace(other.upper(), name.upper(), 1)
                use = f"use {own}, or " if own.rpartition(".")[2] in cfg.MODEL[name.upper()] else ""
                yield key, f"{use}set MODEL.META_ARCHITECTURE {other}"


def _conditions(cfg: CfgNode) -> Iterator[tuple[str, str, bool]]:
    """(key or section, why it has no effect, whether to set it is an error) under the other settings."""
    if cfg.MODEL.META_ARCHITECTURE in METHODS:
        yield from _backbone_conditions(cfg)
        yield from _mask_conditions(cfg)
    solver, inputs = cfg.SOLVER, cfg.INPUT
    if solver.OPTIMIZER == "ADAMW":
        for key in ("MOMENTUM", "NESTEROV"):
            yield f"SOLVER.{key}", "only SOLVER.OPTIMIZER SGD reads it", True
    schedule = solver.LR_SCHEDULER_NAME
    chosen = f"SOLVER.LR_SCHEDULER_NAME is {schedule}"
    if schedule == "WarmupCosineLR":
        yield "SOLVER.GAMMA", f"only WarmupMultiStepLR reads it. {chosen}", True
        yield "SOLVER.STEPS", chosen, False
    else:
        yield "SOLVER.BASE_LR_END", f"only WarmupCosineLR reads it. {chosen}", True
    if schedule != "WarmupStepWithFixedGammaLR":
        yield "SOLVER.NUM_DECAYS", f"only WarmupStepWithFixedGammaLR reads it. {chosen}", True
    if not solver.WARMUP_ITERS:
        for key in ("WARMUP_FACTOR", "WARMUP_METHOD"):
            yield f"SOLVER.{key}", "SOLVER.WARMUP_ITERS is 0", False
    if not solver.CLIP_GRADIENTS.ENABLED:
        yield "SOLVER.CLIP_GRADIENTS", "SOLVER.CLIP_GRADIENTS.ENABLED is False", False
    elif solver.CLIP_GRADIENTS.CLIP_TYPE == "value":
        yield "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE value clips no norm", True
    if not solver.AMP.ENABLED:
        yield "SOLVER.AMP", "SOLVER.AMP.ENABLED is False", False
    if cfg.DATALOADER.SAMPLER_TRAIN != "RepeatFactorTrainingSampler":
        reason = "only DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler reads it"
        yield "DATALOADER.REPEAT_THRESHOLD", reason, True
    if not cfg.TEST.PRECISE_BN.ENABLED:
        yield "TEST.PRECISE_BN.NUM_ITER", "set TEST.PRECISE_BN.ENABLED True", True
    if cfg.MODEL.META_ARCHITECTURE not in METHODS:
        yield "TEST.CUDA_GRAPHS", "only SOLQ, ISDA and ISTR read it", True
    elif not cfg.TEST.CUDA_GRAPHS.ENABLED:
        yield "TEST.CUDA_GRAPHS", "TEST.CUDA_GRAPHS.ENABLED is False", False
    if cfg.MODEL.META_ARCHITECTURE not in METHODS:
        for key in ("PANOPTIC", "SIZE_DIVISIBILITY", "USE_CHECKPOINT", "MASK_BRANCH", "MASK_CODING"):
            is_error = not key.startswith("MASK_")  # which a base file of a method may have set
            yield f"MODEL.{key}", f"only {', '.join(METHODS)} read it", is_error
    elif not cfg.MODEL.PANOPTIC.ENABLED:
        yield "MODEL.PANOPTIC", "MODEL.PANOPTIC.ENABLED is False", False
    else:
        for key in PANOPTIC_UNUSED:
            yield key, "MODEL.PANOPTIC.ENABLED is True, whose thresholds count", False
    if inputs.LSJ.ENABLED:
        for key in ("MIN_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING", "MAX_SIZE_TRAIN"):
            yield f"INPUT.{key}", "INPUT.LSJ.ENABLED is True", False
    else:
        yield "INPUT.LSJ", "INPUT.LSJ.ENABLED is False", False
    if not inputs.DETR_CROP.ENABLED:
        yield "INPUT.DETR_CROP", "INPUT.DETR_CROP.ENABLED is False", False
    elif inputs.DETR_CROP.RELATIVE_SIZE:
        yield "INPUT.DETR_CROP.CROP_RANGE", "INPUT.DETR_CROP.RELATIVE_SIZE is given", False


def _backbone_conditions(cfg: CfgNode) -> Iterator[tuple[str, str, bool]]:
    """As ``_conditions``, for the backbones of Detectron2 and of the project; those of others may read every key."""
    name = cfg.MODEL.BACKBONE.NAME
    is_swin, is_basic, is_timm = (name.startswith(f"build_{kind}_") for kind in ("swin", "basic_resnet", "timm"))
    if not (is_swin or is_basic or is_timm or name in ("build_resnet_backbone", "build_resnet_fpn_backbone")):
        return
    chosen = f"MODEL.BACKBONE.NAME is {name}"
    if "_fpn_" not in name:
        yield "MODEL.FPN", f"only backbones with _fpn_ in their name read it. {chosen}", True
    section = "MODEL.SWIN" if is_swin else "MODEL.TIMM" if is_timm else "MODEL.RESNETS"
    for other in ("MODEL.SWIN", "MODEL.TIMM"):
        if other != section:
            yield other, f"{chosen}. Its keys are in {section}", True
    for key in cfg.MODEL.RESNETS:
        # Base files set these two for the other ResNets
        if key not in ("STRIDE_IN_1X1", "OUT_FEATURES") and (
            is_swin or is_timm or (is_basic and key not in BASIC_RESNET)
        ):
            serves = f"It reads {', '.join(BASIC_RESNET)}" if is_basic else f"Its keys are in {section}"
            yield f"MODEL.RESNETS.{key}", f"{chosen}. {serves}", not is_timm


def _mask_conditions(cfg: CfgNode) -> Iterator[tuple[str, str, bool]]:
    """As ``_conditions``, for the sections of mask branches; base files set those that the method's own one reads."""
    name, branches = mask_branch_name(cfg), dict(MASK_BRANCH_REGISTRY)
    read = branches[name].sections if name in branches else ()
    own = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).own_mask_branch.sections
    for section in sorted({section for branch in branches.values() for section in branch.sections} - set(read)):
        readers = " or ".join(sorted(key for key, branch in branches.items() if section in branch.sections))
        yield f"MODEL.{section}", f"only MODEL.MASK_BRANCH.NAME {readers} reads it", section not in own


def _within(key: str, section: str) -> bool:
    """Whether a dotted key is this one or belongs to this section."""
    return key == section or key.startswith(f"{section}.")


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are the same; YAML and Python differ in lists and tuples."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def leaves(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) that is not a section."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
