"""Every config, and how it is made small: what makes a model slow goes, what makes it the model of its row stays."""

from typing import Any

from detectron2.config import CfgNode
from devices import DEVICE

from querymask.model_zoo import find_leaves

LEAVES = {f"{leaf.method}/{leaf.name}": leaf for leaf in find_leaves()}
NUM_CLASSES = 5
NUM_THINGS = 3
# A multiple of 16: oneDNN of torch 2.15 writes beyond its memory in the backward pass of a 1x1 convolution of stride 2
# that reads 8 channels in the channels-last layout, for three images and two threads.
BACKBONES: dict[str, Any] = {
    "MODEL.DEVICE": DEVICE,
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [2, 2, 2, 2],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
}
# By the folder of the method
REDUCED: dict[str, dict[str, Any]] = {
    "solq": {
        "MODEL.SOLQ.NUM_CLASSES": NUM_CLASSES,
        "MODEL.SOLQ.NUM_QUERIES": 12,
        "MODEL.SOLQ.HIDDEN_DIM": 32,
        "MODEL.SOLQ.NUM_HEADS": 4,
        "MODEL.SOLQ.ENC_LAYERS": 1,
        "MODEL.SOLQ.DIM_FEEDFORWARD": 32,
        "MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM": 32,
    },
    "isda": {
        "MODEL.ISDA.NUM_CLASSES": NUM_CLASSES,
        "MODEL.ISDA.NUM_QUERIES": 12,
        "MODEL.ISDA.HIDDEN_DIM": 64,
        "MODEL.ISDA.NUM_HEADS": 4,
        "MODEL.ISDA.ENC_LAYERS": 1,
        "MODEL.ISDA.DEC_LAYERS": 2,
        "MODEL.ISDA.DIM_FEEDFORWARD": 32,
        "MODEL.MASK_BRANCH.KERNEL.MASK_FEATURE_DIM": 64,
    },
    "istr": {
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ISTR.NUM_CLASSES": NUM_CLASSES,
        "MODEL.ISTR.NUM_QUERIES": 6,
        "MODEL.ISTR.HIDDEN_DIM": 32,
        "MODEL.ISTR.NUM_HEADS": 4,
        "MODEL.ISTR.DIM_FEEDFORWARD": 24,
        "MODEL.ISTR.DIM_DYNAMIC": 4,
    },
    "effseg": {
        "MODEL.EFFSEG.NUM_CLASSES": NUM_CLASSES,
        "MODEL.EFFSEG.NUM_QUERIES": 100,
        "MODEL.EFFSEG.HIDDEN_DIM": 64,  # the selector's eight groups need two channels each where a level has one cell
        "MODEL.EFFSEG.NUM_HEADS": 4,
        "MODEL.EFFSEG.DEC_LAYERS": 2,
        "MODEL.EFFSEG.DIM_FEEDFORWARD": 24,
        "MODEL.EFFSEG.ENC_LAYERS": 1,
        "MODEL.EFFSEG.ENC_DIM_FEEDFORWARD": 24,
        "MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS": 300,
        "MODEL.MASK_BRANCH.REGION.MAX_TRAIN_REGIONS": 4,
        "TEST.DETECTIONS_PER_IMAGE": 9,
    },
    "baselines": {
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        "MODEL.FPN.NORM": "GN",  # maps of random weights on pixels of 0 to 255 would have no bound
        "SOLVER.BASE_LR": 1e-3,
    },
}


def tiny_config(name: str) -> CfgNode:
    """The small form of a leaf.

    Args:
        name: of ``LEAVES``, such as "solq/ablations/stages_1".
    """
    leaf = LEAVES[name]
    cfg = leaf.config()
    for key, value in {**BACKBONES, **REDUCED[leaf.method]}.items():
        cfg.merge_from_list([key, value])
    if cfg.MODEL.PANOPTIC.ENABLED:
        cfg.MODEL.PANOPTIC.NUM_THINGS = NUM_THINGS
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.MODEL.ROI_MASK_HEAD.get("POINT_HEAD_ON"):
        cfg.merge_from_list(["MODEL.POINT_HEAD.NUM_CLASSES", NUM_CLASSES, "MODEL.ROI_MASK_HEAD.FC_DIM", 32])
    if leaf.method == "solq" and cfg.MODEL.MASK_BRANCH.NAME == "SQRBranch":  # the least that its mask head can have
        cfg.MODEL.SOLQ.HIDDEN_DIM, cfg.MODEL.SOLQ.NUM_HEADS = 128, 8
        # Clipped together with those of a detector of random weights, its gradients would be below AdamW's epsilon
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e6
    if cfg.MODEL.MASK_BRANCH.CODE.HEAD == "convolution":
        cfg.MODEL.MASK_BRANCH.CODE.POOL_SIZE = 8
    if cfg.MODEL.MASK_CODING.NAME == "autoencoder":  # of masks four times as large as the crop
        cfg.MODEL.MASK_CODING.SIZE = 32
    return cfg
