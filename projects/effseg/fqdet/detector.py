"""FQDet (Picron et al., "FQDet: Fast-converging Query-based Detector", https://arxiv.org/abs/2210.02318) and FQDetV2,
the detector of EffSeg's release: a dense head picks anchors, and a transformer's decoder refines their features.

Data flow (B images, A anchors, S cells of all maps, Q queries, C width, K classes)::

    maps P_l (B, C, H_l, W_l)
      -> selector on every map: logits of anchors (B, A) -> the highest Q of each image
      -> feature at the anchor's cell -> transition, one for each shape of anchor -> queries (B, Q, C)
      -> decoder layers: deformable attention around the anchor, self-attention, feed-forward network
      -> class head (B, Q, K + 1), box head (B, Q, 4): deltas from the anchors

Anchors are fixed: boxes are not refined between layers, and only the last layer has heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from querymask.common.boxes import clip_boxes
from querymask.common.deformable_attention import flatten_levels
from querymask.common.detector import Detector, keep_rows
from querymask.common.images import Canvas
from querymask.common.meta_arch import feature_shapes
from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision, without_autocast
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Targets
from querymask.common.processes import TOGETHER, Processes
from querymask.common.pyramid import FeaturePyramid, group_rows
from querymask.common.transfer import instances_to_device, numbers_to_device
from querymask.effseg.fqdet.anchors import ANCHORS_PER_CELL, apply_deltas, make_anchors
from querymask.effseg.fqdet.criterion import FQDetCriterion
from querymask.effseg.fqdet.layers import FQDetLayer, NormActLinear, Residual, Selector
from querymask.effseg.fqdet.predictions import FQDetAssignment, FQDetPredictions
from querymask.effseg.fqdet.suppression import CANDIDATES, detect, suppress_queries
from querymask.effseg.neck import build_neck

LOSS_REDUCTIONS = ("global", "local")


class FQDet(Detector):
    """The detector.

    Args:
        in_features: names of the backbone's maps, fine to coarse.
        neck: these maps -> those of the levels, (B, C, H_l, W_l).
        criterion: matching and losses.
        width: C of maps and queries.
        levels: l of each map, fine to coarse; its cells have sides of 2^l pixels.
        num_queries: Q.
        num_classes: K.
        num_layers, num_heads, num_points, ffn_dim: of the decoder.
        version: 1 for the paper's model: encodings of the anchors are added to the queries, class and box head have
            residual layers. 2 for the release's: no encodings, the class head is linear, the box head a plain MLP.
        nms_threshold: IoU with a better pair of the same class above which a pair of query and class is left out.
        detections_per_image: pairs that are kept.
        processes: whose images are one batch.
    """

    static_matching = True
    capturable = False

    def __init__(
        self,
        in_features: Sequence[str],
        neck: nn.Module,
        criterion: FQDetCriterion,
        width: int = 256,
        levels: Sequence[int] = (2, 3, 4, 5, 6, 7),
        num_queries: int = 300,
        num_classes: int = 80,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 1,
        ffn_dim: int = 1024,
        version: int = 1,
        nms_threshold: float = 0.65,
        detections_per_image: int = 100,
        processes: Processes = TOGETHER,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"FQDet has the versions 1 and 2, not {version}")
        self.in_features = list(in_features)
        self.neck = neck
        self.criterion = criterion
        self.width = width
        self.num_layers = 1
        self.num_classes = num_classes
        self.levels = tuple(levels)
        self.strides = tuple(2**level for level in levels)
        self.num_queries = num_queries
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.processes = processes
        self.selector = Selector(width)
        self.transitions = nn.ModuleList(NormActLinear(width, width) for _ in range(ANCHORS_PER_CELL))
        self.layers = nn.ModuleList(
            FQDetLayer(width, num_heads, len(levels), num_points, ffn_dim) for _ in range(num_layers)
        )
        if version == 1:
            self.anchor_encoder = nn.Sequential(nn.Linear(4, width), Residual(NormActLinear(width, width)))
            self.class_head, self.box_head = (
                nn.Sequential(NormActLinear(width, width), Residual(NormActLinear(width, width)), nn.Linear(width, out))
                for out in (num_classes + 1, 4)
            )
        else:
            self.anchor_encoder = None
            self.class_head = nn.Linear(width, num_classes + 1)
            self.box_head = nn.Sequential(
                nn.Linear(width, width),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, 4),
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> "FQDet":
        """What ``MODEL.EFFSEG`` describes."""
        effseg = cfg.MODEL.EFFSEG
        own = feature_shapes(shapes, effseg.IN_FEATURES)
        check_levels(effseg.IN_FEATURES, [shape.stride for shape in own], effseg.LEVELS)
        return cls(
            in_features=effseg.IN_FEATURES,
            neck=build_neck(effseg, [shape.channels for shape in own]),
            criterion=FQDetCriterion(effseg.VERSION, effseg.SELECTION_WEIGHT, effseg.CLASS_WEIGHT, effseg.BOX_WEIGHT),
            width=effseg.HIDDEN_DIM,
            levels=effseg.LEVELS,
            num_queries=effseg.NUM_QUERIES,
            num_classes=effseg.NUM_CLASSES,
            num_layers=effseg.DEC_LAYERS,
            num_heads=effseg.NUM_HEADS,
            num_points=effseg.DEC_POINTS,
            ffn_dim=effseg.DIM_FEEDFORWARD,
            version=effseg.VERSION,
            nms_threshold=effseg.NMS_THRESHOLD,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            processes=loss_processes(effseg.LOSS_REDUCTION),
        )

    def forward(self, features: Mapping[str, Tensor], canvas: Canvas) -> FQDetPredictions:
        """See :class:`Detector`."""
        maps = self.neck([features[name] for name in self.in_features])
        found = self.decode(maps, canvas.size)
        return replace(found, canvas=canvas, features=features, pyramid=FeaturePyramid(maps, self.strides))

    def decode(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> FQDetPredictions:
        """Detect.

        Args:
            maps: (B, C, H_l, W_l) for every level, fine to coarse.
            image_size: (height, width) of the padded images.

        Raises:
            ValueError: not as many maps as levels, or fewer anchors than queries.
        """
        if len(maps) != len(self.levels):
            raise ValueError(f"FQDet is built for the levels {self.levels}, got {len(maps)} maps")
        shapes = tuple((feature.shape[2], feature.shape[3]) for feature in maps)
        tokens = flatten_levels(maps)
        anchors = make_anchors(shapes, self.levels, tokens)
        if anchors.shape[0] < self.num_queries:
            raise ValueError(
                f"an image of {image_size[0]} x {image_size[1]} has {anchors.shape[0]} anchors, fewer than the "
                f"{self.num_queries} queries: use larger images or fewer queries"
            )
        logits = full_precision(self.selector(maps))
        selected = logits.detach().topk(self.num_queries, dim=1).indices.sort(dim=1).values
        queries = full_precision(self._transit(tokens, selected))  # and so are the sums along the layers
        query_anchors = anchors[selected]
        sides = numbers_to_device([image_size[1], image_size[0]] * 2, query_anchors.dtype, query_anchors.device)
        relative = query_anchors / sides
        with without_autocast(tokens.device):
            positions = None if self.anchor_encoder is None else self.anchor_encoder(relative)
        for layer in self.layers:
            queries = layer.run(queries, positions, relative, tokens, shapes)
        deltas = full_precision(self.box_head(queries))
        class_logits = full_precision(self.class_head(queries))
        return FQDetPredictions(
            logits=class_logits[None],
            hidden=queries[None],
            selection_logits=logits,
            anchors=anchors,
            selected=selected,
            deltas=deltas,
            boxes=apply_deltas(query_anchors, deltas),
        )

    def _transit(self, tokens: Tensor, selected: Tensor) -> Tensor:
        """The features at the selected anchors' cells, through the layer of each anchor's shape."""
        cells = (selected // ANCHORS_PER_CELL)[..., None].expand(-1, -1, tokens.shape[2])
        features = tokens.gather(1, cells).flatten(0, 1)
        queries = run_own(self.transitions, features, (selected % ANCHORS_PER_CELL).flatten())
        return queries.unflatten(0, selected.shape)

    @torch.no_grad()
    def match(
        self, found: FQDetPredictions, targets: Targets, mask_costs: Mapping[str, Tensor] | None = None
    ) -> FQDetAssignment:
        """See :class:`Detector`; anchors alone decide, so there must be no costs."""
        assert not mask_costs
        return self.criterion.match(found, targets)

    def normalizers(self, targets: Targets, assignment: Assignment) -> Normalizers:
        """Sums are divided by nothing; the mean over the processes is to be the sum of the whole batch."""
        share = targets.boxes.new_full((), 1 / self.processes.count)
        return Normalizers(share, share)

    def losses(
        self, found: FQDetPredictions, targets: Targets, assignment: FQDetAssignment, normalizers: Normalizers
    ) -> list[LossTerm]:
        """See :class:`Detector`."""
        terms = self.criterion.losses(found, targets, assignment)
        return [replace(term, value=term.value / normalizers.targets) for term in terms]

    def select(self, found: FQDetPredictions, image: int, size: tuple[int, int], layer: int | None = None) -> Instances:
        """The pairs of query and class that count, by descending probability, on the host; boxes are clipped."""
        detections = detect(
            full_precision(found.logits[0, image]),
            found.boxes[image],
            self.nms_threshold,
            self.detections_per_image,
            drop_empty=not self.masks_follow,  # the release's segmentation heads do not
        )
        height, width = found.image_sizes[image]
        boxes = Boxes(detections.boxes.clone())
        clip_boxes(boxes, (height, width))
        boxes.scale(size[1] / width, size[0] / height)
        instances = Instances(size)
        instances.pred_boxes = boxes
        instances.scores = detections.scores
        instances.pred_classes = detections.labels
        instances.pred_queries = detections.queries
        return instances

    def class_scores(self, found: FQDetPredictions, image: int) -> Tensor:
        """Without "no object"; see :class:`Detector`."""
        return super().class_scores(found, image)[:, :-1]

    def select_queries(self, found: FQDetPredictions, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those that NMS leaves; see :class:`Detector`."""
        queries, labels, scores = (x[:CANDIDATES] for x in super().select_queries(found, image))
        return suppress_queries(queries, labels, scores, found.boxes[image, queries], self.nms_threshold)

    def finish(self, detections: Instances) -> Instances:
        """Those whose boxes are not empty."""
        kept = keep_rows(detections, detections.pred_boxes.nonempty())
        return instances_to_device(kept, self.selector.projection.weight.device)


