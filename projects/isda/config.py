"""Config keys of ISDA: its detector and its mask branch."""

from detectron2.config import CfgNode

from querymask.common.config import register_renamed_keys

RENAMED = {
    "MODEL.ISDA.USE_CHECKPOINT": "MODEL.USE_CHECKPOINT",
    "MODEL.ISDA.KERNEL_FCS": "MODEL.MASK_BRANCH.KERNEL.NUM_FCS",
    "MODEL.ISDA.KERNEL_POSITIONS": "MODEL.MASK_BRANCH.KERNEL.POSITIONS",
    "MODEL.ISDA.MASK_STRIDE": "MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE",
    "MODEL.ISDA.MASK_FEATURE_DIM": "MODEL.MASK_BRANCH.KERNEL.MASK_FEATURE_DIM",
    "MODEL.ISDA.MASK_POSITIONS": "MODEL.MASK_BRANCH.KERNEL.MASK_POSITIONS",
    "MODEL.ISDA.MASKNESS_THRESHOLD": "MODEL.MASK_BRANCH.KERNEL.MASKNESS_THRESHOLD",
    "MODEL.ISDA.MASK_THRESHOLD": "MODEL.MASK_BRANCH.KERNEL.MASK_THRESHOLD",
    "MODEL.ISDA.COST_MASK": "MODEL.MASK_BRANCH.KERNEL.COST_WEIGHT",
    "MODEL.ISDA.MASK_WEIGHT": "MODEL.MASK_BRANCH.KERNEL.WEIGHT",
    "MODEL.ISDA.MASK_LOSS": "MODEL.MASK_BRANCH.KERNEL.LOSS",
}
"""Old keys, as in :func:`register_renamed_keys`."""


def add_isda_config(cfg: CfgNode) -> None:
    """Add the sections ``MODEL.ISDA`` and ``KERNEL`` in place. The defaults are the release's model."""
    _add_detector(cfg)
    _add_kernel_branch(cfg)
    register_renamed_keys(cfg, RENAMED)


def _add_detector(cfg: CfgNode) -> None:
    cfg.MODEL.ISDA = CfgNode()
    # The only key for the number of classes; must equal the data set's
    cfg.MODEL.ISDA.NUM_CLASSES = 80
    cfg.MODEL.ISDA.NUM_QUERIES = 300

    # Backbone features, fine to coarse: the first one goes to the mask features only, the others to the transformer too
    cfg.MODEL.ISDA.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Levels of the transformer; those beyond the backbone's are made by stride-2 convolutions from its last map
    cfg.MODEL.ISDA.NUM_FEATURE_LEVELS = 4

    # Transformer (Deformable DETR, one-stage, without box refinement)
    cfg.MODEL.ISDA.HIDDEN_DIM = 256
    cfg.MODEL.ISDA.NUM_HEADS = 8
    cfg.MODEL.ISDA.ENC_LAYERS = 6
    cfg.MODEL.ISDA.DEC_LAYERS = 6
    cfg.MODEL.ISDA.DIM_FEEDFORWARD = 1024
    cfg.MODEL.ISDA.DROPOUT = 0.1
    # Sampling points per head and level
    cfg.MODEL.ISDA.ENC_POINTS = 4
    cfg.MODEL.ISDA.DEC_POINTS = 4

    # Matching cost of the classes: "focal" (the release), or "probability": minus the class's, as in DETR (the paper)
    cfg.MODEL.ISDA.CLASS_COST = "focal"
    # Weights of the cost and of the loss
    cfg.MODEL.ISDA.COST_CLASS = 2.0
    cfg.MODEL.ISDA.CLASS_WEIGHT = 2.0
    cfg.MODEL.ISDA.FOCAL_ALPHA = 0.25


def _add_kernel_branch(cfg: CfgNode) -> None:
    # KernelBranch, ISDA's own: kernels of queries on one map of mask features
    cfg.MODEL.MASK_BRANCH.KERNEL = CfgNode()
    # Hidden layers of the kernel head
    cfg.MODEL.MASK_BRANCH.KERNEL.NUM_FCS = 2
    # What the last two entries of a kernel are ("KP"): "logit" of its reference point (the release), the "point" itself
    # (the paper's text), or "none": the kernel head makes all entries
    cfg.MODEL.MASK_BRANCH.KERNEL.POSITIONS = "logit"

    # Mask features: image size over their size (2, 4 or 8), width inside the head, coordinate channels ("MP")
    cfg.MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE = 4
    cfg.MODEL.MASK_BRANCH.KERNEL.MASK_FEATURE_DIM = 128
    cfg.MODEL.MASK_BRANCH.KERNEL.MASK_POSITIONS = True

    # Scores are class probabilities times maskness (the release), or the former alone (the paper has no maskness)
    cfg.MODEL.MASK_BRANCH.KERNEL.MASKNESS = True
    # Maskness is the mean of a mask's probabilities above this: 0.5 in the release's first head, 1e-6 in its second
    cfg.MODEL.MASK_BRANCH.KERNEL.MASKNESS_THRESHOLD = 0.5
    # Foreground of the final masks
    cfg.MODEL.MASK_BRANCH.KERNEL.MASK_THRESHOLD = 0.5

    # Matching and loss compare masks with targets at so many random cells (0: at all): bounds the memory where
    # images have hundreds of objects
    cfg.MODEL.MASK_BRANCH.KERNEL.POINTS = 0
    # Weight of the matching cost; a detector whose matching asks no costs has none
    cfg.MODEL.MASK_BRANCH.KERNEL.COST_WEIGHT = 3.0
    cfg.MODEL.MASK_BRANCH.KERNEL.WEIGHT = 3.0
    # "dice" with squared denominators (the release), or "iou": 1 - soft IoU (the paper's text)
    cfg.MODEL.MASK_BRANCH.KERNEL.LOSS = "dice"
