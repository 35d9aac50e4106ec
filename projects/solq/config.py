"""Config keys of SOLQ and of Deformable DETR, its detector without the mask branch."""

from detectron2.config import CfgNode


def add_solq_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SOLQ`` to a Detectron2 config, in place. The defaults are the published R50 model."""
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
    # Recompute encoder layers in the backward pass instead of storing them
    cfg.MODEL.SOLQ.USE_CHECKPOINT = False

    # Mask branch; without it the model is Deformable DETR
    cfg.MODEL.SOLQ.MASK_ON = True
    # "vector": the query regresses a coded mask (SOLQ). "sqr": attention maps and convolutions (the paper's baseline
    # with a separate query representation)
    cfg.MODEL.SOLQ.MASK_BRANCH = "vector"
    # Train the mask branch alone, on the detector of MODEL.WEIGHTS
    cfg.MODEL.SOLQ.FREEZE_DETECTOR = False
    # Mask coding: "dct", "pca", "sparse", "flatten" (pixels), "flatten_logits"; side of the coded mask, length of its
    # vector
    cfg.MODEL.SOLQ.MASK_CODING = "dct"
    cfg.MODEL.SOLQ.MASK_SIZE = 128
    cfg.MODEL.SOLQ.VECTOR_LENGTH = 256
    # File with the basis of "pca" or "sparse" (tools/fit_mask_basis.py); "": it comes with the checkpoint of
    # MODEL.WEIGHTS
    cfg.MODEL.SOLQ.MASK_BASIS = ""
    # "pca": noise on the labels, drawn anew for every target vector
    cfg.MODEL.SOLQ.LABEL_NOISE = True
    cfg.MODEL.SOLQ.VECTOR_HIDDEN_DIM = 1024
    # First decoder layer with a vector loss; the last layer always has one
    cfg.MODEL.SOLQ.VECTOR_START_LAYER = 0
    # "l1" distance of vectors, or "l2_dice": mean square over the entries plus the dice loss of the decoded mask, per
    # target (the release's form for PCA)
    cfg.MODEL.SOLQ.VECTOR_LOSS = "l1"
    # Of "l1". "mean": over matches (of all processes) and entries. "local_mean": the release's mean over the matches
    # of one process. "sum": sum over entries divided by the number of targets (fast SOLQ)
    cfg.MODEL.SOLQ.VECTOR_LOSS_REDUCTION = "mean"
    # "binary": threshold the decoded map at half of its range, paste, threshold again (SOLQ).
    # "soft": paste the decoded map and threshold once (fast SOLQ)
    cfg.MODEL.SOLQ.PASTE = "binary"

    # Matching costs and loss weights
    cfg.MODEL.SOLQ.COST_CLASS = 2.0
    cfg.MODEL.SOLQ.COST_BBOX = 5.0
    cfg.MODEL.SOLQ.COST_GIOU = 2.0
    cfg.MODEL.SOLQ.CLASS_WEIGHT = 2.0
    cfg.MODEL.SOLQ.BBOX_WEIGHT = 5.0
    cfg.MODEL.SOLQ.GIOU_WEIGHT = 2.0
    cfg.MODEL.SOLQ.VECTOR_WEIGHT = 3.0
    cfg.MODEL.SOLQ.FOCAL_ALPHA = 0.25

    # Branch "sqr": weights of the focal and the dice loss of whole masks
    cfg.MODEL.SOLQ.SQR_MASK_WEIGHT = 1.0
    cfg.MODEL.SOLQ.SQR_DICE_WEIGHT = 1.0
    # Cut masks off at their boxes, as the paper says; the release does not
    cfg.MODEL.SOLQ.SQR_CROP_MASKS = False
