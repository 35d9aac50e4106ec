"""SOLQ's masks: the query regresses a coded mask of its box (Dong et al. 2021, sections 3.2 to 3.4).

Data flow (n matched or selected queries, C width, K entries of a vector, S side of the coded mask)::

    hidden states (n, C) -> vector head, of all layers or of the layer (n, K)
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
from querymask.common.mask_coding import AutoencoderMaskCoding, MaskCoding, binarize_at_half_range, coding_from_config
from querymask.common.mask_coding.targets import CodedTargets, encode_targets
from querymask.common.masks import Bands, paste_masks, pasted_bands
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.transfer import instances_to_device

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
        num_layers: of the detector that have a head of their own; None: one head for all layers.
        num_trained_layers: those of them, from the last one on, that may have losses; None: all.
        weight: coefficient inside ``loss_vector``.
        start_layer: first layer with a loss; the last layer always has one.
        loss: "l1" distance of vectors, or "l2_dice": squared distance by entry plus the dice loss of the decoded mask,
            both summed over the pairs and divided by the number of targets.
        reduction: of "l1": "mean" over matched pairs and entries, "local_mean" the same within each process, as the
            release has it, "sum": sum over entries divided by the number of targets.
        binarize_before_paste: threshold decoded maps at half of their range before pasting (SOLQ), or paste them soft
            and threshold once (fast SOLQ).
    """

    sections = ("MASK_BRANCH.VECTOR", "MASK_CODING")
    needs_boxes = True

    def __init__(
        self,
        *,
        width: int,
        hidden_dim: int,
        coding: MaskCoding,
        num_layers: int | None = None,
        num_trained_layers: int | None = None,
        weight: float = 3.0,
        start_layer: int = 0,
        loss: str = "l1",
        reduction: str = "mean",
        binarize_before_paste: bool = True,
    ) -> None:
        for key, value, choices in (
            ("LOSS", loss, VECTOR_LOSSES),
            ("LOSS_REDUCTION", reduction, VECTOR_LOSS_REDUCTIONS),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.MASK_BRANCH.VECTOR.{key} is {value!r}: choose one of {choices}")
        if loss == "l2_dice" and reduction != "mean":
            raise ValueError(
                f"MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION is {reduction!r}, but LOSS 'l2_dice' has one form only: set "
                "it 'mean'"
            )
        if isinstance(coding, AutoencoderMaskCoding):  # its decoder learns, and would need a loss of its own
            raise ValueError(
                "VectorBranch does not train the autoencoder of MODEL.MASK_CODING.NAME 'autoencoder': choose another "
                "coding, or MODEL.MASK_BRANCH.NAME CodeBranch"
            )
        super().__init__()
        self.coding = coding
        self.weight = weight
        self.start_layer = start_layer
        self.loss = loss
        self.reduction = reduction
        self.binarize_before_paste = binarize_before_paste
        heads = [MLP(width, hidden_dim, coding.length, 3) for _ in range(num_layers or 1)]
        for head in heads:
            last = head.layers[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            nn.init.constant_(last.bias[2:], -2.0)  # as the release does, from its box head: it means nothing here
            head.load_state_dict(heads[0].state_dict())  # copies start equal
        self.vector_embed = heads[0] if num_layers is None else nn.ModuleList(heads)
        if num_layers is not None:
            trained = num_trained_layers or num_layers
            untrained = num_layers - trained + min(start_layer, trained - 1)
            self.vector_embed[:untrained].requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "VectorBranch":
        """What ``MODEL.MASK_BRANCH.VECTOR`` describes, for any detector with boxes."""
        vector = cfg.MODEL.MASK_BRANCH.VECTOR
        own_heads = not vector.SHARED_HEAD
        if vector.PASTE not in ("binary", "soft"):
            raise ValueError(f"MODEL.MASK_BRANCH.VECTOR.PASTE is {vector.PASTE!r}: choose 'binary' or 'soft'")
        return cls(
            width=detector.width,
            hidden_dim=vector.HIDDEN_DIM,
            coding=coding_from_config(cfg),
            num_layers=detector.num_layers if own_heads else None,
            num_trained_layers=detector.num_trained_layers if own_heads else None,
            weight=vector.WEIGHT,
            start_layer=vector.START_LAYER,
            loss=vector.LOSS,
            reduction=vector.LOSS_REDUCTION,
            binarize_before_paste=vector.PASTE == "binary",
        )

    def head(self, layer: int) -> MLP:
        """The vector head of a layer, which is counted from the last one, -1, backwards."""
        return self.vector_embed[layer] if isinstance(self.vector_embed, nn.ModuleList) else self.vector_embed

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
        hidden = assignment.select(found.hidden)[start:]
        if isinstance(self.vector_embed, nn.ModuleList):
            by_layer = hidden.view(number, assignment.pairs_per_layer(), hidden.shape[-1]).unbind()
            predicted = torch.cat([self.head(i - number)(x) for i, x in enumerate(by_layer)])
        else:
            predicted = self.vector_embed(hidden)
        predicted = full_precision(predicted)
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
        detections = instances_to_device(detections, found.hidden.device)
        maps = self._maps(found, image, detections.pred_queries, -1 if layer is None else layer)
        boxes = detections.pred_boxes.tensor
        detections.pred_masks = paste_masks(maps, boxes, *detections.image_size, threshold=0.5)
        return detections

    def bands(self, found: Predictions, made: None, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """See :class:`MaskBranch`; of codings without a limit, what is beyond 0 and 1 counts as these."""
        boxes = found.pixel_boxes(torch.full_like(queries, image), queries)
        maps = self._maps(found, image, queries, -1).to(boxes.dtype).clamp(0, 1)
        return pasted_bands(maps, boxes, found.canvas.size[1])

    def _maps(self, found: Predictions, image: int, queries: Tensor, layer: int) -> Tensor:
        """(n, S, S) soft or bool masks of queries (n,) of an image."""
        head = self.head(layer - found.num_layers if layer >= 0 else layer)
        maps = self.coding.decode(full_precision(head(found.hidden[layer, image, queries])))
        return binarize_at_half_range(maps) if self.binarize_before_paste else maps
