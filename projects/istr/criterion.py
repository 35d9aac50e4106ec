"""ISTR's matching costs and losses (sections 3.1 and 3.4), stage by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from querymask.common.boxes import generalized_iou
from querymask.common.losses import dice_loss
from querymask.common.mask_coding import AutoencoderMaskCoding, MaskCoding
from querymask.common.masks import crop_masks
from querymask.common.matching import Assignment, Targets, focal_class_cost, pad_targets
from querymask.common.precision import full_precision, without_autocast
from querymask.common.processes import Processes
from querymask.common.roi_pooling import FeaturePyramid
from querymask.common.set_criterion import Normalizers, SetCriterion, by_layer, focal_class_loss
from querymask.istr.mask_head import MaskCode

CLASSIFIERS = ("sigmoid", "softmax")
MASK_COSTS = ("cosine", "l1", "dice", "none")
VECTOR_LOSSES = ("l2", "smooth_l1")
MASK_TARGETS = ("ground_truth", "predicted")
_DICE_EPS = 1e-5


@dataclass
class ISTROutput:
    """Predictions of all stages.

    Attributes:
        logits: (N, B, Q, classes).
        boxes: (N, B, Q, 4) XYXY in pixels of the network's input.
        features: (N, B, Q, C) object features.
        scale: (B, 4) width, height, width, height of the images without padding.
        pyramid: what heads on crops read.
        mask_heads: of the stages; empty without mask branch.
        codes: per stage the codes of all queries (B * Q rows); None: heads run on chosen queries when asked.
        coding: of the masks, None without mask branch.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    features: torch.Tensor
    scale: torch.Tensor
    pyramid: FeaturePyramid
    mask_heads: Sequence[nn.Module] = ()
    codes: Sequence[MaskCode] | None = None
    coding: MaskCoding | None = None

    @property
    def relative_boxes(self) -> torch.Tensor:
        """Boxes (N, B, Q, 4) relative to the images."""
        return full_precision(self.boxes) / self.scale[:, None]

    def mask_code(self, stage: int, images: torch.Tensor, queries: torch.Tensor) -> MaskCode:
        """Codes of chosen queries (n,) of a stage."""
        if self.codes is not None:
            return self.codes[stage][images * self.logits.shape[2] + queries]
        head = self.mask_heads[stage]
        return head(self.features[stage, images, queries], self.boxes[stage, images, queries], images, self.pyramid)

    def vectors(self) -> torch.Tensor:
        """Mask vectors (N, B, Q, K) of all queries."""
        assert self.codes is not None
        return full_precision(torch.stack([code.vectors for code in self.codes])).unflatten(1, self.logits.shape[1:3])

    def last(self) -> "ISTROutput":
        """The last stage alone."""
        return replace(
            self,
            logits=self.logits[-1:],
            boxes=self.boxes[-1:],
            features=self.features[-1:],
            mask_heads=self.mask_heads[-1:],
            codes=None if self.codes is None else self.codes[-1:],
        )


@dataclass
class ISTRTargets(Targets):
    """``fields``: ``boxes`` (n, 4) XYXY relative to the image and, with a mask branch, ``crops`` (n, S, S) bool at the
    boxes, and ``vectors`` (n, K) where the coding gives the same for every call.

    Attributes:
        masks: (T, H, W) bool of every image.
    """

    masks: Sequence[torch.Tensor] = field(default_factory=list)


