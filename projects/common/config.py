"""Config keys that all methods share."""

from collections.abc import Mapping

from detectron2.config import CfgNode


def add_common_config(cfg: CfgNode) -> None:
    """Add the keys that are not of one method, in place: input, solver, evaluation, masks and Swin."""
    # Every method works on RGB images in [0, 1], normalised with ImageNet's statistics; Detectron2 works on 0..255.
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]

    # A folder of photographs with annotations, whose data sets TRAIN and TEST may name (--data sets all three)
    cfg.DATASETS.FOLDER = ""

    # The values [low, high] of 16-bit and float images that become black and white; such images are refused where it is
    # empty. It has no effect on images of 8 bits
    cfg.INPUT.PIXEL_RANGE = []
    # Images of more pixels are refused (0: Pillow's limit, about 179 million)
    cfg.INPUT.MAX_PIXELS = 0

    # Whose rounding of sizes, and whose interpolation: detr (SOLQ's release), detectron2 (ISTR's), mmdetection (ISDA's:
    # not antialiased) or effseg
    cfg.INPUT.RESIZE_RULE = "detr"
    # Of training masks: nearest, the releases' neighbour, which puts masks up to half a pixel further right and down
    # than the image; or linear, without that shift, which shows where objects are small
    cfg.INPUT.MASK_RESIZE_RULE = "nearest"

    # DETR's second augmentation branch: resize, crop, resize again (Carion et al. 2020, section 4).
    cfg.INPUT.DETR_CROP = CfgNode()
    cfg.INPUT.DETR_CROP.ENABLED = False
    # Probability of the branch with the crop
    cfg.INPUT.DETR_CROP.PROBABILITY = 0.5
    # Shorter side before the crop, chosen uniformly; no limit on the longer side
    cfg.INPUT.DETR_CROP.MIN_SIZES = [400, 500, 600]
    # Width and height of the crop are uniform integers of this range, limited by the image
    cfg.INPUT.DETR_CROP.CROP_RANGE = [384, 600]
    # Height and width of the crop as parts of the image's, instead of CROP_RANGE (empty: CROP_RANGE counts)
    cfg.INPUT.DETR_CROP.RELATIVE_SIZE = []
    # SOLQ's release resizes once more before the choice of the branch
    cfg.INPUT.DETR_CROP.RESIZE_FIRST = False

    # Large-scale jitter (Ghiasi et al. 2021) instead of MIN_SIZE_TRAIN and DETR_CROP: resize to a random scale, then
    # crop or pad to a square
    cfg.INPUT.LSJ = CfgNode()
    cfg.INPUT.LSJ.ENABLED = False
    # Side of the square
    cfg.INPUT.LSJ.SIZE = 1024
    # Least and greatest scale; at 1 the longer side of the image is that of the square
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]
    # Of the padding, which counts as image
    cfg.INPUT.LSJ.PAD_VALUE = 128.0

    # INPUT.RANDOM_FLIP may be "both", too: horizontally, vertically, or both at a time
    # Training images are turned by 0, 90, 180 or 270 degrees: for microscopy and views from above
    cfg.INPUT.ROTATE_90 = False
    # Brightness, contrast and saturation of training images are each multiplied by a factor from 1 - this to 1 + this
    cfg.INPUT.COLOR_JITTER = 0.0
    # Probability that a random choice of the instances of another image, augmented as this one, is pasted onto a
    # training image (Ghiasi et al. 2021); suits INPUT.LSJ
    cfg.INPUT.COPY_PASTE = 0.0

    # A training image that augmentation leaves without instances is replaced by another, random one
    cfg.INPUT.REPLACE_EMPTY = False
    # Images with a shorter side are left out of training
    cfg.DATALOADER.MIN_IMAGE_SIDE = 0

    # At most this many instances of a training image are used, a random choice of them (0: all); bounds the memory
    cfg.INPUT.MAX_INSTANCES = 0

    # Leave out instances of which augmentation left no pixel of the mask
    cfg.INPUT.DROP_EMPTY_MASKS = False

    # How float32 matrix products may be rounded inside (torch.set_float32_matmul_precision): highest, high (TF32) or
    # medium (bfloat16 where the processor has it, twice as fast there)
    cfg.FLOAT32_MATMUL_PRECISION = "highest"

    # Of SOLVER.AMP.ENABLED, for training (evaluation is in float32): "bf16", "fp16" with a loss scale, or "auto": bf16
    # on CPUs and on GPUs that compute in it (NVIDIA's since Ampere), else fp16
    cfg.SOLVER.AMP.PRECISION = "auto"

    # A process computes its images of a batch in so many parts, one after the other: the memory of one part, the
    # gradients of the batch
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Of the average of the weights over the iterations that is evaluated and saved in their place, as 0.9998; 0: none
    cfg.SOLVER.EMA_DECAY = 0.0
    # Checkpoints of every CHECKPOINT_PERIOD that stay, the last ones (0: all)
    cfg.SOLVER.CHECKPOINTS_KEPT = 0

    # SGD or ADAMW
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning-rate factor of parameters of the backbone
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Learning-rate factor of parameters whose name contains one of SLOW_PARAMETERS
    cfg.SOLVER.SLOW_MULTIPLIER = 0.1
    cfg.SOLVER.SLOW_PARAMETERS = ["reference_points", "sampling_offsets"]
    # Weight decay of normalisation layers and of biases; None: WEIGHT_DECAY, as the papers have it
    cfg.SOLVER.WEIGHT_DECAY_NORM = None
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None
    # CLIP_TYPE "full_model" clips the norm over all parameters together, as DETR does

    # Give boundary AP (Cheng et al. 2021) beside mask AP, for data sets that COCO's evaluation is used for; of panoptic
    # ones boundary PQ beside PQ
    cfg.TEST.BOUNDARY_AP = False

    # With every evaluation, the loss on DATASETS.TEST: validation/total_loss and its terms
    cfg.TEST.LOSS = False
    # Metric by which the best checkpoint is kept as model_best.pth: segm/AP, bbox/AP50, panoptic_seg/PQ,
    # validation/total_loss, ...; "": none is
    cfg.TEST.BEST_METRIC = ""
    # Training ends where it has not been better for so many evaluations (0: it does not)
    cfg.TEST.PATIENCE = 0

    # Evaluation sees an image in overlapping slices with this side in pixels, each of which it resizes as an image, and
    # merges what it finds in them (package sahi); 0: as a whole
    cfg.TEST.SLICE = CfgNode()
    cfg.TEST.SLICE.SIZE = 0
    # What neighbours share, in parts of the size
    cfg.TEST.SLICE.OVERLAP = 0.2

    # Inference as CUDA graphs, one for every size of a padded batch that comes more than once (SOLQ, ISDA and ISTR on
    # a GPU): the host launches one graph in place of more than a thousand kernels
    cfg.TEST.CUDA_GRAPHS = CfgNode()
    cfg.TEST.CUDA_GRAPHS.ENABLED = False
    # Sizes that are remembered; beyond, those are dropped that were not used for the longest time
    cfg.TEST.CUDA_GRAPHS.MAX_SIZES = 8
    # Height and width of a batch become multiples of it, so that there are fewer sizes (1: no more padding than without
    # graphs, and the same results; beyond, they change as with the padding of a larger batch)
    cfg.TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY = 1

    # Packages that the metrics go to, too: "wandb", "mlflow"
    cfg.TRACKERS = []

    # Write pictures of predictions beside ground truth after the final evaluation, for this many images (0: none)
    cfg.VIS_NUM_IMAGES = 8
    # Only detections with at least this score are drawn
    cfg.VIS_SCORE_THRESHOLD = 0.3
    # TrueType or OpenType file for names in pictures; where it lacks characters, or is empty, a font of the system that
    # has them is looked for
    cfg.VIS_FONT = ""

    # The command that makes the file of MODEL.WEIGHTS where no address has it; the error if it is missing names it
    cfg.MODEL.WEIGHTS_FROM = ""

    # Training keeps the inputs of layers alone (transformers, Swin, FQDet, stages of ISTR and of region heads), and
    # computes them again in the backward pass: less memory, more time
    cfg.MODEL.USE_CHECKPOINT = False
    # Height and width of a padded batch become multiples of it, and of what the method needs; 0: of the latter only.
    # The released SOLQ and EffSeg need nothing, and place the cells of a map evenly on images that are no multiple of
    # its stride, a little away from what the backbone saw there. Models learn that from images of many sizes; for those
    # that train on crops of one size, set the largest stride (32; SOLQ: 64)
    cfg.MODEL.SIZE_DIVISIBILITY = 0

    # How queries become masks. A branch has a section of its own below this one
    cfg.MODEL.MASK_BRANCH = CfgNode()
    # A registered mask branch, "none" for boxes only; "": the method's own
    cfg.MODEL.MASK_BRANCH.NAME = ""
    # Train the mask branch alone, on the backbone and detector of MODEL.WEIGHTS
    cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR = False

    # Panoptic segmentation: every pixel is of one segment or of none. Stuff is an object like a thing, one a class and
    # image. Queries are merged by the rule of EffSeg's release (common/panoptic.py), of whose thresholds these are the
    # later ones; the first were 0.9 of NMS, 0.3 of pixels, 200 of area, with 0.6 for MODEL.EFFSEG.NMS_THRESHOLD
    cfg.MODEL.PANOPTIC = CfgNode()
    cfg.MODEL.PANOPTIC.ENABLED = False
    # Classes 0 to NUM_THINGS - 1 are things, those after them are stuff, the parts of a class being one segment
    cfg.MODEL.PANOPTIC.NUM_THINGS = 80
    # Of a query's best class
    cfg.MODEL.PANOPTIC.SCORE_THRESHOLD = 0.3
    # Probability of a pixel of a query's own mask
    cfg.MODEL.PANOPTIC.MASK_THRESHOLD = 0.5
    # A query is left out whose own mask has this IoU with that of a query of higher score, whatever their classes
    cfg.MODEL.PANOPTIC.NMS_THRESHOLD = 0.75
    # A pixel goes to the query of the highest score times probability, if that probability exceeds this
    cfg.MODEL.PANOPTIC.PIXEL_THRESHOLD = 0.35
    # IoU of the pixels that a query gets with its own mask
    cfg.MODEL.PANOPTIC.AGREEMENT_THRESHOLD = 0.6
    # Number of pixels that a query gets, at the network's size
    cfg.MODEL.PANOPTIC.AREA_THRESHOLD = 150

    # How masks become vectors, for the branches that predict these (VectorBranch, CodeBranch)
    cfg.MODEL.MASK_CODING = CfgNode()
    # "dct", "sparse", "autoencoder" (SMT), "flatten" (pixels), "flatten_logits"; principal components: "pca" of logits,
    # whitened (the releases), "pca_pixels" of the pixels, not whitened (SOLQ, equation 4), "pca_linear" of the pixels
    # without their mean (ISTR, equation 3)
    cfg.MODEL.MASK_CODING.NAME = "dct"
    # Side of the coded mask, length of its vector
    cfg.MODEL.MASK_CODING.SIZE = 128
    cfg.MODEL.MASK_CODING.LENGTH = 256
    # File with the basis of a PCA or of "sparse" (tools/fit_mask_basis.py) or the weights of "autoencoder"
    # (tools/train_mask_autoencoder.py); "": it comes with the checkpoint of MODEL.WEIGHTS
    cfg.MODEL.MASK_CODING.BASIS = ""
    # "pca": noise on the labels, drawn anew for every target vector (releases; the papers have none)
    cfg.MODEL.MASK_CODING.LABEL_NOISE = True

    # Names of the classes, in order; training fills them in from its data set, and checkpoints keep them
    cfg.MODEL.CLASS_NAMES = []

    # Backbones of the package timm, build_timm_backbone and build_timm_fpn_backbone: its model, of which the maps are
    # named res2 to res5; batch norms as they are or frozen
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    cfg.MODEL.TIMM.FREEZE_NORMS = False

    # Swin transformer (Liu et al. 2021); the defaults are Swin-T
    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # Stages 0 (stride 4) to 3 (stride 32) whose normalised outputs are used, named "stage0".."stage3"
    cfg.MODEL.SWIN.OUT_FEATURES = ["stage1", "stage2", "stage3"]


def register_renamed_keys(cfg: CfgNode, renamed: Mapping[str, str | tuple[str, str]]) -> None:
    """Have an old key in a config file or on the command line name the one that took its place.

    Args:
        renamed: old key -> new key, or that and what became of the values where they changed.
    """
    for old, new in renamed.items():
        cfg.register_renamed_key(old, *([new] if isinstance(new, str) else new))
