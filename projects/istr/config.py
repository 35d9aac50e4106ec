"""Config keys of ISTR: its detector and its mask branch."""

from detectron2.config import CfgNode

from querymask.common.config import register_renamed_keys

RENAMED = {
    "MODEL.ISTR.MASK_ON": ("MODEL.MASK_BRANCH.NAME", "MASK_ON False is NAME none; True is what NAME '' does"),
    "MODEL.ISTR.MASK_CODING": "MODEL.MASK_CODING.NAME",
    "MODEL.ISTR.MASK_SIZE": "MODEL.MASK_CODING.SIZE",
    "MODEL.ISTR.VECTOR_LENGTH": "MODEL.MASK_CODING.LENGTH",
    "MODEL.ISTR.MASK_BASIS": "MODEL.MASK_CODING.BASIS",
    "MODEL.ISTR.LABEL_NOISE": "MODEL.MASK_CODING.LABEL_NOISE",
    "MODEL.ISTR.MASK_HEAD": "MODEL.MASK_BRANCH.CODE.HEAD",
    "MODEL.ISTR.MASK_POOL_SIZE": "MODEL.MASK_BRANCH.CODE.POOL_SIZE",
    "MODEL.ISTR.MASK_TARGET": "MODEL.MASK_BRANCH.CODE.TARGET",
    "MODEL.ISTR.MASK_COST": "MODEL.MASK_BRANCH.CODE.COST",
    "MODEL.ISTR.COST_MASK": "MODEL.MASK_BRANCH.CODE.COST_WEIGHT",
    "MODEL.ISTR.VECTOR_LOSS": "MODEL.MASK_BRANCH.CODE.LOSS",
    "MODEL.ISTR.VECTOR_WEIGHT": "MODEL.MASK_BRANCH.CODE.WEIGHT",
    "MODEL.ISTR.DICE_WEIGHT": "MODEL.MASK_BRANCH.CODE.DICE_WEIGHT",
    "MODEL.ISTR.PASTE_THRESHOLD": "MODEL.MASK_BRANCH.CODE.PASTE_THRESHOLD",
}
"""Old keys, as in :func:`register_renamed_keys`. ``MODEL.ISTR.HEAD_LAYERS`` was the mask head's, too."""


def add_istr_config(cfg: CfgNode) -> None:
    """Add the sections ``MODEL.ISTR``, ``CODE`` and ``PIXEL`` in place.

    With ``MODEL.MASK_CODING`` as in ``configs/Base-ISTR.yaml``, the defaults are the paper's R50 model as released.
    """
    _add_detector(cfg)
    _add_code_branch(cfg)
    _add_pixel_branch(cfg)
    register_renamed_keys(cfg, RENAMED)


