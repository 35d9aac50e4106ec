"""Config keys of SOLQ: its detector, a Deformable DETR, and its mask branches."""

from detectron2.config import CfgNode

from querymask.common.config import register_renamed_keys

RENAMED = {
    "MODEL.SOLQ.MASK_ON": ("MODEL.MASK_BRANCH.NAME", "MASK_ON False is NAME none; True is what NAME '' does"),
    "MODEL.SOLQ.MASK_BRANCH": ("MODEL.MASK_BRANCH.NAME", "MASK_BRANCH sqr is NAME SQRBranch, vector VectorBranch"),
    "MODEL.SOLQ.USE_CHECKPOINT": "MODEL.USE_CHECKPOINT",
    "MODEL.SOLQ.FREEZE_DETECTOR": "MODEL.MASK_BRANCH.FREEZE_DETECTOR",
    "MODEL.SOLQ.MASK_CODING": "MODEL.MASK_CODING.NAME",
    "MODEL.SOLQ.MASK_SIZE": "MODEL.MASK_CODING.SIZE",
    "MODEL.SOLQ.VECTOR_LENGTH": "MODEL.MASK_CODING.LENGTH",
    "MODEL.SOLQ.MASK_BASIS": "MODEL.MASK_CODING.BASIS",
    "MODEL.SOLQ.LABEL_NOISE": "MODEL.MASK_CODING.LABEL_NOISE",
    "MODEL.SOLQ.VECTOR_HIDDEN_DIM": "MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM",
    "MODEL.SOLQ.VECTOR_START_LAYER": "MODEL.MASK_BRANCH.VECTOR.START_LAYER",
    "MODEL.SOLQ.VECTOR_LOSS": "MODEL.MASK_BRANCH.VECTOR.LOSS",
    "MODEL.SOLQ.VECTOR_LOSS_REDUCTION": "MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION",
    "MODEL.SOLQ.VECTOR_WEIGHT": "MODEL.MASK_BRANCH.VECTOR.WEIGHT",
    "MODEL.SOLQ.PASTE": "MODEL.MASK_BRANCH.VECTOR.PASTE",
    "MODEL.SOLQ.SQR_MASK_WEIGHT": "MODEL.MASK_BRANCH.SQR.MASK_WEIGHT",
    "MODEL.SOLQ.SQR_DICE_WEIGHT": "MODEL.MASK_BRANCH.SQR.DICE_WEIGHT",
    "MODEL.SOLQ.SQR_CROP_MASKS": "MODEL.MASK_BRANCH.SQR.CROP_MASKS",
}
"""Old keys, as in :func:`register_renamed_keys`."""


def add_solq_config(cfg: CfgNode) -> None:
    """Add the sections ``MODEL.SOLQ``, ``VECTOR`` and ``SQR`` in place. The defaults are the published R50 model."""
    _add_detector(cfg)
    _add_vector_branch(cfg)
    _add_sqr_branch(cfg)
    register_renamed_keys(cfg, RENAMED)


def _add_detector(cfg: CfgNode) -> None:
    cfg.MODEL.SOLQ = CfgNode()
    # The only key for the number of classes; must equal the data set's
    cfg.MODEL.SOLQ.NUM_CLASSES = 80
    cfg.MODEL.SOLQ.NUM_QUERIES = 300

    # Backbone features, fine to coarse; levels beyond them are made by stride-2 convolutions from the last one
    cfg.MODEL.SOLQ.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.SOLQ.NUM_FEATURE_LEVELS = 4

    # Transformer (Deformable DETR)
    cfg.MODEL.SOLQ.HIDDEN_DIM = 384
    cfg.MODEL.SOLQ.NUM_HEADS = 8
    cfg.MODEL.SOLQ.ENC_LAYERS = 6
    cfg.MODEL.SOLQ.DEC_LAYERS = 6
    cfg.MODEL.SOLQ.DIM_FEEDFORWARD = 1024
    cfg.MODEL.SOLQ.DROPOUT = 0.1
    # Sampling points per head and level
    cfg.MODEL.SOLQ.ENC_POINTS = 4
    cfg.MODEL.SOLQ.DEC_POINTS = 4
    # Iterative box refinement: every decoder layer has its own heads and moves the reference
    cfg.MODEL.SOLQ.BOX_REFINE = True
    # Queries from the encoder's best proposals instead of learned ones
    cfg.MODEL.SOLQ.TWO_STAGE = False

    # Matching costs and loss weights
    cfg.MODEL.SOLQ.COST_CLASS = 2.0
    cfg.MODEL.SOLQ.COST_BBOX = 5.0
    cfg.MODEL.SOLQ.COST_GIOU = 2.0
    cfg.MODEL.SOLQ.CLASS_WEIGHT = 2.0
    cfg.MODEL.SOLQ.BBOX_WEIGHT = 5.0
    cfg.MODEL.SOLQ.GIOU_WEIGHT = 2.0
    cfg.MODEL.SOLQ.FOCAL_ALPHA = 0.25


def _add_vector_branch(cfg: CfgNode) -> None:
    # VectorBranch, SOLQ's own: the query regresses a coded mask
    cfg.MODEL.MASK_BRANCH.VECTOR = CfgNode()
    # Of the vector head
    cfg.MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM = 1024
    # One vector head for all decoder layers (the release), or one for each (the paper)
    cfg.MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD = True
    # First decoder layer with a vector loss; the last layer always has one
    cfg.MODEL.MASK_BRANCH.VECTOR.START_LAYER = 0
    # "l1" distance of vectors, or "l2_dice": mean square over the entries plus the dice loss of the decoded mask, per
    # target (the release's form for PCA)
    cfg.MODEL.MASK_BRANCH.VECTOR.LOSS = "l1"
    # Of "l1". "mean": over matches (of all processes) and entries. "local_mean": the release's mean over the matches
    # of one process. "sum": sum over entries divided by the number of targets (fast SOLQ)
    cfg.MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION = "mean"
    cfg.MODEL.MASK_BRANCH.VECTOR.WEIGHT = 3.0
    # "binary": threshold the decoded map at half of its range, paste, threshold again (SOLQ).
    # "soft": paste the decoded map and threshold once (fast SOLQ)
    cfg.MODEL.MASK_BRANCH.VECTOR.PASTE = "binary"


def _add_sqr_branch(cfg: CfgNode) -> None:
    # SQRBranch: attention maps and convolutions (the paper's baseline with a separate query representation)
    cfg.MODEL.MASK_BRANCH.SQR = CfgNode()
    # Weights of the focal and the dice loss of whole masks
    cfg.MODEL.MASK_BRANCH.SQR.MASK_WEIGHT = 1.0
    cfg.MODEL.MASK_BRANCH.SQR.DICE_WEIGHT = 1.0
    # Cut masks off at their boxes, as the paper says; the release does not
    cfg.MODEL.MASK_BRANCH.SQR.CROP_MASKS = False
