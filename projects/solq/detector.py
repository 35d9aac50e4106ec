"""Deformable DETR (Zhu et al. 2021), SOLQ's detector.

Data flow (B images, L levels, Q queries, C width, N decoder layers)::

    maps of the backbone -> projections, L levels (B, C, H_l, W_l)
      -> deformable transformer -> memory (B, S, C), hidden states (N, B, Q, C)
      -> class head (N, B, Q, classes), box head (N, B, Q, 4)
      -> training: matching and losses per layer, and of the proposals in the two-stage form
      -> inference: best pairs of query and class of the last layer
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.boxes import to_corners, unrounded_boxes
from querymask.common.deformable_transformer import DeformableTransformer, refine_box
from querymask.common.detector import select_top_scores
from querymask.common.images import Canvas, resize_padding
from querymask.common.layers import MLP, LevelProjections
from querymask.common.losses import PRIOR_LOGIT
from querymask.common.matching import hungarian_assignments
from querymask.common.meta_arch import feature_shapes
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Targets
from querymask.common.pyramid import FeaturePyramid
from querymask.common.set_criterion import SetDetector, box_criterion_arguments
from querymask.common.transfer import numbers_to_device
from querymask.solq.criterion import DETRCriterion, cardinality_error, class_error
from querymask.solq.predictions import DETRPredictions


class DeformableDETR(SetDetector):
    """The detector.

    Args:
        in_features: names of the backbone's maps, fine to coarse.
        shapes: of the backbone's maps.
        transformer: its ``num_proposals`` decides between one-stage and two-stage form.
        num_levels: feature levels.
        num_queries, num_classes: Q and the width of the class head.
        box_refine: every decoder layer has its own heads and moves the reference.
        criterion: matching and losses.
        detections_per_image: pairs of query and class that are kept.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        shapes: Mapping[str, ShapeSpec],
        transformer: DeformableTransformer,
        num_levels: int,
        num_queries: int,
        num_classes: int,
        box_refine: bool,
        criterion: DETRCriterion,
        detections_per_image: int,
    ) -> None:
        super().__init__(criterion)
        self.in_features = list(in_features)
        own = feature_shapes(shapes, self.in_features)
        self.transformer = transformer
        self.box_refine = box_refine
        self.num_queries = num_queries
        self.detections_per_image = detections_per_image
        self.width = width = transformer.embed_dim
        self.num_layers = len(transformer.decoder.layers)
        self.num_classes = num_classes
        self.strides = level_strides([shape.stride for shape in own], num_levels)

        two_stage = transformer.num_proposals > 0
        self.input_proj = LevelProjections([shape.channels for shape in own], width, num_levels)
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * width)
        # With refinement one copy per layer, and one for the proposals; else one for all.
        copies = self.num_layers + int(two_stage) if box_refine else 1
        self.class_embed = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(copies))
        self.bbox_embed = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(copies))
        self._reset_heads(two_stage)

    def _reset_heads(self, two_stage: bool) -> None:
        for head in self.class_embed:
            nn.init.constant_(head.bias, PRIOR_LOGIT)
            head.load_state_dict(self.class_embed[0].state_dict())  # copies start equal
        for head in self.bbox_embed:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for head in self.bbox_embed:
            head.load_state_dict(self.bbox_embed[0].state_dict())
        if not two_stage:  # small boxes at first
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> "DeformableDETR":
        """What ``MODEL.SOLQ`` describes."""
        solq = cfg.MODEL.SOLQ
        return cls(
            in_features=solq.IN_FEATURES,
            shapes=shapes,
            transformer=DeformableTransformer.from_section(solq, solq.NUM_QUERIES if solq.TWO_STAGE else 0),
            num_levels=solq.NUM_FEATURE_LEVELS,
            num_queries=solq.NUM_QUERIES,
            num_classes=solq.NUM_CLASSES,
            box_refine=solq.BOX_REFINE,
            criterion=DETRCriterion(**box_criterion_arguments(solq)),
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    def forward(self, features: Mapping[str, Tensor], canvas: Canvas) -> DETRPredictions:
        """See :class:`Detector`. The pyramid is the encoder's memory."""
        levels = self.input_proj([features[name] for name in self.in_features])
        masks = [resize_padding(canvas.padding, level.shape[-2:]) for level in levels]
        decoded = self.transformer(
            levels,
            masks,
            None if self.query_embed is None else self.query_embed.weight,
            refine=self._refine if self.box_refine else None,
            proposal_heads=(self.class_embed[-1], self.bbox_embed[-1]),
            padded=canvas.padded,
        )
        if self.box_refine:
            logits = torch.stack([head(x) for head, x in zip(self.class_embed, decoded.hidden, strict=False)])
            boxes = decoded.boxes
        else:
            logits = self.class_embed[0](decoded.hidden)
            boxes = self._refine(0, decoded.hidden, decoded.references[0])
        areas = [height * width for height, width in decoded.shapes]
        maps = [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(decoded.memory.split(areas, dim=1), decoded.shapes, strict=True)
        ]
        return DETRPredictions(
            logits=logits,
            hidden=decoded.hidden,
            canvas=canvas,
            features=features,
            pyramid=FeaturePyramid(maps, self.strides),
            boxes=boxes,
            references=decoded.references,
            levels=levels,
            padding=masks,
            memory=decoded.memory,
            proposals=decoded.proposals,
        )

    def _refine(self, layer: int, hidden: Tensor, reference: Tensor) -> Tensor:
        return refine_box(full_precision(self.bbox_embed[layer](hidden)), reference)

    @torch.no_grad()
    def match(self, found: DETRPredictions, targets: Targets, mask_costs: Mapping[str, Tensor]) -> Assignment:
        """The assignment of all decoder layers and, in the two-stage form, that of the proposals."""
        problems = [({**self.criterion.cost_terms(found, targets), **mask_costs}, targets)]
        if found.proposals is not None:
            proposals, anything = found.of_proposals(targets)
            problems.append((self.criterion.cost_terms(proposals, anything), anything))
        assignment, *rest = hungarian_assignments(problems)
        return replace(assignment, proposals=rest[0]) if rest else assignment

    def losses(
        self, found: DETRPredictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> list[LossTerm]:
        """Those of the decoder layers and, in the two-stage form, of the proposals."""
        terms = self.criterion.losses(found, targets, assignment, normalizers)
        if assignment.proposals is not None:
            of_proposals = self.criterion.losses(*found.of_proposals(targets), assignment.proposals, normalizers)
            terms += [replace(term, layer="enc") for term in of_proposals]
        return terms

    def select(self, found: DETRPredictions, image: int, size: tuple[int, int], layer: int | None = None) -> Instances:
        """See :class:`Detector`; boxes are not clipped."""
        layer = -1 if layer is None else layer
        scores, queries, classes = select_top_scores(
            full_precision(found.logits[layer, image]).sigmoid(), self.detections_per_image
        )
        boxes = to_corners(found.boxes[layer, image, queries])
        instances = Instances(size)
        sides = numbers_to_device([size[1], size[0]] * 2, boxes.dtype, boxes.device)
        instances.pred_boxes = unrounded_boxes(boxes * sides)
        instances.scores = scores
        instances.pred_classes = classes
        instances.pred_queries = queries
        return instances

    @torch.no_grad()
    def statistics(self, found: DETRPredictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """What the release logs beside the losses: errors of class and cardinality, named like losses."""
        *auxiliary, final = cardinality_error(found.logits, targets.counts).unbind()
        named = {"class_error": class_error(found.logits, targets.labels, assignment), "cardinality_error": final}
        named.update({f"cardinality_error_{layer}": value for layer, value in enumerate(auxiliary)})
        if found.proposals is not None:
            named["cardinality_error_enc"] = cardinality_error(found.proposals.logits[None], targets.counts)[0]
        return named


def level_strides(strides: Sequence[int], num_levels: int) -> tuple[int, ...]:
    """Strides of the levels: those of the backbone's maps, then twice the one before."""
    result = list(strides)
    while len(result) < num_levels:
        result.append(2 * result[-1])
    return tuple(result)
