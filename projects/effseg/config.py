"""Config keys of EffSeg: its detector, FQDet, and its mask branches, each around a segmentation head."""

from detectron2.config import CfgNode

from querymask.common.config import register_renamed_keys

RENAMED = {
    "MODEL.EFFSEG.MASK_HEAD": (
        "MODEL.MASK_BRANCH.NAME",
        "MASK_HEAD effseg is NAME EffSegBranch, mask_rcnn MaskRCNNBranch, pointrend PointRendBranch, refine_mask "
        "RefineMaskBranch, none none",
    ),
    "MODEL.EFFSEG.MAX_TRAIN_REGIONS": "MODEL.MASK_BRANCH.REGION.MAX_TRAIN_REGIONS",
    "MODEL.EFFSEG.MASK_EXPORT": "MODEL.MASK_BRANCH.REGION.EXPORT",
    "MODEL.EFFSEG.PROCESSING": "MODEL.MASK_BRANCH.EFFSEG.PROCESSING",
    "MODEL.EFFSEG.REFINEMENTS": "MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS",
    "MODEL.EFFSEG.NUM_FCN_CONVS": "MODEL.MASK_BRANCH.EFFSEG.NUM_FCN_CONVS",
    "MODEL.EFFSEG.DILATIONS": "MODEL.MASK_BRANCH.EFFSEG.DILATIONS",
    "MODEL.EFFSEG.USE_POSITION": "MODEL.MASK_BRANCH.EFFSEG.USE_POSITION",
    "MODEL.EFFSEG.SEG_WEIGHTS": "MODEL.MASK_BRANCH.EFFSEG.SEG_WEIGHTS",
    "MODEL.EFFSEG.REF_WEIGHTS": "MODEL.MASK_BRANCH.EFFSEG.REF_WEIGHTS",
    "MODEL.EFFSEG.POINT_SUBDIVISIONS": "MODEL.MASK_BRANCH.POINTREND.SUBDIVISIONS",
}
"""Old keys, as in :func:`register_renamed_keys`."""


def add_effseg_config(cfg: CfgNode) -> None:
    """Add ``MODEL.EFFSEG`` and the sections of mask branches in place. The defaults are the paper's R50 model."""
    _add_detector(cfg)
    _add_mask_branches(cfg)
    register_renamed_keys(cfg, RENAMED)
    cfg.register_deprecated_key("INPUT.MASK_RESIZE")  # INPUT.MASK_RESIZE_RULE has the release's, too


def _add_detector(cfg: CfgNode) -> None:
    cfg.MODEL.EFFSEG = CfgNode()
    # The only key for the number of classes; must equal the data set's
    cfg.MODEL.EFFSEG.NUM_CLASSES = 80
    # Detector: 1 is FQDet (paper), 2 is FQDetV2 (release)
    cfg.MODEL.EFFSEG.VERSION = 1
    cfg.MODEL.EFFSEG.NUM_QUERIES = 300

    # Maps of the backbone, fine to coarse
    cfg.MODEL.EFFSEG.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Levels of the feature pyramid: cells of level l have sides of 2^l pixels. The first are those of IN_FEATURES,
    # further ones are made by stride-2 convolutions
    cfg.MODEL.EFFSEG.LEVELS = [2, 3, 4, 5, 6, 7]
    # What makes the pyramid: "fpn", or "deform_encoder", Mask DINO's pixel decoder
    cfg.MODEL.EFFSEG.NECK = "fpn"
    # Layers of the deform_encoder, hidden width of their feed-forward networks, sampling points per head and level
    cfg.MODEL.EFFSEG.ENC_LAYERS = 6
    cfg.MODEL.EFFSEG.ENC_DIM_FEEDFORWARD = 1024
    cfg.MODEL.EFFSEG.ENC_POINTS = 4

    # Width of pyramid and queries
    cfg.MODEL.EFFSEG.HIDDEN_DIM = 256
    # Decoder of the detector; the attention heads are those of the deform_encoder too
    cfg.MODEL.EFFSEG.DEC_LAYERS = 6
    cfg.MODEL.EFFSEG.NUM_HEADS = 8
    cfg.MODEL.EFFSEG.DIM_FEEDFORWARD = 1024
    # Sampling points per head and level
    cfg.MODEL.EFFSEG.DEC_POINTS = 1

    # Loss weights; None: those of the detector's version (class 1 and 0.5, box 1 and 1.85)
    cfg.MODEL.EFFSEG.SELECTION_WEIGHT = 1.0
    cfg.MODEL.EFFSEG.CLASS_WEIGHT = None
    cfg.MODEL.EFFSEG.BOX_WEIGHT = None

    # Losses are sums over a batch, and MAX_TRAIN_REGIONS and REFINEMENTS of its mask branches are limits of one.
    # "global": that of all processes together, so that gradients do not depend on their number; "local": that of each
    # process, whose gradients are averaged (release)
    cfg.MODEL.EFFSEG.LOSS_REDUCTION = "global"

    # Inference: a pair of query and class is left out if its IoU with a better pair of the class is higher
    cfg.MODEL.EFFSEG.NMS_THRESHOLD = 0.5


