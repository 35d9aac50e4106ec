"""ISTR's detector: query boxes that look at what they contain, and move, stage after stage (Hu et al. 2021, 3.3).

Data flow (B images, Q queries, C width, N stages)::

    maps p2..p5 of a backbone with a feature pyramid
      -> queries P + E (B, Q, C): pooled maps and position embeddings; learned boxes (Q, 4)
      -> each stage: crops at the boxes, attention, heads -> logits, moved boxes, object features
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from querymask.common.boxes import clip_boxes, to_corners
from querymask.common.detector import keep_rows, select_top_scores
from querymask.common.images import Canvas
from querymask.common.losses import PRIOR_LOGIT
from querymask.common.meta_arch import feature_shapes
from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.common.set_criterion import SetDetector, box_criterion_arguments
from querymask.common.transfer import numbers_to_device, to_device
from querymask.istr.criterion import RecurrentCriterion
from querymask.istr.predictions import RecurrentPredictions
from querymask.istr.stage import RecurrentStage


class RecurrentBoxes(SetDetector):
    """The detector.

    Args:
        in_features: levels of the backbone's pyramid, fine to coarse.
        shapes: of the backbone's maps.
        stages: N of them.
        num_queries: Q.
        use_image_feature, use_position: the two parts of the queries.
        query_pooling: spatial pooling of a level for the first, "mean" or "max".
        stage_input: queries of a stage: "previous" stage's object features (release), or the "initial" ones again
            (equation 10).
        criterion: matching and losses.
        deep_supervision: losses for every stage, or for the last one only.
        detections_per_image: pairs of query and class that are kept.
        first_scored_stage: scores are those of the mean logits from this stage on; -1: of the last stage alone.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        shapes: Mapping[str, ShapeSpec],
        stages: Sequence[RecurrentStage],
        num_queries: int,
        use_image_feature: bool,
        use_position: bool,
        query_pooling: str,
        stage_input: str,
        criterion: RecurrentCriterion,
        deep_supervision: bool,
        detections_per_image: int,
        first_scored_stage: int,
    ) -> None:
        super().__init__(criterion)
        for key, value, choices in (
            ("QUERY_POOLING", query_pooling, ("mean", "max")),
            ("STAGE_INPUT", stage_input, ("previous", "initial")),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.ISTR.{key} is {value!r}: choose one of {', '.join(choices)}")
        if not (use_image_feature or use_position):
            raise ValueError("all queries would be zero: set MODEL.ISTR.USE_IMAGE_FEATURE or MODEL.ISTR.USE_POSITION")
        self.in_features = list(in_features)
        self.width = width = stages[0].linear1.in_features
        self.strides = fpn_strides(shapes, self.in_features, width)
        self.num_layers = len(stages)
        self.num_classes = stages[0].class_logits.out_features - (criterion.classifier == "softmax")
        self.num_queries = num_queries
        self.use_image_feature = use_image_feature
        self.query_pooling = query_pooling
        self.stage_input = stage_input
        self.deep_supervision = deep_supervision
        self.detections_per_image = detections_per_image
        self.first_scored_stage = first_scored_stage
        self.pos_embeddings = nn.Embedding(num_queries, width) if use_position else None
        self.init_proposal_boxes = nn.Embedding(num_queries, 4)
        self.stages = nn.ModuleList(stages)
        self._reset_parameters()
        if not deep_supervision:
            self._freeze_unsupervised()

    def _reset_parameters(self) -> None:
        for parameter in self.stages.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.criterion.classifier == "sigmoid":
            for stage in self.stages:
                nn.init.constant_(stage.class_logits.bias, PRIOR_LOGIT)
        with torch.no_grad():  # every query starts with the whole image
            self.init_proposal_boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))

    def _freeze_unsupervised(self) -> None:
        """Without losses of their own, earlier stages' heads get no gradient, as boxes carry none to the next stage."""
        for stage in self.stages[:-1]:
            for module in stage.heads() if self.stage_input == "previous" else [stage]:
                module.requires_grad_(False)
        self.init_proposal_boxes.requires_grad_(len(self.stages) == 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> "RecurrentBoxes":
        """What ``MODEL.ISTR`` describes."""
        istr = cfg.MODEL.ISTR
        return cls(
            in_features=istr.IN_FEATURES,
            shapes=shapes,
            stages=[build_stage(istr) for _ in range(istr.NUM_STAGES)],
            num_queries=istr.NUM_QUERIES,
            use_image_feature=istr.USE_IMAGE_FEATURE,
            use_position=istr.USE_POSITION,
            query_pooling=istr.QUERY_POOLING,
            stage_input=istr.STAGE_INPUT,
            criterion=RecurrentCriterion(
                **box_criterion_arguments(istr),
                classifier=istr.CLASSIFIER,
                softmax_loss=istr.SOFTMAX_LOSS,
                no_object_weight=istr.NO_OBJECT_WEIGHT,
            ),
            deep_supervision=istr.DEEP_SUPERVISION,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            first_scored_stage=istr.FIRST_SCORED_STAGE,
        )

    @property
    def num_trained_layers(self) -> int:
        """See :class:`Detector`."""
        return self.num_layers if self.deep_supervision else 1

    def forward(self, features: Mapping[str, Tensor], canvas: Canvas) -> RecurrentPredictions:
        """See :class:`Detector`; in training, of the stages that have losses."""
        maps = [features[name] for name in self.in_features]
        pyramid = FeaturePyramid(maps, self.strides)
        queries = self.initial_queries(maps)
        boxes = to_corners(self.init_proposal_boxes.weight) * canvas.sides[:, None]
        objects, outputs = queries, []
        for stage in self.stages:
            outputs.append(stage.run(pyramid, boxes, objects))
            boxes = outputs[-1].boxes.detach()
            objects = outputs[-1].features if self.stage_input == "previous" else queries
        found = RecurrentPredictions(
            logits=torch.stack([output.logits for output in outputs]),
            hidden=torch.stack([output.features for output in outputs]),
            canvas=canvas,
            features=features,
            pyramid=pyramid,
            boxes=torch.stack([output.boxes for output in outputs]),
        )
        return found if self.deep_supervision or not self.training else found.last()

    def initial_queries(self, maps: Sequence[Tensor]) -> Tensor:
        """P + E (B, Q, C) (equation 10): the sum of the pooled levels, padding included, and the position embedding."""
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        queries = maps[0].new_zeros((len(maps[0]), self.num_queries, maps[0].shape[1]), dtype=dtype)
        if self.use_image_feature:
            pooled = [x.mean((2, 3), dtype=dtype) if self.query_pooling == "mean" else x.amax((2, 3)) for x in maps]
            queries = queries + torch.stack(pooled).sum(0, dtype=dtype)[:, None]
        if self.pos_embeddings is not None:
            queries = queries + self.pos_embeddings.weight
        return queries

    def select(
        self, found: RecurrentPredictions, image: int, size: tuple[int, int], layer: int | None = None
    ) -> Instances:
        """See :class:`Detector`; boxes are clipped, and empty ones left out."""
        height, width = size
        scores, queries, classes = select_top_scores(self.scores(found, layer)[image], self.detections_per_image)
        sides = found.canvas.sides
        scaling = numbers_to_device([width, height] * 2, sides.dtype, sides.device) / sides[image]
        # On the host, where they are looked at twice, and which must know how many remain
        boxes = Boxes((found.boxes[-1 if layer is None else layer, image, queries] * scaling).cpu())
        clip_boxes(boxes, size)
        instances = Instances(size)
        instances.pred_boxes = Boxes(to_device(boxes.tensor, queries.device))
        instances.scores = scores
        instances.pred_classes = classes
        instances.pred_queries = queries
        return keep_rows(instances, boxes.nonempty())

    def class_scores(self, found: RecurrentPredictions, image: int) -> Tensor:
        """See :class:`Detector`."""
        return self.scores(found)[image]

    def scores(self, found: RecurrentPredictions, stage: int | None = None) -> Tensor:
        """Scores (B, Q, classes) of one stage, or of the mean logits that count."""
        number = found.num_layers
        if stage is not None:
            logits = found.logits[stage]
        else:
            first = self.first_scored_stage
            first = max(number + first, 0) if first < 0 else min(first, number - 1)
            logits = full_precision(found.logits[first:]).mean(0)
        logits = full_precision(logits)
        return logits.sigmoid() if self.criterion.classifier == "sigmoid" else logits.softmax(-1)[..., :-1]


def fpn_strides(shapes: Mapping[str, ShapeSpec], in_features: Sequence[str], width: int) -> tuple[int, ...]:
    """Strides of the backbone's pyramid, whose levels must have the stages' width.

    Raises:
        ValueError: a level is missing, or has another width.
    """
    if any(name not in shapes for name in in_features):
        missing = [name for name in in_features if name not in shapes]
        raise ValueError(
            f"MODEL.ISTR.IN_FEATURES names {missing}, but the backbone gives {sorted(shapes)}: use a backbone with a "
            "feature pyramid, such as build_resnet_fpn_backbone, and name some of its levels"
        )
    own = feature_shapes(shapes, in_features)
    other = {shape.channels for shape in own} - {width}
    if other:
        raise ValueError(
            f"MODEL.ISTR.HIDDEN_DIM is {width}, but the pyramid has {sorted(other)} channels: set "
            "MODEL.FPN.OUT_CHANNELS to the same"
        )
    return tuple(shape.stride for shape in own)


def build_stage(istr: CfgNode) -> RecurrentStage:
    """One stage as ``MODEL.ISTR`` describes it."""
    return RecurrentStage(
        width=istr.HIDDEN_DIM,
        num_heads=istr.NUM_HEADS,
        dim_feedforward=istr.DIM_FEEDFORWARD,
        pool_size=istr.POOL_SIZE,
        attention=istr.ATTENTION,
        dynamic_layers=istr.DYNAMIC_LAYERS,
        dim_dynamic=istr.DIM_DYNAMIC,
        num_logits=istr.NUM_CLASSES + int(istr.CLASSIFIER == "softmax"),
        num_head_layers=istr.HEAD_LAYERS,
        dropout=istr.DROPOUT,
    )
