"""ISDA (Ying et al. 2022): a transformer's queries make position-aware kernels, and those make masks. No boxes, no NMS.

Data flow (B images, L levels, Q queries, C width, N decoder layers, K classes)::

    images (B, 3, H, W), padded to multiples of the coarsest backbone stride
      -> backbone C2..C5 -> projections P2..P6
      -> P3..P6: deformable transformer -> hidden states (N, B, Q, C), reference points (B, Q, 2)
      -> P2..P5: mask feature head -> mask features (B, C, H / 4, W / 4)
      -> class head (N, B, Q, K); kernel head, reference points appended (N, B, Q, C)
      -> training: matching by class and soft IoU, losses per layer
      -> inference: best pairs of query and class, their kernels times the mask features, score times maskness
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import nn

from querymask.common.boxes import inverse_sigmoid
from querymask.common.cuda_graphs import CudaGraphs
from querymask.common.deformable_transformer import DeformableTransformer, TransformerOutput
from querymask.common.images import has_padding, padding_mask, resize_mask
from querymask.common.layers import MLP, LevelProjections
from querymask.common.masks import instance_masks
from querymask.common.matching import Targets
from querymask.common.meta_arch import QuerySegmenter, feature_channels, graph_arguments, image_names
from querymask.common.postprocessing import select_top_scores
from querymask.common.precision import full_precision
from querymask.common.transfer import instances_to_device
from querymask.isda.criterion import ISDACriterion, ISDAOutput
from querymask.isda.mask_features import MaskFeatureHead
from querymask.isda.masks import mask_logits, maskness, reduce_masks, resize_masks

PRIOR_PROBABILITY = 0.01
KERNEL_POSITIONS = ("logit", "point", "none")
MASK_STRIDES = (2, 4, 8)


@META_ARCH_REGISTRY.register()
class ISDA(QuerySegmenter):
    """The meta-architecture.

    Args:
        backbone: gives the maps ``in_features``.
        in_features: names of the maps, fine to coarse; the first goes to the mask features only.
        transformer: one-stage.
        num_levels: levels of the transformer.
        num_queries, num_classes: Q and K.
        kernel_fcs: hidden layers of the kernel head.
        kernel_positions: what the last two entries of a kernel are: the reference point's "logit", the "point", or
            "none": the kernel head makes all entries.
        mask_stride: image size over that of the mask features.
        mask_feature_dim: channels inside the mask feature head.
        mask_positions: coordinate channels in the mask feature head.
        criterion: matching and losses.
        detections_per_image: pairs of query and class that are kept.
        maskness_threshold: probabilities above it count for a mask's score.
        mask_threshold: foreground of the final masks.
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
        transformer: DeformableTransformer,
        num_levels: int,
        num_queries: int,
        num_classes: int,
        kernel_fcs: int,
        kernel_positions: str,
        mask_stride: int,
        mask_feature_dim: int,
        mask_positions: bool,
        criterion: ISDACriterion,
        detections_per_image: int,
        maskness_threshold: float,
        mask_threshold: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        graphs: CudaGraphs | None = None,
        graph_divisibility: int = 1,
    ) -> None:
        fine_channels, *channels = feature_channels(backbone, in_features)
        strides = [backbone.output_shape()[name].stride for name in in_features]
        if kernel_positions not in KERNEL_POSITIONS:
            raise ValueError(f"MODEL.ISDA.KERNEL_POSITIONS is {kernel_positions!r}: choose one of {KERNEL_POSITIONS}")
        if mask_stride not in MASK_STRIDES:
            raise ValueError(f"MODEL.ISDA.MASK_STRIDE is {mask_stride}: choose one of {MASK_STRIDES}")
        super().__init__(backbone, pixel_mean, pixel_std, strides[-1], graphs, graph_divisibility)
        self.in_features = list(in_features)
        self.transformer = transformer
        self.kernel_positions = kernel_positions
        self.mask_stride = mask_stride
        self.criterion = criterion
        self.detections_per_image = detections_per_image
        self.maskness_threshold = maskness_threshold
        self.mask_threshold = mask_threshold

        width = transformer.embed_dim
        self.fine_proj = LevelProjections([fine_channels], width, 1, bias=False)
        self.input_proj = LevelProjections(channels, width, num_levels, bias=False)
        self.use_fine = mask_stride <= strides[0]
        # The model keeps a projection that it does not use, as the release does; it must not wait for gradients
        self.fine_proj.requires_grad_(self.use_fine)
        mask_strides = strides if self.use_fine else strides[1:]
        self.mask_features = MaskFeatureHead(width, mask_strides, mask_stride, mask_feature_dim, width, mask_positions)
        self.query_embed = nn.Embedding(num_queries, 2 * width)
        self.class_embed = nn.Linear(width, num_classes)
        nn.init.constant_(self.class_embed.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self.kernel_embed = MLP(width, width, width if kernel_positions == "none" else width - 2, kernel_fcs + 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor."""
        isda = cfg.MODEL.ISDA
        return {
            "backbone": build_backbone(cfg),
            "in_features": isda.IN_FEATURES,
            "transformer": DeformableTransformer.from_section(isda),
            "num_levels": isda.NUM_FEATURE_LEVELS,
            "num_queries": isda.NUM_QUERIES,
            "num_classes": isda.NUM_CLASSES,
            "kernel_fcs": isda.KERNEL_FCS,
            "kernel_positions": isda.KERNEL_POSITIONS,
            "mask_stride": isda.MASK_STRIDE,
            "mask_feature_dim": isda.MASK_FEATURE_DIM,
            "mask_positions": isda.MASK_POSITIONS,
            "criterion": ISDACriterion(
                costs={"class": isda.COST_CLASS, "mask": isda.COST_MASK},
                weights={"loss_cls": isda.CLASS_WEIGHT, "loss_mask": isda.MASK_WEIGHT},
                focal_alpha=isda.FOCAL_ALPHA,
                mask_loss=isda.MASK_LOSS,
            ),
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "maskness_threshold": isda.MASKNESS_THRESHOLD,
            "mask_threshold": isda.MASK_THRESHOLD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **graph_arguments(cfg),
        }

    def training_losses(
        self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch of normalised images."""
        outputs = self.predict(images)[1]
        return self.criterion.weigh(self.criterion(outputs, self.encode_targets(batched_inputs, outputs)))

    def inference(self, images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of every image, scaled to (height, width) of ``sizes``."""
        return self.detect(self.predict_for_inference(images)[1], images.image_sizes, sizes)

    def network_inputs(self, images: ImageList) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Arguments of ``network``."""
        return images.tensor, padding_mask(images), has_padding(images)

    def network(
        self, images: torch.Tensor, padding: torch.Tensor, padded: bool
    ) -> tuple[TransformerOutput, ISDAOutput]:
        """From normalised images to predictions.

        Args:
            images: (B, 3, H, W).
            padding: (B, H, W) bool, true on padding.
            padded: false if there is no padding; saves masking.
        """
        features = self.backbone(images)
        fine, *coarse = [features[name] for name in self.in_features]
        levels = self.input_proj(coarse)
        pyramid = levels[: len(coarse)]
        mask_features = self.mask_features([*self.fine_proj([fine]), *pyramid] if self.use_fine else pyramid)

        decoded = self.transformer(
            levels,
            [resize_mask(padding, level.shape[-2:]) for level in levels],
            self.query_embed.weight,
            padded=padded,
        )
        references = decoded.references[0]
        kernels = self.make_kernels(decoded.hidden, references)
        return decoded, ISDAOutput(self.class_embed(decoded.hidden), kernels, mask_features, references)

    def make_kernels(self, hidden: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Position-aware kernels.

        Gradients reach the reference points through the kernels, too.

        Args:
            hidden: (N, B, Q, C).
            references: (B, Q, 2) in [0, 1].

        Returns:
            (N, B, Q, C).
        """
        kernels = full_precision(self.kernel_embed(hidden))
        if self.kernel_positions == "none":
            return kernels
        positions = inverse_sigmoid(references) if self.kernel_positions == "logit" else references
        return torch.cat((kernels, positions.expand(*kernels.shape[:-1], 2)), dim=-1)

    def encode_targets(self, batched_inputs: Sequence[Mapping[str, Any]], outputs: ISDAOutput) -> Targets:
        """Ground truth of a batch: classes, and masks at the resolution of the mask features."""
        size = tuple(outputs.mask_features.shape[-2:])
        dtype = full_precision(outputs.logits).dtype
        counts, labels, masks = [], [], []
        for item in batched_inputs:
            instances = instances_to_device(item["instances"], self.device)
            counts.append(len(instances))
            labels.append(instances.gt_classes)
            masks.append(reduce_masks(instance_masks(instances), self.mask_stride, size, dtype))
        return Targets(counts, torch.cat(labels), {"masks": torch.cat(masks)}, image_names(batched_inputs))

    def detect(
        self, outputs: ISDAOutput, image_sizes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections of the last layer; an image gets what it would get in another batch with the same outputs.

        Args:
            outputs: of ``predict``.
            image_sizes: (height, width) of every image within the batch, without padding.
            sizes: (height, width) of every image to which masks are scaled.

        Returns:
            per image ``scores`` (class probability times maskness), ``pred_classes``, ``pred_masks`` and
            ``pred_queries``, by descending class probability; no boxes. An empty mask is kept with score 0.
        """
        results = []
        class_scores = full_precision(outputs.logits[-1]).sigmoid()
        for image, (image_size, size) in enumerate(zip(image_sizes, sizes, strict=True)):
            scores, queries, classes = select_top_scores(class_scores[image], self.detections_per_image)
            logits = mask_logits(outputs.kernels[-1, image, queries], outputs.mask_features[image])
            probabilities = full_precision(logits).sigmoid()
            instances = Instances(tuple(size))
            instances.scores = scores * maskness(probabilities, self.maskness_threshold)
            instances.pred_classes = classes
            instances.pred_queries = queries
            instances.pred_masks = resize_masks(
                probabilities, self.mask_stride, tuple(image_size), tuple(size), self.mask_threshold
            )
            results.append(instances)
        return results
