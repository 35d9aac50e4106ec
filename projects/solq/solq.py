"""SOLQ (Dong et al., NeurIPS 2021): Deformable DETR whose queries also regress a coded mask.

Data flow (B images, L levels, Q queries, C width, N decoder layers, K entries of a mask vector)::

    images (B, 3, H, W) -> backbone C3..C5 -> projections, L levels (B, C, H_l, W_l)
      -> deformable transformer -> hidden states (N, B, Q, C)
      -> class head (N, B, Q, classes), box head (N, B, Q, 4), vector head (., K)
      -> training: matching and losses per layer; inference: best pairs of query and class, vectors decoded and pasted

Without the mask branch this is Deformable DETR. With that of ``sqr`` instead of the vector head it is the paper's
baseline.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from querymask.common.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from querymask.common.compat import has_event_storage
from querymask.common.cuda_graphs import CudaGraphs
from querymask.common.deformable_transformer import DeformableTransformer, TransformerOutput, refine_box
from querymask.common.images import has_padding, padding_mask, resize_mask
from querymask.common.layers import MLP, LevelProjections
from querymask.common.mask_coding import MaskCoding, binarize_at_half_range, build_mask_coding
from querymask.common.masks import crop_masks, instance_masks, paste_masks, stack_padded
from querymask.common.matching import Assignment, Targets
from querymask.common.meta_arch import QuerySegmenter, feature_channels, graph_arguments, image_names
from querymask.common.postprocessing import select_top_scores
from querymask.common.precision import full_precision
from querymask.common.set_criterion import cardinality_error, class_error
from querymask.common.transfer import HostCopy, instances_to_device, numbers_to_device
from querymask.solq.criterion import SOLQCriterion, SOLQOutput
from querymask.solq.sqr import SeparateMasks, SQRMaskBranch

MASK_BRANCHES = ("vector", "sqr")
CODINGS = ("dct", "pca", "sparse", "flatten", "flatten_logits")
PRIOR_PROBABILITY = 0.01
Sizes = tuple[tuple[int, int], ...]
LOGGED = ("class_error", "cardinality_error")
"""Statistics that are only logged."""
LOG_PERIOD = 20  # iterations between them


@META_ARCH_REGISTRY.register()
class SOLQ(QuerySegmenter):
    """The meta-architecture.

    Args:
        backbone: gives the maps ``in_features``.
        in_features: names of the maps, fine to coarse.
        transformer: its ``num_proposals`` decides between one-stage and two-stage form.
        num_levels: feature levels.
        num_queries, num_classes: Q and the width of the class head.
        box_refine: every decoder layer has its own heads and moves the reference.
        coding: mask coding; None: no vectors.
        vector_hidden_dim: hidden width of the vector head.
        criterion: matching and losses.
        detections_per_image: pairs of query and class that are kept.
        binarize_before_paste: threshold decoded maps at half of their range before pasting (SOLQ), or paste them soft
            and threshold once (fast SOLQ).
        pixel_mean, pixel_std: per channel, for pixels in 0..255.
        sqr_heads: attention heads of the baseline's mask branch, which takes the place of ``coding``; 0: none.
        crop_masks: cut masks of the baseline off at their boxes.
        freeze_detector: train the mask branch alone.
        graphs: see :class:`QuerySegmenter`.
        graph_divisibility: see :class:`QuerySegmenter`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        transformer: DeformableTransformer,
        num_levels: int,
        num_queries: int,
        num_classes: int,
        box_refine: bool,
        coding: MaskCoding | None,
        vector_hidden_dim: int,
        criterion: SOLQCriterion,
        detections_per_image: int,
        binarize_before_paste: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        sqr_heads: int = 0,
        crop_masks: bool = False,
        freeze_detector: bool = False,
        graphs: CudaGraphs | None = None,
        graph_divisibility: int = 1,
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std, backbone.size_divisibility, graphs, graph_divisibility)
        self.in_features = list(in_features)
        self.transformer = transformer
        self.box_refine = box_refine
        self.coding = coding
        self.criterion = criterion
        self.detections_per_image = detections_per_image
        self.binarize_before_paste = binarize_before_paste
        self.crop_masks = crop_masks
        self._unwritten: tuple[int, HostCopy] | None = None

        width = transformer.embed_dim
        two_stage = transformer.num_proposals > 0
        channels = feature_channels(backbone, self.in_features)
        self.input_proj = LevelProjections(channels, width, num_levels)
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * width)

        # With refinement one copy per layer, and one for the proposals; else one for all.
        copies = len(transformer.decoder.layers) + int(two_stage) if box_refine else 1
        self.class_embed = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(copies))
        self.bbox_embed = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(copies))
        self.vector_embed = None if coding is None else MLP(width, vector_hidden_dim, coding.length, 3)
        self.mask_branch = SQRMaskBranch(width, sqr_heads, channels) if sqr_heads else None
        self._reset_heads(two_stage)
        if freeze_detector:
            self._freeze_detector()

    def _freeze_detector(self) -> None:
        """Let nothing but the mask branch learn; dropout goes on in training."""
        self.requires_grad_(False)
        for branch in (self.vector_embed, self.mask_branch):
            if branch is not None:
                branch.requires_grad_(True)

    def _reset_heads(self, two_stage: bool) -> None:
        for head in self.class_embed:
            nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
            head.load_state_dict(self.class_embed[0].state_dict())  # copies start equal
        vector_heads = [] if self.vector_embed is None else [self.vector_embed]
        for head in [*self.bbox_embed, *vector_heads]:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for head in self.bbox_embed:
            head.load_state_dict(self.bbox_embed[0].state_dict())
        # Small boxes at first. The release does the same to the vector head, where it means nothing.
        for head in vector_heads if two_stage else [self.bbox_embed[0], *vector_heads]:
            nn.init.constant_(head.layers[-1].bias[2:], -2.0)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        solq = cfg.MODEL.SOLQ
        if solq.MASK_BRANCH not in MASK_BRANCHES:
            raise ValueError(f"MODEL.SOLQ.MASK_BRANCH is {solq.MASK_BRANCH!r}: choose one of {MASK_BRANCHES}")
        sqr = solq.MASK_ON and solq.MASK_BRANCH == "sqr"
        coding = build_coding(solq) if solq.MASK_ON and not sqr else None
        if solq.FREEZE_DETECTOR and not solq.MASK_ON:
            raise ValueError("MODEL.SOLQ.FREEZE_DETECTOR leaves nothing to train where MASK_ON is False: set it False")
        if solq.PASTE not in ("binary", "soft"):
            raise ValueError(f"MODEL.SOLQ.PASTE is {solq.PASTE!r}: choose 'binary' or 'soft'")
        return {
            "backbone": build_backbone(cfg),
            "in_features": solq.IN_FEATURES,
            "transformer": DeformableTransformer.from_section(solq, solq.NUM_QUERIES if solq.TWO_STAGE else 0),
            "num_levels": solq.NUM_FEATURE_LEVELS,
            "num_queries": solq.NUM_QUERIES,
            "num_classes": solq.NUM_CLASSES,
            "box_refine": solq.BOX_REFINE,
            "coding": coding,
            "vector_hidden_dim": solq.VECTOR_HIDDEN_DIM,
            "criterion": SOLQCriterion(
                costs={"class": solq.COST_CLASS, "bbox": solq.COST_BBOX, "giou": solq.COST_GIOU},
                weights={
                    "loss_ce": solq.CLASS_WEIGHT,
                    "loss_bbox": solq.BBOX_WEIGHT,
                    "loss_giou": solq.GIOU_WEIGHT,
                    "loss_mask": solq.SQR_MASK_WEIGHT,
                    "loss_dice": solq.SQR_DICE_WEIGHT,
                },
                focal_alpha=solq.FOCAL_ALPHA,
                vector_weight=solq.VECTOR_WEIGHT,
                vector_start_layer=solq.VECTOR_START_LAYER,
                vector_loss=solq.VECTOR_LOSS,
                vector_reduction=solq.VECTOR_LOSS_REDUCTION,
            ),
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "binarize_before_paste": solq.PASTE == "binary",
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "sqr_heads": solq.NUM_HEADS if sqr else 0,
            "crop_masks": solq.SQR_CROP_MASKS,
            "freeze_detector": solq.FREEZE_DETECTOR,
            **graph_arguments(cfg),
        }

    def training_losses(
        self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch of normalised images."""
        decoded, outputs = self.predict(images)
        targets = self.encode_targets(batched_inputs, outputs.boxes.dtype)
        assignments = self.match(decoded, outputs, targets)
        self._log_statistics(decoded, outputs, targets, assignments[0])
        return self.criterion.weigh(self.losses(decoded, outputs, targets, assignments))

    def inference(self, images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of every image, scaled to (height, width) of ``sizes``."""
        outputs: SOLQOutput = self.predict_for_inference(images)[1]
        return self.detect(outputs, sizes)

    def network_inputs(self, images: ImageList) -> tuple[torch.Tensor, torch.Tensor, bool, Sizes]:
        """Arguments of ``network``."""
        sizes = () if self.mask_branch is None else tuple((height, width) for height, width in images.image_sizes)
        return images.tensor, padding_mask(images), has_padding(images), sizes

    def network(
        self, images: torch.Tensor, padding: torch.Tensor, padded: bool, image_sizes: Sizes
    ) -> tuple[TransformerOutput, SOLQOutput]:
        """From normalised images to predictions.

        Args:
            images: (B, 3, H, W).
            padding: (B, H, W) bool, true on padding.
            padded: false if there is no padding; saves masking.
            image_sizes: (height, width) of every image without padding, for the SQR baseline alone.
        """
        features = self.backbone(images)
        levels = self.input_proj([features[name] for name in self.in_features])
        masks = [resize_mask(padding, level.shape[-2:]) for level in levels]
        decoded = self.transformer(
            levels,
            masks,
            None if self.query_embed is None else self.query_embed.weight,
            refine=self._refine if self.box_refine else None,
            proposal_heads=(self.class_embed[-1], self.bbox_embed[-1]),
            padded=padded,
        )
        if self.box_refine:
            logits = torch.stack([head(x) for head, x in zip(self.class_embed, decoded.hidden, strict=False)])
            boxes = decoded.boxes
        else:
            logits = self.class_embed[0](decoded.hidden)
            boxes = self._refine(0, decoded.hidden, decoded.references[0])
        outputs = SOLQOutput(logits, boxes, decoded.hidden, self.vector_embed, self.coding)
        if self.mask_branch is not None:
            height, width = decoded.shapes[-1]
            context = self.mask_branch.prepare(
                [features[name] for name in self.in_features],
                levels[-1],
                decoded.memory[:, -height * width :],
                masks[-1],
            )
            size = (images.shape[-2], images.shape[-1])
            outputs.masks = SeparateMasks(self.mask_branch, context, decoded.hidden[-1], size, image_sizes)
        return decoded, outputs

    def _refine(self, layer: int, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return refine_box(full_precision(self.bbox_embed[layer](hidden)), reference)

    def encode_targets(self, batched_inputs: Sequence[Mapping[str, Any]], dtype: torch.dtype) -> Targets:
        """Ground truth of a batch: normalised boxes, and masks coded once for all decoder layers or whole."""
        counts, labels, boxes, crops, masks = [], [], [], [], []
        for item in batched_inputs:
            instances = instances_to_device(item["instances"], self.device)
            height, width = instances.image_size
            corners = instances.gt_boxes.tensor
            counts.append(len(instances))
            labels.append(instances.gt_classes)
            sides = numbers_to_device([width, height, width, height], corners.dtype, corners.device)
            boxes.append(xyxy_to_cxcywh(corners.to(dtype)) / sides)
            if self.coding is not None:
                crops.append(crop_masks(instance_masks(instances), corners, self.coding.mask_size))
            elif self.mask_branch is not None:
                masks.append(instance_masks(instances))
        fields = {"boxes": torch.cat(boxes)}
        if self.coding is not None:
            fields["crops"] = torch.cat(crops)
            if not self.coding.is_random:
                fields["vectors"] = self.coding.encode(fields["crops"]).to(dtype)
        elif self.mask_branch is not None:
            fields["masks"] = stack_padded(masks)
        return Targets(counts, torch.cat(labels), fields, image_names(batched_inputs))

    def match(self, decoded: TransformerOutput, outputs: SOLQOutput, targets: Targets) -> list[Assignment]:
        """The assignment of all decoder layers and, in the two-stage form, that of the proposals."""
        pairs = [(outputs, targets)]
        if decoded.proposals is not None:
            pairs.append(self.as_detections(decoded, targets))
        return self.criterion.match_all(pairs)

    def losses(
        self,
        decoded: TransformerOutput,
        outputs: SOLQOutput,
        targets: Targets,
        assignments: Sequence[Assignment] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of all decoder layers and, in the two-stage form, of the proposals (suffix ``_enc``), unweighted.

        Args:
            assignments: of ``match``; None: made here.
        """
        assignments = assignments or self.match(decoded, outputs, targets)
        losses = self.criterion(outputs, targets, assignments[0])
        if decoded.proposals is not None:
            proposal_losses = self.criterion(*self.as_detections(decoded, targets), assignments[1])
            losses.update({f"{name}_enc": value for name, value in proposal_losses.items()})
        return losses

    def as_detections(self, decoded: TransformerOutput, targets: Targets) -> tuple[SOLQOutput, Targets]:
        """The proposals as one layer's predictions without masks, and targets whose class is always 0."""
        proposals = decoded.proposals
        assert proposals is not None
        anything = Targets(targets.counts, torch.zeros_like(targets.labels), targets.fields, targets.images)
        return SOLQOutput(proposals.logits[None], proposals.boxes[None], decoded.memory[None]), anything

    @torch.no_grad()
    def statistics(
        self,
        decoded: TransformerOutput,
        outputs: SOLQOutput,
        targets: Targets,
        assignment: Assignment | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the release logs beside the losses: errors of class and cardinality, named like losses."""
        assignment = assignment or self.criterion.match(outputs, targets)
        named = {"class_error": class_error(outputs.logits, targets.labels, assignment)}
        *auxiliary, final = cardinality_error(outputs.logits, targets.counts).unbind()
        named["cardinality_error"] = final
        named.update({f"cardinality_error_{layer}": value for layer, value in enumerate(auxiliary)})
        if decoded.proposals is not None:
            named["cardinality_error_enc"] = cardinality_error(decoded.proposals.logits[None], targets.counts)[0]
        return named

    def _log_statistics(
        self, decoded: TransformerOutput, outputs: SOLQOutput, targets: Targets, assignment: Assignment
    ) -> None:
        if not has_event_storage():
            return
        self._write_statistics()
        if (iteration := get_event_storage().iter) % LOG_PERIOD == 0:
            named = self.statistics(decoded, outputs, targets, assignment)
            self._unwritten = iteration, HostCopy(torch.stack([named[name] for name in LOGGED]))
            if outputs.logits.device.type == "cpu":
                self._write_statistics()

    def _write_statistics(self) -> None:
        """Those of the last time that are not yet in the storage: on a GPU, read at once they would make it wait."""
        if self._unwritten is None:
            return
        (iteration, values), self._unwritten = self._unwritten, None
        storage = get_event_storage()
        now, storage.iter = storage.iter, iteration
        storage.put_scalars(smoothing_hint=False, **dict(zip(LOGGED, values.read().tolist(), strict=True)))
        storage.iter = now

    def detect(self, outputs: SOLQOutput, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of the last layer.

        Args:
            outputs: of ``predict``.
            sizes: (height, width) of every image to which boxes and masks are scaled.

        Returns:
            per image ``pred_boxes`` (not clipped), ``scores``, ``pred_classes``, ``pred_queries`` and, with a mask
            branch, ``pred_masks``.
        """
        results = []
        all_scores = full_precision(outputs.logits[-1]).sigmoid()
        for image, (height, width) in enumerate(sizes):
            scores, queries, classes = select_top_scores(all_scores[image], self.detections_per_image)
            boxes = cxcywh_to_xyxy(outputs.boxes[-1, image, queries])
            boxes = boxes * numbers_to_device([width, height, width, height], boxes.dtype, boxes.device)
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = scores
            instances.pred_classes = classes
            instances.pred_queries = queries
            if outputs.masks is not None:
                inside = boxes if self.crop_masks else None
                instances.pred_masks = outputs.masks.detected(image, queries, (height, width), inside)
            elif self.coding is not None and outputs.vector_head is not None:
                vectors = full_precision(outputs.vector_head(outputs.hidden[-1, image, queries]))
                maps = self.coding.decode(vectors)
                if self.binarize_before_paste:
                    maps = binarize_at_half_range(maps)
                instances.pred_masks = paste_masks(maps, boxes, height, width, threshold=0.5)
            results.append(instances)
        return results


def build_coding(solq: CfgNode) -> MaskCoding:
    """The coding that ``MODEL.SOLQ.MASK_CODING`` names.

    Raises:
        ValueError: it is none that SOLQ can have, or another value does not go with it.
    """
    if solq.MASK_CODING not in CODINGS:  # the autoencoder, whose decoder learns, would need a loss of its own
        raise ValueError(f"MODEL.SOLQ.MASK_CODING is {solq.MASK_CODING!r}: choose one of {', '.join(CODINGS)}")
    return build_mask_coding(
        solq.MASK_CODING,
        solq.MASK_SIZE,
        solq.VECTOR_LENGTH,
        section="MODEL.SOLQ",
        basis=solq.MASK_BASIS,
        label_noise=solq.LABEL_NOISE,
    )