class ISTRCriterion(SetCriterion):
    """Hungarian matching on class, L1, GIoU and mask; class, L1, GIoU, vector and dice losses in every stage.

    Args:
        costs: weights of the matching costs ``class``, ``bbox``, ``giou``, ``mask``.
        weights: weights of ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``loss_vector``, ``loss_dice``.
        classifier: "sigmoid" or "softmax", whose last logit is "no object".
        focal_alpha: alpha of the focal loss.
        no_object_weight: of the softmax classifier.
        mask_cost: "cosine" or "l1" of the vectors, "dice" of the masks, "none".
        vector_loss: "l2" or "smooth_l1".
        mask_target: masks are cut out at the "ground_truth" box or, for the losses, at the matched "predicted" one.
        deep_supervision: losses for every stage; else for the last one only.
    """

    def __init__(
        self,
        costs: Mapping[str, float],
        weights: Mapping[str, float],
        *,
        classifier: str = "sigmoid",
        focal_alpha: float = 0.25,
        no_object_weight: float = 0.1,
        mask_cost: str = "cosine",
        vector_loss: str = "l2",
        mask_target: str = "ground_truth",
        deep_supervision: bool = True,
    ) -> None:
        for key, value, choices in (
            ("CLASSIFIER", classifier, CLASSIFIERS),
            ("MASK_COST", mask_cost, MASK_COSTS),
            ("VECTOR_LOSS", vector_loss, VECTOR_LOSSES),
            ("MASK_TARGET", mask_target, MASK_TARGETS),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.ISTR.{key} is {value!r}: choose one of {', '.join(choices)}")
        super().__init__(weights)
        self.costs = dict(costs)
        self.classifier = classifier
        self.focal_alpha = focal_alpha
        self.no_object_weight = no_object_weight
        self.mask_cost = mask_cost
        self.vector_loss = vector_loss
        self.mask_target = mask_target
        self.deep_supervision = deep_supervision

    def forward(self, outputs: ISTROutput, targets: ISTRTargets) -> dict[str, torch.Tensor]:
        """Losses before their weights; the last stage's have no suffix, stage i's end in ``_i``."""
        return super().forward(outputs if self.deep_supervision else outputs.last(), targets)

    # ---- Matching -------------------------------------------------------------------------------------------------

    def cost_terms(self, outputs: ISTROutput, targets: ISTRTargets) -> dict[str, torch.Tensor]:
        """Class, L1, GIoU and mask costs (N, B, Q, T)."""
        target_boxes = pad_targets(targets.fields["boxes"], targets.counts)[None, :, None]  # (1, B, 1, T, 4)
        boxes = outputs.relative_boxes[:, :, :, None]  # (N, B, Q, 1, 4)
        terms = {
            "class cost": self.costs["class"] * self.class_cost(outputs, targets),
            "L1 box cost": self.costs["bbox"] * (boxes - target_boxes).abs().sum(-1),
            "GIoU box cost": -self.costs["giou"] * generalized_iou(boxes, target_boxes),
        }
        if outputs.coding is not None and self.mask_cost != "none":
            terms["mask cost"] = self.costs["mask"] * self.mask_costs(outputs, targets, outputs.coding)
        return terms

    def class_cost(self, outputs: ISTROutput, targets: ISTRTargets) -> torch.Tensor:
        """The focal cost, or minus the probability (equation 6)."""
        labels = pad_targets(targets.labels, targets.counts)
        if self.classifier == "sigmoid":
            return focal_class_cost(outputs.logits, labels, self.focal_alpha)
        index = labels[None, :, None, :].expand(*outputs.logits.shape[:3], -1)
        return -full_precision(outputs.logits).softmax(-1).gather(-1, index)

    def mask_costs(self, outputs: ISTROutput, targets: ISTRTargets, coding: MaskCoding) -> torch.Tensor:
        """Distances of predicted masks or vectors to those at the ground-truth boxes."""
        with without_autocast(outputs.logits.device):
            if self.mask_cost == "dice":
                assert outputs.codes is not None
                maps = torch.stack([code.decode(coding).flatten(1) for code in outputs.codes])
                maps = maps.unflatten(1, outputs.logits.shape[1:3])  # (N, B, Q, S * S)
                truth = pad_targets(targets.fields["crops"].flatten(1).to(maps.dtype), targets.counts)
                product = maps @ truth.transpose(1, 2)
                squares = maps.square().sum(-1)[..., None] + truth.square().sum(-1)[:, None]
                return 1 - 2 * product / (squares + _DICE_EPS)
            predicted = outputs.vectors()
            truth = self.padded_vectors(targets, coding, len(predicted)).to(predicted.dtype)
            if self.mask_cost == "l1":
                return torch.cdist(predicted, truth.expand(len(predicted), -1, -1, -1), p=1) / coding.length
            cosine = F.normalize(predicted, dim=-1) @ F.normalize(truth, dim=-1).transpose(-1, -2)
            return -(cosine + 1) / 2

    def padded_vectors(self, targets: ISTRTargets, coding: MaskCoding, stages: int) -> torch.Tensor:
        """Vectors of the targets (N or 1, B, T, K): another draw for every stage where the coding is random."""
        if "vectors" in targets.fields:
            return pad_targets(targets.fields["vectors"], targets.counts)[None]
        crops = targets.fields["crops"]
        draws = stages if coding.is_random else 1
        vectors = coding.encode(crops.repeat(draws, 1, 1)).view(draws, len(crops), coding.length)
        return pad_targets(vectors.transpose(0, 1), targets.counts).permute(2, 0, 1, 3)

    # ---- Losses ---------------------------------------------------------------------------------------------------

    def layer_losses(
        self, outputs: ISTROutput, targets: ISTRTargets, assignment: Assignment, normalizers: Normalizers
    ) -> dict[str, dict[int, torch.Tensor]]:
        """``loss_ce``, ``loss_bbox``, ``loss_giou`` and, with a mask branch, ``loss_vector`` and ``loss_dice``."""
        count = normalizers.targets
        boxes = assignment.select(outputs.relative_boxes)
        target_boxes = targets.fields["boxes"][assignment.target]
        losses = {
            "loss_ce": by_layer(self.class_losses(outputs, targets, assignment, count)),
            "loss_bbox": by_layer(assignment.sum_layers((boxes - target_boxes).abs().sum(-1)) / count),
            "loss_giou": by_layer(assignment.sum_layers(1 - generalized_iou(boxes, target_boxes)) / count),
        }
        if outputs.coding is not None:
            vectors, maps = self.mask_losses(outputs, targets, assignment, outputs.coding)
            losses["loss_vector"] = by_layer(vectors / (count * outputs.coding.length))
            losses["loss_dice"] = by_layer(maps / count)
        return losses

    def class_losses(
        self, outputs: ISTROutput, targets: ISTRTargets, assignment: Assignment, count: torch.Tensor
    ) -> torch.Tensor:
        """(N,): focal loss, or DETR's weighted mean of the cross-entropy, over the queries of all processes."""
        if self.classifier == "sigmoid":
            return focal_class_loss(outputs.logits, targets.labels, assignment, count, self.focal_alpha)
        logits = full_precision(outputs.logits)
        no_object = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
        labels[assignment.layer, assignment.image, assignment.query] = targets.labels[assignment.target]
        weights = logits.new_ones(logits.shape[-1])
        weights[no_object] = self.no_object_weight
        values = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), weights, reduction="none").view_as(labels)
        processes = Processes()
        return values.sum((1, 2)) * processes.count / processes.total(weights[labels].sum((1, 2)))

    def mask_losses(
        self, outputs: ISTROutput, targets: ISTRTargets, assignment: Assignment, coding: MaskCoding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the matches of a stage, (N,) each: distance of the vectors, dice loss of the decoded masks."""
        number = assignment.pairs_per_layer()
        stages = [slice(i * number, (i + 1) * number) for i in range(assignment.num_layers)]
        codes = [outputs.mask_code(i, assignment.image[part], assignment.query[part]) for i, part in enumerate(stages)]
        crops = self.target_crops(outputs, targets, assignment, coding.mask_size)
        if coding.uses_batch_statistics:
            truth, maps = [], []
            for i, part in enumerate(stages):
                with torch.no_grad():
                    if i > 0 and self.mask_cost in ("cosine", "l1"):
                        # The release encodes for every stage's matching: the same vectors, but running statistics move
                        coding.encode(targets.fields["crops"])
                    truth.append(coding.encode(crops[part]))
                maps.append(codes[i].decode(coding))
            true_vectors, decoded = torch.cat(truth), torch.cat(maps)
        else:
            true_vectors = self.target_vectors(targets, assignment, crops, coding)
            decoded = MaskCode(torch.cat([code.vectors for code in codes])).decode(coding)
        vectors = full_precision(torch.cat([code.vectors for code in codes]))
        true_vectors = true_vectors.to(vectors.dtype)
        if self.vector_loss == "l2":
            distances = (vectors - true_vectors).square().sum(-1)
        else:
            distances = F.smooth_l1_loss(vectors, true_vectors, reduction="none", beta=1.0).sum(-1)
        dice = dice_loss(decoded, crops.to(decoded.dtype), eps=_DICE_EPS)
        return assignment.sum_layers(distances), assignment.sum_layers(dice)

    @torch.no_grad()
    def target_vectors(
        self, targets: ISTRTargets, assignment: Assignment, crops: torch.Tensor, coding: MaskCoding
    ) -> torch.Tensor:
        """(N * n, K): those of the matching where that is possible."""
        if self.mask_target == "ground_truth" and "vectors" in targets.fields:
            return targets.fields["vectors"][assignment.target]
        return coding.encode(crops)

    @torch.no_grad()
    def target_crops(
        self, outputs: ISTROutput, targets: ISTRTargets, assignment: Assignment, size: int
    ) -> torch.Tensor:
        """(N * n, size, size) bool: the matched masks, inside of the boxes that ``mask_target`` names."""
        if self.mask_target == "ground_truth":
            return targets.fields["crops"][assignment.target]
        boxes = assignment.select(full_precision(outputs.boxes))
        boxes = boxes.clamp(min=0).minimum(outputs.scale[assignment.image])
        # Pairs are ordered by layer and image, so an image's are a slice of every layer: nothing waits for the device
        layers, number = assignment.num_layers, assignment.pairs_per_layer()
        boxes, target = boxes.view(layers, number, 4), assignment.target.view(layers, number)
        crops, start, first = [], 0, 0
        for masks in targets.masks:
            here = slice(start, start + min(len(masks), outputs.logits.shape[2]))
            own = crop_masks(masks, boxes[:, here].flatten(0, 1), size, (target[:, here] - first).flatten())
            crops.append(own.view(layers, here.stop - here.start, size, size))
            start, first = here.stop, first + len(masks)
        return torch.cat(crops, dim=1).flatten(0, 1)


def check_mask_cost(mask_cost: str, coding: MaskCoding) -> None:
    """Refuse what would decode all queries by a network.

    Raises:
        ValueError: the dice cost with the autoencoder.
    """
    if mask_cost == "dice" and isinstance(coding, AutoencoderMaskCoding):
        raise ValueError(
            "MODEL.ISTR.MASK_COST 'dice' would decode the masks of all queries by the autoencoder's network: choose "
            "'cosine', 'l1' or 'none', or another MASK_CODING"
        )
