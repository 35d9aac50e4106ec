"""Config keys of ISTR."""

from detectron2.config import CfgNode


def add_istr_config(cfg: CfgNode) -> None:
    """Add ``MODEL.ISTR`` to a Detectron2 config, in place. The defaults are the paper's R50 model as released."""
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
    # Inner width of the dynamic layers
    cfg.MODEL.ISTR.DIM_DYNAMIC = 64
    # Layers before the last one of the class, box and vector heads
    cfg.MODEL.ISTR.HEAD_LAYERS = 3
    # "sigmoid" scores with focal loss (release), or "softmax" with a no-object class and cross-entropy (equation 6)
    cfg.MODEL.ISTR.CLASSIFIER = "sigmoid"

    # Mask branch; without it the model is a detector
    cfg.MODEL.ISTR.MASK_ON = True
    # Mask coding: "pca", "dct", "sparse", "autoencoder" (SMT), "flatten" (pixels), "flatten_logits"; side of the coded
    # mask, length of its vector
    cfg.MODEL.ISTR.MASK_CODING = "pca"
    cfg.MODEL.ISTR.MASK_SIZE = 28
    cfg.MODEL.ISTR.VECTOR_LENGTH = 60
    # File with the basis of "pca" or "sparse" (tools/fit_mask_basis.py) or the weights of "autoencoder"
    # (tools/train_mask_autoencoder.py); "": it comes with the checkpoint of MODEL.WEIGHTS
    cfg.MODEL.ISTR.MASK_BASIS = ""
    # "pca": noise on the labels, drawn anew for every target vector (release; the paper has none)
    cfg.MODEL.ISTR.LABEL_NOISE = True
    # What predicts the vector: "vector" head on the query (paper), "convolution" over a larger crop at the refined box
    # (second release), or "pixel", the head of Mask R-CNN, for "flatten_logits" (Table 1a)
    cfg.MODEL.ISTR.MASK_HEAD = "vector"
    # Bins a side of the crops of the "convolution" and "pixel" heads
    cfg.MODEL.ISTR.MASK_POOL_SIZE = 28
    # Box at which the target of the mask losses is cut out: "ground_truth", or the matched "predicted" one
    cfg.MODEL.ISTR.MASK_TARGET = "ground_truth"

    # Matching costs
    cfg.MODEL.ISTR.COST_CLASS = 2.0
    cfg.MODEL.ISTR.COST_BBOX = 5.0
    cfg.MODEL.ISTR.COST_GIOU = 2.0
    cfg.MODEL.ISTR.COST_MASK = 2.0
    # Kind of the mask cost (Table 1b): "cosine" or "l1" of the vectors, "dice" of the masks, or "none"
    cfg.MODEL.ISTR.MASK_COST = "cosine"

    # Losses
    cfg.MODEL.ISTR.CLASS_WEIGHT = 2.0
    cfg.MODEL.ISTR.BBOX_WEIGHT = 5.0
    cfg.MODEL.ISTR.GIOU_WEIGHT = 2.0
    cfg.MODEL.ISTR.VECTOR_WEIGHT = 2.0
    cfg.MODEL.ISTR.DICE_WEIGHT = 2.0
    # Distance of vectors: "l2" (squares) or "smooth_l1"
    cfg.MODEL.ISTR.VECTOR_LOSS = "l2"
    cfg.MODEL.ISTR.FOCAL_ALPHA = 0.25
    # Weight of the no-object class of the "softmax" classifier
    cfg.MODEL.ISTR.NO_OBJECT_WEIGHT = 0.1
    # Losses for every stage, or for the last one only
    cfg.MODEL.ISTR.DEEP_SUPERVISION = True

    # Inference: scores are those of the mean logits from this stage on; -1: of the last stage alone
    cfg.MODEL.ISTR.FIRST_SCORED_STAGE = -1
    # Foreground of a pasted mask is what reaches it
    cfg.MODEL.ISTR.PASTE_THRESHOLD = 0.5
