"""SOLQ's masks: the query regresses a coded mask of its box (Dong et al. 2021, sections 3.2 to 3.4).

Data flow (n matched or selected queries, C width, K entries of a vector, S side of the coded mask)::

    hidden states (n, C) -> vector head (n, K)
      -> training: distance from the vectors of the targets' masks, per layer
      -> inference: decoded maps (n, S, S) -> pasted into the boxes
"""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.detector import Detector
from querymask.common.layers import MLP
from querymask.common.losses import dice_loss
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.mask_coding import MaskCoding, binarize_at_half_range, build_mask_coding
from querymask.common.mask_coding.targets import CodedTargets, encode_targets
from querymask.common.masks import paste_masks
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.transfer import instances_to_device

CODINGS = ("dct", "pca", "sparse", "flatten", "flatten_logits")
VECTOR_LOSSES = ("l1", "l2_dice")
VECTOR_LOSS_REDUCTIONS = ("mean", "local_mean", "sum")
_DICE_EPS = 1e-5


@MASK_BRANCH_REGISTRY.register()
class VectorBranch(MaskBranch):
    """Mask vectors of queries.

    Args:
        width: C.
        hidden_dim: of the vector head.
        coding: of the masks.
        weight: coefficient inside ``loss_vector``.
        start_layer: first layer with a loss; the last layer always has one.
        loss: "l1" distance of vectors, or "l2_dice": squared distance by entry plus the dice loss of the decoded mask,
            both summed over the pairs and divided by the number of targets.
        reduction: of "l1": "mean" over matched pairs and entries, "local_mean" the same within each process, as the
            release has it, "sum": sum over entries divided by the number of targets.
        binarize_before_paste: threshold decoded maps at half of their range before pasting (SOLQ), or paste them soft
            and threshold once (fast SOLQ).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden_dim: int,
        coding: MaskCoding,
        weight: float = 3.0,
        start_layer: int = 0,
        loss: str = "l1",
        reduction: str = "mean",
        binarize_before_paste: bool = True,
    ) -> None:
        for key, value, choices in (
            ("VECTOR_LOSS", loss, VECTOR_LOSSES),
            ("VECTOR_LOSS_REDUCTION", reduction, VECTOR_LOSS_REDUCTIONS),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.SOLQ.{key} is {value!r}: choose one of {choices}")
        if loss == "l2_dice" and reduction != "mean":
            raise ValueError(
                f"MODEL.SOLQ.VECTOR_LOSS_REDUCTION is {reduction!r}, but VECTOR_LOSS 'l2_dice' has one form only: "
                "set it 'mean'"
            )
        super().__init__()
        self.coding = coding
        self.weight = weight
        self.start_layer = start_layer
        self.loss = loss
        self.reduction = reduction
        self.binarize_before_paste = binarize_before_paste
        self.vector_embed = MLP(width, hidden_dim, coding.length, 3)
        last = self.vector_embed.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], -2.0)  # as the release does, from its box head: it means nothing here

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "VectorBranch":
        """What ``MODEL.SOLQ`` describes, for any detector with boxes."""
        solq = cfg.MODEL.SOLQ
        if not detector.has_boxes:
            raise ValueError(
                f"VectorBranch codes the mask within a box, and {type(detector).__name__} has no boxes: choose another "
                "MODEL.MASK_BRANCH.NAME"
            )
        if solq.PASTE not in ("binary", "soft"):
            raise ValueError(f"MODEL.SOLQ.PASTE is {solq.PASTE!r}: choose 'binary' or 'soft'")
        return cls(
            width=detector.width,
            hidden_dim=solq.VECTOR_HIDDEN_DIM,
            coding=build_coding(solq),
            weight=solq.VECTOR_WEIGHT,
            start_layer=solq.VECTOR_START_LAYER,
            loss=solq.VECTOR_LOSS,
            reduction=solq.VECTOR_LOSS_REDUCTION,
            binarize_before_paste=solq.PASTE == "binary",
        )

    def encode(self, targets: Targets, found: Predictions) -> CodedTargets:
        """See :class:`MaskBranch`."""
        dtype = full_precision(found.logits).dtype
        return encode_targets(self.coding, targets, dtype, keep=not self.coding.is_random)

    def losses(
        self,
        found: Predictions,
        made: None,
        truth: CodedTargets,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """``loss_vector`` of every layer that has it: distance of predicted and true mask vectors."""
        first = min(self.start_layer, assignment.num_layers - 1)
        number = assignment.num_layers - first
        start = first * assignment.pairs_per_layer()
        target = assignment.target[start:]
        predicted = full_precision(self.vector_embed(assignment.select(found.hidden)[start:]))
        wanted = self.target_vectors(truth, target).to(predicted.dtype)
        if self.loss == "l2_dice":
            crops = truth.crops[target].to(predicted.dtype)
            dice = dice_loss(self.coding.decode(predicted), crops, eps=_DICE_EPS)
            sums = ((predicted - wanted).square().sum(-1) / self.coding.length + dice).view(number, -1).sum(1)
            values = sums / normalizers.targets
        else:
            sums = (predicted - wanted).abs().sum(-1).view(number, -1).sum(1)
            if self.reduction == "sum":
                values = sums / normalizers.targets
            elif self.reduction == "mean":
                values = sums / (normalizers.pairs * self.coding.length)
            else:
                values = sums / (max(assignment.pairs_per_layer(), 1) * self.coding.length)
        return loss_terms("loss_vector", self.weight * values, 1.0, assignment.num_layers)

    @torch.no_grad()
    def target_vectors(self, truth: CodedTargets, target: Tensor) -> Tensor:
        """Vectors of the targets (n,): (n, K). A random coding draws anew for every layer, as the release does."""
        return truth.vectors[target] if truth.vectors is not None else self.coding.encode(truth.crops[target])

    def add_masks(
        self, found: Predictions, made: None, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """See :class:`MaskBranch`."""
        device = found.hidden.device
        detections = instances_to_device(detections, device)
        hidden = found.hidden[-1 if layer is None else layer, image, detections.pred_queries]
        maps = self.coding.decode(full_precision(self.vector_embed(hidden)))
        if self.binarize_before_paste:
            maps = binarize_at_half_range(maps)
        boxes = detections.pred_boxes.tensor
        detections.pred_masks = paste_masks(maps, boxes, *detections.image_size, threshold=0.5)
        return detections


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
