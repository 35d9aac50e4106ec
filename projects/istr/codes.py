"""ISTR's masks: codes that are predicted, matched and regressed, stage by stage (Hu et al. 2021, sections 3.1 to 3.4).

Data flow (B images, Q queries, N stages, K entries of a code, S side of the coded mask)::

    object features (N, B, Q, C), or crops at the refined boxes -> a head for each stage -> codes (., K)
      -> training: of all queries where matching compares them, else of matched ones; distances and dice losses
      -> inference: decoded maps (n, S, S) of the selected queries -> pasted into the boxes
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.detector import Detector
from querymask.common.losses import dice_loss
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY, MaskBranch
from querymask.common.mask_coding import AutoencoderMaskCoding, MaskCoding, coding_from_config
from querymask.common.mask_coding.targets import CodedTargets, encode_targets
from querymask.common.masks import Bands, paste_masks, pasted_bands
from querymask.common.matching import pad_targets
from querymask.common.precision import full_precision, without_autocast
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets, loss_terms
from querymask.common.transfer import instances_to_device
from querymask.istr.crops import clipped_boxes, crop_at_predictions
from querymask.istr.mask_head import MaskCode, build_mask_head

MASK_COSTS = ("cosine", "l1", "dice", "none")
VECTOR_LOSSES = ("l2", "smooth_l1")
MASK_TARGETS = ("ground_truth", "predicted")
_DICE_EPS = 1e-5

Codes = Sequence[MaskCode] | None
"""Of all queries (B * Q rows), by layer; None: heads run on chosen queries when they are asked."""


@MASK_BRANCH_REGISTRY.register()
class CodeBranch(MaskBranch):
    """Mask codes of queries.

    Args:
        heads: of the layers, each a module of ``mask_head.py``.
        coding: of the masks.
        cost: weight of the matching cost.
        weights: of ``loss_vector`` and ``loss_dice``.
        mask_cost: "cosine" or "l1" of the vectors, "dice" of the masks, "none".
        vector_loss: "l2" or "smooth_l1".
        mask_target: masks are cut out at the "ground_truth" box or, for the losses, at the matched "predicted" one.
        paste_threshold: foreground of a pasted mask is what reaches it.
        num_trained_layers: layers, from the last one on, that have losses.
    """

    sections = ("MASK_BRANCH.CODE", "MASK_CODING")
    needs_boxes = True

    def __init__(
        self,
        heads: Sequence[nn.Module],
        coding: MaskCoding,
        *,
        cost: float = 2.0,
        weights: Mapping[str, float],
        mask_cost: str = "cosine",
        vector_loss: str = "l2",
        mask_target: str = "ground_truth",
        paste_threshold: float = 0.5,
        num_trained_layers: int | None = None,
    ) -> None:
        for key, value, choices in (
            ("COST", mask_cost, MASK_COSTS),
            ("LOSS", vector_loss, VECTOR_LOSSES),
            ("TARGET", mask_target, MASK_TARGETS),
        ):
            if value not in choices:
                raise ValueError(f"MODEL.MASK_BRANCH.CODE.{key} is {value!r}: choose one of {', '.join(choices)}")
        check_mask_cost(mask_cost, coding)
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.coding = coding
        self.cost = cost
        self.weights = dict(weights)
        self.mask_cost = mask_cost
        self.vector_loss = vector_loss
        self.mask_target = mask_target
        self.paste_threshold = paste_threshold
        for parameter in self.heads.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if num_trained_layers is not None:
            self.heads[: len(self.heads) - num_trained_layers].requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "CodeBranch":
        """What ``MODEL.MASK_BRANCH.CODE`` describes, for any detector with boxes."""
        code = cfg.MODEL.MASK_BRANCH.CODE
        if detector.static_matching and code.COST != "none":
            raise ValueError(
                f"the matching of {type(detector).__name__} follows from its anchors alone, so masks cannot have a "
                "cost: set MODEL.MASK_BRANCH.CODE.COST none"
            )
        coding = coding_from_config(cfg)
        heads = [
            build_mask_head(code.HEAD, coding, detector.width, code.HEAD_LAYERS, code.POOL_SIZE)
            for _ in range(detector.num_layers)
        ]
        return cls(
            heads,
            coding,
            cost=code.COST_WEIGHT,
            weights={"loss_vector": code.WEIGHT, "loss_dice": code.DICE_WEIGHT},
            mask_cost=code.COST,
            vector_loss=code.LOSS,
            mask_target=code.TARGET,
            paste_threshold=code.PASTE_THRESHOLD,
            num_trained_layers=detector.num_trained_layers,
        )

    # ---- Predictions ----------------------------------------------------------------------------------------------

    def forward(self, found: Predictions) -> Codes:
        """In training, the codes of all queries where matching or batch norms need them."""
        if not self.training or not (self.mask_cost != "none" or self.heads[0].uses_batch_statistics):
            return None
        batch, queries = found.logits.shape[1:3]
        device = found.hidden.device
        image = torch.arange(batch, device=device)[:, None].expand(-1, queries).flatten()
        query = torch.arange(queries, device=device).repeat(batch)
        return [self.predict(found, image, query, layer) for layer in range(found.num_layers)]

    def predict(self, found: Predictions, image: Tensor, query: Tensor, layer: int) -> MaskCode:
        """Codes of chosen queries (n,) of a layer, by the head that is its."""
        head = self.heads[layer - found.num_layers if layer >= 0 else layer]
        assert found.pyramid is not None
        hidden = found.hidden[layer, image, query]
        return head(hidden, found.pixel_boxes(image, query, layer), image, found.pyramid)

    def codes(self, found: Predictions, made: Codes, image: Tensor, query: Tensor, layer: int) -> MaskCode:
        """The same, from those of all queries where they are known."""
        if made is None:
            return self.predict(found, image, query, layer)
        return made[layer][image * found.logits.shape[2] + query]

    # ---- Targets and matching -------------------------------------------------------------------------------------

    def encode(self, targets: Targets, found: Predictions) -> CodedTargets:
        """See :class:`MaskBranch`."""
        keep = not self.coding.is_random and not self.coding.uses_batch_statistics
        return encode_targets(self.coding, targets, full_precision(found.logits).dtype, keep)

    def costs(self, found: Predictions, made: Codes, truth: CodedTargets, targets: Targets) -> dict[str, Tensor]:
        """Distances of predicted masks or vectors to those at the ground-truth boxes."""
        if self.mask_cost == "none":
            return {}
        assert made is not None
        with without_autocast(found.logits.device):
            return {"mask cost": self.cost * self.distances(found.logits.shape, made, truth, targets)}

    def distances(
        self, shape: Sequence[int], made: Sequence[MaskCode], truth: CodedTargets, targets: Targets
    ) -> Tensor:
        """(N, B, Q, T); ``shape`` begins with N, B, Q."""
        if self.mask_cost == "dice":
            maps = torch.stack([code.decode(self.coding).flatten(1) for code in made])
            maps = maps.unflatten(1, tuple(shape[1:3]))  # (N, B, Q, S * S)
            wanted = pad_targets(truth.crops.flatten(1).to(maps.dtype), targets.counts)
            product = maps @ wanted.transpose(1, 2)
            squares = maps.square().sum(-1)[..., None] + wanted.square().sum(-1)[:, None]
            return 1 - 2 * product / (squares + _DICE_EPS)
        predicted = full_precision(torch.stack([code.vectors for code in made])).unflatten(1, tuple(shape[1:3]))
        wanted = self.padded_vectors(truth, targets, len(predicted)).to(predicted.dtype)
        if self.mask_cost == "l1":
            return torch.cdist(predicted, wanted.expand(len(predicted), -1, -1, -1), p=1) / self.coding.length
        cosine = F.normalize(predicted, dim=-1) @ F.normalize(wanted, dim=-1).transpose(-1, -2)
        return -(cosine + 1) / 2

    def padded_vectors(self, truth: CodedTargets, targets: Targets, stages: int) -> Tensor:
        """Vectors of the targets (N or 1, B, T, K): another draw for every stage where the coding is random."""
        if truth.vectors is not None:
            return pad_targets(truth.vectors, targets.counts)[None]
        draws = stages if self.coding.is_random else 1
        vectors = self.coding.encode(truth.crops.repeat(draws, 1, 1)).view(draws, len(truth.crops), self.coding.length)
        return pad_targets(vectors.transpose(0, 1), targets.counts).permute(2, 0, 1, 3)

    # ---- Losses ---------------------------------------------------------------------------------------------------

    def losses(
        self,
        found: Predictions,
        made: Codes,
        truth: CodedTargets,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """``loss_vector`` and ``loss_dice`` of every layer."""
        vectors, maps = self.mask_losses(found, made, truth, targets, assignment)
        values = {
            "loss_vector": vectors / (normalizers.targets * self.coding.length),
            "loss_dice": maps / normalizers.targets,
        }
        return [
            term
            for name, value in values.items()
            for term in loss_terms(name, value, self.weights[name], assignment.num_layers)
        ]

    def mask_losses(
        self, found: Predictions, made: Codes, truth: CodedTargets, targets: Targets, assignment: Assignment
    ) -> tuple[Tensor, Tensor]:
        """Sums over the matches of a layer, (N,) each: distance of the vectors, dice loss of the decoded masks."""
        number = assignment.pairs_per_layer()
        layers = [slice(i * number, (i + 1) * number) for i in range(assignment.num_layers)]
        codes = [
            self.codes(found, made, assignment.image[part], assignment.query[part], i) for i, part in enumerate(layers)
        ]
        crops = self.target_crops(found, truth, targets, assignment)
        if self.coding.uses_batch_statistics:
            encoded, maps = [], []
            for i, part in enumerate(layers):
                with torch.no_grad():
                    if i > 0 and self.mask_cost in ("cosine", "l1"):
                        # The release encodes for every stage's matching: the same vectors, but running statistics move
                        self.coding.encode(truth.crops)
                    encoded.append(self.coding.encode(crops[part]))
                maps.append(codes[i].decode(self.coding))
            wanted, decoded = torch.cat(encoded), torch.cat(maps)
        else:
            wanted = self.target_vectors(truth, assignment, crops)
            decoded = MaskCode(torch.cat([code.vectors for code in codes])).decode(self.coding)
        vectors = full_precision(torch.cat([code.vectors for code in codes]))
        wanted = wanted.to(vectors.dtype)
        if self.vector_loss == "l2":
            distances = (vectors - wanted).square().sum(-1)
        else:
            distances = F.smooth_l1_loss(vectors, wanted, reduction="none", beta=1.0).sum(-1)
        dice = dice_loss(decoded, crops.to(decoded.dtype), eps=_DICE_EPS)
        return assignment.sum_layers(distances), assignment.sum_layers(dice)

    @torch.no_grad()
    def target_vectors(self, truth: CodedTargets, assignment: Assignment, crops: Tensor) -> Tensor:
        """(N * n, K): those of the matching where that is possible."""
        if self.mask_target == "ground_truth" and truth.vectors is not None:
            return truth.vectors[assignment.target]
        return self.coding.encode(crops)

    @torch.no_grad()
    def target_crops(self, found: Predictions, truth: CodedTargets, targets: Targets, assignment: Assignment) -> Tensor:
        """(N * n, S, S) bool: the matched masks, inside of the boxes that ``mask_target`` names."""
        if self.mask_target == "ground_truth":
            return truth.crops[assignment.target]
        return crop_at_predictions(found, targets, assignment, self.coding.mask_size)

    # ---- Inference ------------------------------------------------------------------------------------------------

    def add_masks(
        self, found: Predictions, made: Codes, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """See :class:`MaskBranch`."""
        detections = instances_to_device(detections, found.hidden.device)
        queries = detections.pred_queries
        code = self.codes(found, made, torch.full_like(queries, image), queries, -1 if layer is None else layer)
        detections.pred_masks = paste_masks(
            code.decode(self.coding),
            detections.pred_boxes.tensor,
            *detections.image_size,
            self.paste_threshold,
        )
        return detections

    def bands(self, found: Predictions, made: Codes, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """See :class:`MaskBranch`; of codings without a limit, what is beyond 0 and 1 counts as these."""
        images = torch.full_like(queries, image)
        maps = self.codes(found, made, images, queries, -1).decode(self.coding).clamp(0, 1)
        return pasted_bands(maps, clipped_boxes(found, images, queries, -1), found.canvas.size[1])


def check_mask_cost(mask_cost: str, coding: MaskCoding) -> None:
    """Refuse what would decode all queries by a network.

    Raises:
        ValueError: the dice cost with the autoencoder.
    """
    if mask_cost == "dice" and isinstance(coding, AutoencoderMaskCoding):
        raise ValueError(
            "MODEL.MASK_BRANCH.CODE.COST 'dice' would decode the masks of all queries by the autoencoder's network: "
            "choose 'cosine', 'l1' or 'none', or another MODEL.MASK_CODING.NAME"
        )