def _run_all(layers: Sequence[nn.Module], rows: Tensor, numbers: Tensor) -> Tensor:
    results = torch.stack([layer(rows) for layer in layers], dim=1)
    return results.gather(1, numbers[:, None, None].expand(-1, 1, results.shape[2]))[:, 0]


@exportable(_run_all, compiled=True)
def run_own(layers: Sequence[nn.Module], rows: Tensor, numbers: Tensor) -> Tensor:
    """Each of the rows (n, C) through the layer of its number (n,)."""
    own = group_rows(numbers, len(layers))
    return torch.cat([layer(rows[group]) for layer, group in zip(layers, own)])[torch.cat(own).argsort()]


def loss_processes(reduction: str) -> Processes:
    """Whose images are one batch: those of all processes ("global") or of each by itself ("local").

    Raises:
        ValueError: it is neither.
    """
    if reduction not in LOSS_REDUCTIONS:
        choices = ", ".join(LOSS_REDUCTIONS)
        raise ValueError(f"MODEL.EFFSEG.LOSS_REDUCTION is {reduction!r}: choose one of {choices}")
    return Processes(together=reduction == "global")


def check_levels(in_features: Sequence[str], strides: Sequence[int], levels: Sequence[int]) -> None:
    """Whether the pyramid's levels continue those of the backbone's maps.

    Raises:
        ValueError: they do not.
    """
    own = [stride.bit_length() - 1 for stride in strides]
    wanted = [*own, *range(own[-1] + 1, own[-1] + 1 + len(levels) - len(own))] if own else []
    if list(levels) != wanted or not own:
        raise ValueError(
            f"MODEL.EFFSEG.LEVELS is {list(levels)}, but the backbone's maps {list(in_features)} are of the "
            f"levels {own}: the pyramid has these and the ones that follow them"
        )