def _add_detector(cfg: CfgNode) -> None:
    cfg.MODEL.ISTR = CfgNode()
    # The only key for the number of classes; must equal the data set's
    cfg.MODEL.ISTR.NUM_CLASSES = 80
    cfg.MODEL.ISTR.NUM_QUERIES = 300
    # Refinement stages, each with its own weights
    cfg.MODEL.ISTR.NUM_STAGES = 6
    # Levels of the feature pyramid, fine to coarse
    cfg.MODEL.ISTR.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # Width of the queries; must equal MODEL.FPN.OUT_CHANNELS
    cfg.MODEL.ISTR.HIDDEN_DIM = 256

    # Queries: image feature P plus position embedding E (section 3.3, Table 1e)
    cfg.MODEL.ISTR.USE_IMAGE_FEATURE = True
    cfg.MODEL.ISTR.USE_POSITION = True
    # Spatial pooling of a pyramid level for P, "mean" or "max"
    cfg.MODEL.ISTR.QUERY_POOLING = "mean"
    # Queries of a stage: "previous" stage's object features (release), or the "initial" P + E again (equation 10)
    cfg.MODEL.ISTR.STAGE_INPUT = "previous"

    # A stage
    cfg.MODEL.ISTR.NUM_HEADS = 8
    cfg.MODEL.ISTR.DIM_FEEDFORWARD = 2048
    cfg.MODEL.ISTR.DROPOUT = 0.0
    # Bins a side of the crops that queries attend to
    cfg.MODEL.ISTR.POOL_SIZE = 7
    # How queries read their crops (Table 1d): "dynamic" layers made of the query, or "multi_head" attention
    cfg.MODEL.ISTR.ATTENTION = "dynamic"
    # 2 dynamic layers, to the inner width and back (release), or the first one alone (equation 11)
    cfg.MODEL.ISTR.DYNAMIC_LAYERS = 2
    # Inner width of the dynamic layers
    cfg.MODEL.ISTR.DIM_DYNAMIC = 64
    # Layers before the last one of the class and box heads
    cfg.MODEL.ISTR.HEAD_LAYERS = 3
    # "sigmoid" scores with focal loss (release), or "softmax" with a no-object class (equation 6)
    cfg.MODEL.ISTR.CLASSIFIER = "sigmoid"
    # Of "softmax": DETR's "cross_entropy", or "focal" loss (equation 8)
    cfg.MODEL.ISTR.SOFTMAX_LOSS = "cross_entropy"

    # Matching costs
    cfg.MODEL.ISTR.COST_CLASS = 2.0
    cfg.MODEL.ISTR.COST_BBOX = 5.0
    cfg.MODEL.ISTR.COST_GIOU = 2.0

    # Losses
    cfg.MODEL.ISTR.CLASS_WEIGHT = 2.0
    cfg.MODEL.ISTR.BBOX_WEIGHT = 5.0
    cfg.MODEL.ISTR.GIOU_WEIGHT = 2.0
    cfg.MODEL.ISTR.FOCAL_ALPHA = 0.25
    # Weight of the no-object class in the cross-entropy of the "softmax" classifier
    cfg.MODEL.ISTR.NO_OBJECT_WEIGHT = 0.1
    # Losses for every stage, or for the last one only
    cfg.MODEL.ISTR.DEEP_SUPERVISION = True

    # Inference: scores are those of the mean logits from this stage on; -1: of the last stage alone
    cfg.MODEL.ISTR.FIRST_SCORED_STAGE = -1


def _add_code_branch(cfg: CfgNode) -> None:
    # CodeBranch, ISTR's own: mask vectors that are predicted, matched and regressed, layer by layer
    cfg.MODEL.MASK_BRANCH.CODE = CfgNode()
    # What predicts the vector: "vector" head on the query (paper), or "convolution" over a larger crop at the refined
    # box (second release)
    cfg.MODEL.MASK_BRANCH.CODE.HEAD = "vector"
    # Layers before the last one of the "vector" head
    cfg.MODEL.MASK_BRANCH.CODE.HEAD_LAYERS = 3
    # Bins a side of the crops of the "convolution" head
    cfg.MODEL.MASK_BRANCH.CODE.POOL_SIZE = 28
    # Box at which the target of the mask losses is cut out: "ground_truth", or the matched "predicted" one
    cfg.MODEL.MASK_BRANCH.CODE.TARGET = "ground_truth"

    # Matching cost (Table 1b): "cosine" or "l1" of the vectors, "dice" of the masks, or "none"
    cfg.MODEL.MASK_BRANCH.CODE.COST = "cosine"
    cfg.MODEL.MASK_BRANCH.CODE.COST_WEIGHT = 2.0

    # Distance of vectors: "l2" (squares) or "smooth_l1"
    cfg.MODEL.MASK_BRANCH.CODE.LOSS = "l2"
    cfg.MODEL.MASK_BRANCH.CODE.WEIGHT = 2.0
    # Of the dice loss of the decoded masks
    cfg.MODEL.MASK_BRANCH.CODE.DICE_WEIGHT = 2.0

    # Inference: foreground of a pasted mask is what reaches it
    cfg.MODEL.MASK_BRANCH.CODE.PASTE_THRESHOLD = 0.5


def _add_pixel_branch(cfg: CfgNode) -> None:
    # PixelBranch: the mask head of Mask R-CNN in every layer, instead of vectors (Table 1a, "mask")
    cfg.MODEL.MASK_BRANCH.PIXEL = CfgNode()
    # Bins a side of the crops; masks have twice as many
    cfg.MODEL.MASK_BRANCH.PIXEL.POOL_SIZE = 14
    cfg.MODEL.MASK_BRANCH.PIXEL.WEIGHT = 1.0
