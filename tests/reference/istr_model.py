"""What the tests against ISTR's official implementations share: settings, weights, targets, comparison of masks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import fixture, load_document, load_manifest
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_models import find_key, set_keys

import querymask

# Official name -> project's name of a loss
LOSSES = {
    "loss_ce": "loss_ce",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_feat": "loss_vector",
    "loss_dice": "loss_dice",
}
CODINGS = {"PCA": "pca", "DCT": "dct", "AE": "autoencoder", "SMT": "autoencoder", "SMT (autoencoder)": "autoencoder"}
# Setting -> config key, for settings whose values are the project's too
SETTINGS = {
    "num_proposals": "NUM_QUERIES",
    "num_queries": "NUM_QUERIES",
    "num_stages": "NUM_STAGES",
    "embedding_dim": "CODING_LENGTH",
    "mask_size": "CODING_SIZE",
    "num_classes": "NUM_CLASSES",
    "use_image_feature": "USE_IMAGE_FEATURE",
    "image_feature": "USE_IMAGE_FEATURE",
    "deep_supervision": "DEEP_SUPERVISION",
}
# Names that the two switches of table 1e may have: pooling of the image feature, and the position embedding
POOLING_NAME = r"(image_|feature_|image_feature_|query_|spatial_)?pool(ing)?(_type)?"
POSITION_NAME = r"(use_|with_)?pos(ition)?(al)?(_embed(ding)?s?)?"
POOLING = {"max": "max", "maximum": "max", "avg": "mean", "average": "mean", "mean": "mean"}
V2 = {
    "CODE_HEAD": "convolution",
    "CODE_TARGET": "predicted",
    "FIRST_SCORED_STAGE": 2,
    "CODE_LOSS": "smooth_l1",
    "CODE_WEIGHT": 1.0,
    "CODE_DICE_WEIGHT": 5.0,
    "CODE_COST_WEIGHT": 1.0,
    "CODE_PASTE_THRESHOLD": 0.45,
}


@contextmanager
def double_precision() -> Iterator[None]:
    """New modules and tensors are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bits packed by row -> bool array."""
    return np.unpackbits(bits.reshape(shape[0], -1), axis=1)[:, : int(np.prod(shape[1:]))].reshape(shape).astype(bool)


def _initial_boxes(w: np.ndarray) -> np.ndarray:
    t = np.tanh(2 * w)
    return np.concatenate((0.5 + 0.25 * t[:, :2], 0.45 + 0.35 * t[:, 2:]), axis=1)


def _large_first(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[0] = 45
    return w


# The overrides of cases.json, by their wording there: pattern of the keys and what becomes of the weights
_DCT = "(DCT configurations only)"
_OVERRIDES = {
    "init_proposal_boxes.weight": (r"^init_proposal_boxes\.weight$", _initial_boxes, False),
    "mask_encoding.explained_variances": (
        r"^mask_encoding\.explained_variances$",
        lambda w: 1600 / (1 + np.arange(len(w))),
        False,
    ),
    "mask_encoding.means": (r"^mask_encoding\.means$", lambda w: 40 * w, False),
    "head.head_series.*.bboxes_delta.weight": (
        r"^head\.head_series\.\d+\.bboxes_delta\.weight$",
        lambda w: 0.25 * w,
        False,
    ),
    f"head.head_series.*.mask_module.6.weight {_DCT}": (
        r"^head\.head_series\.\d+\.mask_module\.6\.weight$",
        lambda w: 8 * w,
        True,
    ),
    f"head.head_series.*.mask_module.6.bias {_DCT}": (
        r"^head\.head_series\.\d+\.mask_module\.6\.bias$",
        _large_first,
        True,
    ),
}


def official_value(key: str, shape: Sequence[int], dct: bool = False) -> torch.Tensor:
    """The value of one entry of the official state dict; an override that is not known is an error."""
    unknown = set(load_document("istr")["overrides"]) - set(_OVERRIDES)
    assert not unknown, f"the cases override weights in a way that is not known here: {sorted(unknown)}"
    value = np.asarray(fixture().weight(key, shape))
    for name in load_document("istr")["overrides"]:
        pattern, change, only_dct = _OVERRIDES[name]
        if re.search(pattern, key) and (dct or not only_dct):
            value = change(value)
    return torch.from_numpy(np.ascontiguousarray(value))


def configure(settings: Mapping[str, Any]) -> CfgNode:
    """The project's config for the official settings; a setting without counterpart fails by name."""
    cfg = querymask.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ISTR"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    set_keys(cfg, {"CODING_NAME": "pca", "CODING_SIZE": 28, "CODING_LENGTH": 60})
    cfg.MODEL.MASK_CODING.LABEL_NOISE = False  # u = 0.5
    for name, value in settings.items():
        if name == "release":
            assert value in ("paper", "v2"), f"unknown release {value}"
            if value == "v2":
                set_keys(cfg, V2)
            cfg.MODEL.BACKBONE.FREEZE_AT = 2 if value == "paper" else 0
        elif name == "backbone_depth":
            cfg.MODEL.RESNETS.DEPTH = value
        elif name == "mask_encoding":
            assert value in CODINGS, f"unknown mask encoding {value}"
            cfg.MODEL.MASK_CODING.NAME = CODINGS[value]
        elif re.fullmatch(POOLING_NAME, name):
            assert value in POOLING, f"unknown pooling {value}"
            cfg.MODEL.ISTR.QUERY_POOLING = POOLING[value]
        elif name in SETTINGS or re.fullmatch(POSITION_NAME, name):
            node, key = find_key(cfg, SETTINGS.get(name, "USE_POSITION"))
            assert isinstance(value, type(node[key])), f"{name} = {value!r}"
            node[key] = value
        else:
            pytest.fail(f"the case has a setting that the project does not know: {name} = {value}")
    return cfg