def _add_mask_branches(cfg: CfgNode) -> None:
    # What EffSegBranch, EffSeg's own, MaskRCNNBranch, PointRendBranch and RefineMaskBranch share
    cfg.MODEL.MASK_BRANCH.REGION = CfgNode()
    # Training: at most this many matched queries of a batch get masks, a random choice of them (0: all, as published);
    # bounds memory and time
    cfg.MODEL.MASK_BRANCH.REGION.MAX_TRAIN_REGIONS = 0
    # Inference: masks of the original image. "any": the binary mask at the network's size is resized, and any positive
    # bilinear weight on foreground makes foreground, so that masks grow (release); "paste": probabilities are pasted at
    # the original size
    cfg.MODEL.MASK_BRANCH.REGION.EXPORT = "any"

    # EffSegBranch
    cfg.MODEL.MASK_BRANCH.EFFSEG = CfgNode()
    # Processing module of every stage (Table 5)
    cfg.MODEL.MASK_BRANCH.EFFSEG.PROCESSING = "sfm"
    # Active features that are refined in a stage: at most this many, those of all regions of a head call together
    cfg.MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS = 10000
    # 3x3 convolutions before stage 0
    cfg.MODEL.MASK_BRANCH.EFFSEG.NUM_FCN_CONVS = 4
    # Dilations of the parallel convolutions of the processing module "sfm"
    cfg.MODEL.MASK_BRANCH.EFFSEG.DILATIONS = [1, 3, 5]
    # Sine encoding of the position within the region (release; not in the paper's text)
    cfg.MODEL.MASK_BRANCH.EFFSEG.USE_POSITION = True
    # A second linear layer for each of the four children of a cell (paper's text); False: they share it (release)
    cfg.MODEL.MASK_BRANCH.EFFSEG.SEPARATE_CHILDREN = False
    # Which cells are refined, in training and inference. "refinement": those that the head's classifier of borders
    # scores highest; "uncertainty": those of the least certain mask, as in PointRend; "boundary": those at the boundary
    # of the mask so far, as in RefineMask, then the least certain. The number is REFINEMENTS in any case
    cfg.MODEL.MASK_BRANCH.EFFSEG.CHOOSE_BY = "refinement"
    # What the losses ask of a cell. "coverage": whether the mask covers more than half of it, and whether it covers a
    # part of it only (release); "centre": whether its centre is in the mask, and whether that differs among the centres
    # of finer cells in it (paper's text)
    cfg.MODEL.MASK_BRANCH.EFFSEG.TARGETS = "coverage"
    # Loss weights of segmentation and refinement, stage by stage
    cfg.MODEL.MASK_BRANCH.EFFSEG.SEG_WEIGHTS = [0.25, 0.375, 0.375, 0.5]
    cfg.MODEL.MASK_BRANCH.EFFSEG.REF_WEIGHTS = [0.25, 0.25, 0.25, 0.25]

    # PointRendBranch
    cfg.MODEL.MASK_BRANCH.POINTREND = CfgNode()
    # Subdivisions of the 28x28 mask. The release has 3, which gives 224x224; the paper's text says 112x112, which are 2
    cfg.MODEL.MASK_BRANCH.POINTREND.SUBDIVISIONS = 3
