"""ISTR (Hu et al. 2021): query boxes that are refined stage by stage, each with a coded mask.

Data flow (B images, Q queries, C width, N stages, K entries of a mask vector)::

    images (B, 3, H, W) -> ResNet and feature pyramid p2..p5 (B, C, H_l, W_l)
      -> queries: image feature + position embedding (B, Q, C); boxes: learned (B, Q, 4)
      -> N stages, each: crops at the boxes -> attention -> class, refined box, object feature -> next stage
      -> mask head: object feature, or a crop at the refined box, -> mask vector (., K)
      -> training: matching and losses per stage; inference: best pairs of query and class, vectors decoded and pasted
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from querymask.common.boxes import cxcywh_to_xyxy
from querymask.common.cuda_graphs import CudaGraphs
from querymask.common.mask_coding import MaskCoding, build_mask_coding
from querymask.common.masks import crop_masks, instance_masks, paste_masks
from querymask.common.meta_arch import QuerySegmenter, graph_arguments, image_names
from querymask.common.postprocessing import select_top_scores
from querymask.common.precision import full_precision
from querymask.common.roi_pooling import FeaturePyramid
from querymask.common.transfer import instances_to_device, numbers_to_device, to_device
from querymask.istr.criterion import ISTRCriterion, ISTROutput, ISTRTargets, check_mask_cost
from querymask.istr.mask_head import MaskCode, build_mask_head
from querymask.istr.stage import RefinementStage

PRIOR_PROBABILITY = 0.01


@META_ARCH_REGISTRY.register()
class ISTR(QuerySegmenter):
    """The meta-architecture.

    Args:
        backbone: gives the pyramid's levels ``in_features``, all of the stages' width.
        in_features: names of the levels, fine to coarse.
        stages: the refinement stages; their mask heads are all None without ``coding``.
        num_queries: Q.
        use_image_feature, use_position: what queries consist of.
        query_pooling: "mean" or "max" of a level, for the image feature.
        stage_input: queries of a stage are the "previous" one's object features or the "initial" ones.
        coding: mask coding; None: no mask branch.
        criterion: matching and losses.
        detections_per_image: pairs of query and class that are kept.
        first_scored_stage: scores are those of the mean logits from this stage on; negative: counted from the end.
        paste_threshold: foreground of a pasted mask is what reaches it.
        pixel_mean, pixel_std: per channel, for pixels in 0..255.
        graphs: see :class:`QuerySegmenter`.
        graph_divisibility: see :class:`QuerySegmenter`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        stages: Sequence[RefinementStage],
        num_queries: int,
        use_image_feature: bool,
        use_position: bool,
        query_pooling: str,
        stage_input: str,
        coding: MaskCoding | None,
        criterion: ISTRCriterion,
        detections_per_image: int,
        first_scored_stage: int,
        paste_threshold: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        graphs: CudaGraphs | None = None,
        graph_divisibility: int = 1,
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std, backbone.size_divisibility, graphs, graph_divisibility)
        for key, value, choices in (
            ("QUERY_POOLING", query_pooling, ("mean", "max")),
            ("STAGE_INPUT", stage_input, ("previous", "initial")),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.ISTR.{key} is {value!r}: choose one of {', '.join(choices)}")
        if not (use_image_feature or use_position):
            raise ValueError("all queries would be zero: set MODEL.ISTR.USE_IMAGE_FEATURE or MODEL.ISTR.USE_POSITION")
        self.in_features = list(in_features)
        width = stages[0].linear1.in_features
        self.strides = _strides(backbone, self.in_features, width)
        self.num_queries = num_queries
        self.use_image_feature = use_image_feature
        self.query_pooling = query_pooling
        self.stage_input = stage_input
        self.pos_embeddings = nn.Embedding(num_queries, width) if use_position else None
        self.init_proposal_boxes = nn.Embedding(num_queries, 4)
        self.stages = nn.ModuleList(stages)
        self.coding = coding
        self.criterion = criterion
        self.detections_per_image = detections_per_image
        self.first_scored_stage = first_scored_stage
        self.paste_threshold = paste_threshold
        self._reset_parameters()
        if not criterion.deep_supervision:
            self._freeze_unsupervised()

    def _reset_parameters(self) -> None:
        for parameter in self.stages.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.criterion.classifier == "sigmoid":
            for stage in self.stages:
                nn.init.constant_(stage.class_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        with torch.no_grad():  # every query starts with the whole image
            self.init_proposal_boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))

    def _freeze_unsupervised(self) -> None:
        """Without losses of their own, earlier stages' heads get no gradient, as boxes carry none to the next stage."""
        for stage in self.stages[:-1]:
            for module in stage.heads() if self.stage_input == "previous" else [stage]:
                module.requires_grad_(False)
        self.init_proposal_boxes.requires_grad_(len(self.stages) == 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        istr = cfg.MODEL.ISTR
        coding = None
        if istr.MASK_ON:
            coding = build_mask_coding(
                istr.MASK_CODING,
                istr.MASK_SIZE,
                istr.VECTOR_LENGTH,
                section="MODEL.ISTR",
                basis=istr.MASK_BASIS,
                label_noise=istr.LABEL_NOISE,
            )
            check_mask_cost(istr.MASK_COST, coding)
        return {
            "backbone": build_backbone(cfg),
            "in_features": istr.IN_FEATURES,
            "stages": [build_stage(istr, coding) for _ in range(istr.NUM_STAGES)],
            "num_queries": istr.NUM_QUERIES,
            "use_image_feature": istr.USE_IMAGE_FEATURE,
            "use_position": istr.USE_POSITION,
            "query_pooling": istr.QUERY_POOLING,
            "stage_input": istr.STAGE_INPUT,
            "coding": coding,
            "criterion": ISTRCriterion(
                costs={
                    "class": istr.COST_CLASS,
                    "bbox": istr.COST_BBOX,
                    "giou": istr.COST_GIOU,
                    "mask": istr.COST_MASK,
                },
                weights={
                    "loss_ce": istr.CLASS_WEIGHT,
                    "loss_bbox": istr.BBOX_WEIGHT,
                    "loss_giou": istr.GIOU_WEIGHT,
                    "loss_vector": istr.VECTOR_WEIGHT,
                    "loss_dice": istr.DICE_WEIGHT,
                },
                classifier=istr.CLASSIFIER,
                focal_alpha=istr.FOCAL_ALPHA,
                no_object_weight=istr.NO_OBJECT_WEIGHT,
                mask_cost=istr.MASK_COST,
                vector_loss=istr.VECTOR_LOSS,
                mask_target=istr.MASK_TARGET,
                deep_supervision=istr.DEEP_SUPERVISION,
            ),
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "first_scored_stage": istr.FIRST_SCORED_STAGE,
            "paste_threshold": istr.PASTE_THRESHOLD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **graph_arguments(cfg),
        }

    def training_losses(
        self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch of normalised images."""
        outputs = self.predict(images)
        targets = self.encode_targets(batched_inputs, outputs.boxes.dtype)
        return self.criterion.weigh(self.criterion(outputs, targets))

    def inference(self, images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of every image, scaled to (height, width) of ``sizes``."""
        return self.detect(self.predict_for_inference(images), sizes)

    def network_inputs(self, images: ImageList) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of ``network``."""
        sides = [[width, height, width, height] for height, width in images.image_sizes]
        return images.tensor, numbers_to_device(sides, self.init_proposal_boxes.weight.dtype, self.device)

    def network(self, images: torch.Tensor, scale: torch.Tensor) -> ISTROutput:
        """From normalised images to predictions.

        Args:
            images: (B, 3, H, W).
            scale: (B, 4) width, height, width, height of the images without padding.
        """
        levels = self.backbone(images)
        maps = [levels[name] for name in self.in_features]
        pyramid = FeaturePyramid(maps, self.strides)

        queries = self.initial_queries(maps)
        boxes = cxcywh_to_xyxy(self.init_proposal_boxes.weight) * scale[:, None]
        features, outputs = queries, []
        for stage in self.stages:
            outputs.append(stage(pyramid, boxes, features))
            boxes = outputs[-1].boxes.detach()
            features = outputs[-1].features if self.stage_input == "previous" else queries
        result = ISTROutput(
            logits=torch.stack([output.logits for output in outputs]),
            boxes=torch.stack([output.boxes for output in outputs]),
            features=torch.stack([output.features for output in outputs]),
            scale=scale,
            pyramid=pyramid,
            mask_heads=[stage.mask_head for stage in self.stages],
            coding=self.coding,
        )
        if self.training and self.coding is not None and self._needs_all_codes():
            result.codes = self.all_codes(result)
        return result

    def initial_queries(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """P + E (B, Q, C) (equation 10): the sum of the pooled levels, padding included, and the position embedding."""
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        queries = maps[0].new_zeros((len(maps[0]), self.num_queries, maps[0].shape[1]), dtype=dtype)
        if self.use_image_feature:
            pooled = [x.mean((2, 3), dtype=dtype) if self.query_pooling == "mean" else x.amax((2, 3)) for x in maps]
            queries = queries + torch.stack(pooled).sum(0, dtype=dtype)[:, None]
        if self.pos_embeddings is not None:
            queries = queries + self.pos_embeddings.weight
        return queries

    def _needs_all_codes(self) -> bool:
        """Whether matching or batch norms need the codes of queries that are not matched."""
        return self.criterion.mask_cost != "none" or self.stages[0].mask_head.uses_batch_statistics

    def all_codes(self, outputs: ISTROutput) -> list[MaskCode]:
        """Mask codes of all queries, per stage; only the last stage's where the others have no loss."""
        batch = outputs.logits.shape[1]
        images = torch.arange(batch, device=self.device)[:, None].expand(-1, self.num_queries).flatten()
        codes = []
        for stage, (head, features, boxes) in enumerate(
            zip(outputs.mask_heads, outputs.features, outputs.boxes, strict=True)
        ):
            if self.criterion.deep_supervision or stage == len(self.stages) - 1:
                codes.append(head(features.flatten(0, 1), boxes.flatten(0, 1), images, outputs.pyramid))
        return codes

    def encode_targets(self, batched_inputs: Sequence[Mapping[str, Any]], dtype: torch.dtype) -> ISTRTargets:
        """Ground truth of a batch: relative boxes, cut-out masks and, where they are always the same, their vectors."""
        counts, labels, boxes, all_masks, crops = [], [], [], [], []
        for item in batched_inputs:
            instances = instances_to_device(item["instances"], self.device)
            height, width = instances.image_size
            corners = instances.gt_boxes.tensor
            counts.append(len(instances))
            labels.append(instances.gt_classes)
            boxes.append(corners.to(dtype) / numbers_to_device([width, height, width, height], dtype, corners.device))
            if self.coding is not None:
                masks = instance_masks(instances)
                all_masks.append(masks)
                crops.append(crop_masks(masks, corners, self.coding.mask_size))
        fields = {"boxes": torch.cat(boxes)}
        if self.coding is not None:
            fields["crops"] = torch.cat(crops)
            if not self.coding.is_random and not self.coding.uses_batch_statistics:
                fields["vectors"] = self.coding.encode(fields["crops"]).to(dtype)
        return ISTRTargets(counts, torch.cat(labels), fields, image_names(batched_inputs), masks=all_masks)

    def detect(
        self, outputs: ISTROutput, sizes: Sequence[tuple[int, int]], stage: int | None = None
    ) -> list[Instances]:
        """Detections of the last stage, or of another one for analysis.

        Args:
            outputs: of ``predict``.
            sizes: (height, width) of every image to which boxes and masks are scaled.
            stage: whose boxes, masks and scores count; None: the last one, with the scores that the config asks for.

        Returns:
            per image ``pred_boxes`` (clipped; empty ones are left out), ``scores``, ``pred_classes``, ``pred_queries``
            and, with a mask branch, ``pred_masks``.
        """
        results = []
        all_scores = self.scores(outputs, stage)
        stage = -1 if stage is None else stage
        for image, (height, width) in enumerate(sizes):
            scores, queries, classes = select_top_scores(all_scores[image], self.detections_per_image)
            sides = numbers_to_device([width, height, width, height], outputs.scale.dtype, outputs.scale.device)
            scaling = sides / outputs.scale[image]
            # On the host, where they are looked at twice, and which must know how many remain
            boxes = Boxes((outputs.boxes[stage, image, queries] * scaling).cpu())
            boxes.clip((height, width))
            boxes = boxes[nonempty := boxes.nonempty()]
            kept = to_device(nonempty.nonzero().flatten(), queries.device)
            queries = queries[kept]
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(to_device(boxes.tensor, queries.device))
            instances.scores = scores[kept]
            instances.pred_classes = classes[kept]
            instances.pred_queries = queries
            if self.coding is not None:
                code = outputs.mask_code(stage, torch.full_like(queries, image), queries)
                maps = code.decode(self.coding)
                instances.pred_masks = paste_masks(
                    maps, instances.pred_boxes.tensor, height, width, self.paste_threshold
                )
            results.append(instances)
        return results

    def scores(self, outputs: ISTROutput, stage: int | None = None) -> torch.Tensor:
        """Scores (B, Q, classes) of one stage, or of the mean logits that count."""
        number = len(outputs.logits)
        if stage is not None:
            logits = outputs.logits[stage]
        else:
            first = self.first_scored_stage
            first = max(number + first, 0) if first < 0 else min(first, number - 1)
            logits = full_precision(outputs.logits[first:]).mean(0)
        logits = full_precision(logits)
        return logits.sigmoid() if self.criterion.classifier == "sigmoid" else logits.softmax(-1)[..., :-1]


def _strides(backbone: Backbone, in_features: Sequence[str], width: int) -> list[int]:
    """Strides of the pyramid's levels, which must be there and have the stages' width."""
    shapes = backbone.output_shape()
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.ISTR.IN_FEATURES names {missing}, but the backbone gives {sorted(shapes)}: use a backbone with a "
            "feature pyramid, such as build_resnet_fpn_backbone, and name some of its levels"
        )
    other = {shapes[name].channels for name in in_features} - {width}
    if other:
        raise ValueError(
            f"MODEL.ISTR.HIDDEN_DIM is {width}, but the pyramid has {sorted(other)} channels: set "
            "MODEL.FPN.OUT_CHANNELS to the same"
        )
    return [shapes[name].stride for name in in_features]


def build_stage(istr: CfgNode, coding: MaskCoding | None) -> RefinementStage:
    """One stage as ``MODEL.ISTR`` describes it."""
    mask_head = None
    if coding is not None:
        mask_head = build_mask_head(istr.MASK_HEAD, coding, istr.HIDDEN_DIM, istr.HEAD_LAYERS, istr.MASK_POOL_SIZE)
    return RefinementStage(
        width=istr.HIDDEN_DIM,
        num_heads=istr.NUM_HEADS,
        dim_feedforward=istr.DIM_FEEDFORWARD,
        pool_size=istr.POOL_SIZE,
        attention=istr.ATTENTION,
        dim_dynamic=istr.DIM_DYNAMIC,
        num_logits=istr.NUM_CLASSES + int(istr.CLASSIFIER == "softmax"),
        num_head_layers=istr.HEAD_LAYERS,
        dropout=istr.DROPOUT,
        mask_head=mask_head,
    )