def official_shapes(cfg: CfgNode) -> dict[str, list[int]]:
    """Keys and shapes of the official checkpoint for a config: a stored one, with what depends on the sizes adapted."""
    istr, coding = cfg.MODEL.ISTR, cfg.MODEL.MASK_CODING
    if cfg.MODEL.MASK_BRANCH.CODE.HEAD == "vector":
        name = {50: "checkpoint.json", 101: "checkpoint_r101.json"}[cfg.MODEL.RESNETS.DEPTH]
    else:
        assert cfg.MODEL.RESNETS.DEPTH == 50, "no checkpoint of that depth is stored"
        kind = {"pca": "pca", "dct": "dct", "autoencoder": "smt"}[coding.NAME]
        name = f"checkpoint_v2_{kind}_r50.json"
    shapes = dict(load_manifest("istr", name))
    for key, shape in list(shapes.items()):
        parts = key.split(".")
        if key == "pos_embeddings.weight" and not istr.USE_POSITION:
            del shapes[key]
        elif key.startswith("head.head_series.") and int(parts[2]) >= istr.NUM_STAGES:
            del shapes[key]
        elif key in ("pos_embeddings.weight", "init_proposal_boxes.weight"):
            shapes[key] = [istr.NUM_QUERIES, *shape[1:]]
        elif "class_logits" in parts:
            shapes[key] = [istr.NUM_CLASSES, *shape[1:]]
        elif "mask_logits" in parts or key == "mask_encoding.explained_variances":
            shapes[key] = [coding.LENGTH, *shape[1:]]
        elif key == "mask_encoding.components":
            shapes[key] = [coding.LENGTH, coding.SIZE**2]
    missing = {f"head.head_series.{stage}" for stage in range(istr.NUM_STAGES)} - {
        ".".join(key.split(".")[:3]) for key in shapes
    }
    for prefix in missing:
        for key, shape in list(shapes.items()):
            if key.startswith("head.head_series.0."):
                shapes[key.replace("head.head_series.0", prefix)] = shape
    return shapes


def make_targets(seed: int, size: tuple[int, int], count: int, num_classes: int) -> Instances:
    labels, masks, boxes = fixture().targets(seed, *size, count, num_classes)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.zeros(len(boxes), 4))
    instances.gt_boxes.tensor = torch.from_numpy(boxes)  # the constructor would make it float32
    instances.gt_classes = torch.from_numpy(labels)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    return instances


def check_masks(masks: np.ndarray, truth: np.ndarray, name: str) -> None:
    """Equal but for at most one pixel a mask, which may lie at the threshold."""
    different = (masks != truth).sum((1, 2))
    assert different.max(initial=0) <= 1 and different.sum() <= 2, f"{name}: {different}"
