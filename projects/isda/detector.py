"""ISDA's detector: the decoder of Deformable DETR without boxes (Ying et al. 2022, section 3).

Data flow (B images, Q queries, C width, N decoder layers, K classes)::

    maps C2..C5 of the backbone -> projections P2..P6
    P3..P6 -> deformable transformer -> hidden states (N, B, Q, C), reference points (B, Q, 2)
      -> class head (N, B, Q, K)

Queries are told apart by their masks: the matching costs of a mask branch take the place of those of boxes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.deformable_transformer import DeformableTransformer
from querymask.common.detector import select_top_scores
from querymask.common.images import Canvas, resize_padding
from querymask.common.layers import LevelProjections
from querymask.common.losses import PRIOR_LOGIT
from querymask.common.meta_arch import feature_shapes
from querymask.common.precision import full_precision
from querymask.common.predictions import Predictions
from querymask.common.pyramid import FeaturePyramid
from querymask.common.set_criterion import SetDetector
from querymask.isda.criterion import ClassCriterion


@dataclass
class BoxFreePredictions(Predictions):
    """Of all decoder layers.

    Attributes:
        references: (B, Q, 2) reference points x, y in [0, 1] of the images without padding, the same for all layers.
        memory: (B, S, C) what the encoder makes of the levels.
    """

    references: Tensor = None  # type: ignore[assignment]  # dataclasses ask for a default behind defaults
    memory: Tensor | None = None

    def positions(self) -> Tensor:
        """The reference points (1, B, Q, 2), which learn from where they are used."""
        return self.references[None]


class BoxFreeDETR(SetDetector):
    """The detector.

    Args:
        in_features: names of the backbone's maps, fine to coarse; the first goes to the pyramid only.
        shapes: of the backbone's maps.
        transformer: one-stage.
        num_levels: levels of the transformer.
        num_queries, num_classes: Q and K.
        use_fine: the pyramid has the finest map.
        criterion: matching and losses.
        detections_per_image: pairs of query and class that are kept.
    """

    has_boxes = False

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        shapes: Mapping[str, ShapeSpec],
        transformer: DeformableTransformer,
        num_levels: int,
        num_queries: int,
        num_classes: int,
        use_fine: bool,
        criterion: ClassCriterion,
        detections_per_image: int,
    ) -> None:
        super().__init__(criterion)
        fine, *coarse = feature_shapes(shapes, in_features)
        self.in_features = list(in_features)
        self.use_fine = use_fine
        self.num_queries = num_queries
        self.detections_per_image = detections_per_image
        self.transformer = transformer
        self.width = width = transformer.embed_dim
        self.num_layers = len(transformer.decoder.layers)
        self.num_classes = num_classes
        self.size_divisibility = coarse[-1].stride
        strides = [shape.stride for shape in coarse]
        self.strides = (fine.stride, *strides) if use_fine else tuple(strides)
        self.fine_proj = LevelProjections([fine.channels], width, 1, bias=False)
        # The model keeps a projection that it does not use, as the release does; it must not wait for gradients
        self.fine_proj.requires_grad_(use_fine)
        self.input_proj = LevelProjections([shape.channels for shape in coarse], width, num_levels, bias=False)
        self.query_embed = nn.Embedding(num_queries, 2 * width)
        self.class_embed = nn.Linear(width, num_classes)
        nn.init.constant_(self.class_embed.bias, PRIOR_LOGIT)

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> "BoxFreeDETR":
        """What ``MODEL.ISDA`` describes."""
        isda = cfg.MODEL.ISDA
        (fine,) = feature_shapes(shapes, isda.IN_FEATURES[:1])
        return cls(
            in_features=isda.IN_FEATURES,
            shapes=shapes,
            transformer=DeformableTransformer.from_section(isda),
            num_levels=isda.NUM_FEATURE_LEVELS,
            num_queries=isda.NUM_QUERIES,
            num_classes=isda.NUM_CLASSES,
            use_fine=cfg.MODEL.MASK_BRANCH.KERNEL.MASK_STRIDE <= fine.stride,
            criterion=ClassCriterion(isda.COST_CLASS, isda.CLASS_WEIGHT, isda.FOCAL_ALPHA, isda.CLASS_COST),
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    def forward(self, features: Mapping[str, Tensor], canvas: Canvas) -> BoxFreePredictions:
        """See :class:`Detector`. The pyramid is that of the projections which have a map of the backbone."""
        fine, *coarse = [features[name] for name in self.in_features]
        levels = self.input_proj(coarse)
        maps = levels[: len(coarse)]
        decoded = self.transformer(
            levels,
            [resize_padding(canvas.padding, level.shape[-2:]) for level in levels],
            self.query_embed.weight,
            padded=canvas.padded,
        )
        return BoxFreePredictions(
            logits=self.class_embed(decoded.hidden),
            hidden=decoded.hidden,
            canvas=canvas,
            features=features,
            pyramid=FeaturePyramid([*self.fine_proj([fine]), *maps] if self.use_fine else maps, self.strides),
            references=decoded.references[0],
            memory=decoded.memory,
        )

    def select(
        self, found: BoxFreePredictions, image: int, size: tuple[int, int], layer: int | None = None
    ) -> Instances:
        """See :class:`Detector`."""
        logits = found.logits[-1 if layer is None else layer, image]
        scores, queries, classes = select_top_scores(full_precision(logits).sigmoid(), self.detections_per_image)
        instances = Instances(size)
        instances.scores = scores
        instances.pred_classes = classes
        instances.pred_queries = queries
        return instances
