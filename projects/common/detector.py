"""How queries find objects: the interface of detectors."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from querymask.common.images import Canvas
from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets
from querymask.common.processes import TOGETHER, Processes
from querymask.common.transfer import to_device


class Detector(nn.Module):
    """From maps of a backbone to classes and, with most, boxes of queries.

    Attributes:
        width: C of hidden states and pyramid.
        num_layers: N, the layers of hidden states at inference.
        num_classes: K, without one for "no object".
        strides: of the pyramid's levels, in pixels.
        size_divisibility: sides of a batch must be multiples of it; 0: any.
        has_boxes: queries have boxes.
        processes: whose images are one batch, where losses are sums over it.
        static_matching: the assignment does not depend on costs, to which a mask branch might add.
        masks_follow: a mask branch gets what is selected.
        capturable: ``forward`` neither waits for a GPU nor copies to it, so a CUDA graph can repeat it.
    """

    width: int
    num_layers: int
    num_classes: int
    strides: tuple[int, ...]
    size_divisibility: int = 0
    has_boxes: bool = True
    processes: Processes = TOGETHER
    static_matching: bool = False
    masks_follow: bool = False
    capturable: bool = True

    @property
    def num_trained_layers(self) -> int:
        """How many of the layers, from the last one on, have losses."""
        return self.num_layers

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> "Detector":
        """Build what the config describes, on a backbone that gives maps of these shapes."""

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor], canvas: Canvas) -> Predictions:
        """Run the network.

        Args:
            features: maps of the backbone by name.
            canvas: of the batch.
        """

    @abstractmethod
    def match(self, found: Predictions, targets: Targets, mask_costs: Mapping[str, Tensor]) -> Assignment:
        """Assign targets to queries, without gradient.

        Args:
            mask_costs: (N, B, Q, T) by name: what the mask branch adds to the costs.
        """

    @abstractmethod
    def normalizers(self, targets: Targets, assignment: Assignment) -> Normalizers:
        """What the losses of this detector, and those of a mask branch, are divided by."""

    @abstractmethod
    def losses(
        self, found: Predictions, targets: Targets, assignment: Assignment, normalizers: Normalizers
    ) -> list[LossTerm]:
        """Losses of classes and boxes."""

    @abstractmethod
    def select(self, found: Predictions, image: int, size: tuple[int, int], layer: int | None = None) -> Instances:
        """The detections of an image before they have masks.

        Args:
            size: (height, width) to which boxes are scaled.
            layer: of the queries; None: the last one, or what the config asks for.

        Returns:
            ``scores``, ``pred_classes``, ``pred_queries`` and, with boxes, ``pred_boxes``; on the model's device or on
            the host.
        """

    def class_scores(self, found: Predictions, image: int) -> Tensor:
        """(Q, K) probabilities of the classes of an image's queries."""
        return full_precision(found.logits[-1, image]).sigmoid()

    def select_queries(self, found: Predictions, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of an image that may be segments of a panoptic map, each with its best class.

        Returns:
            queries (n,), classes (n,) and scores (n,) in descending order, on the model's device. While a model is
            exported, rows with -1 as class and score may fill them up to a fixed number.
        """
        scores, classes = self.class_scores(found, image).max(1)
        order = descending_order(scores)
        return order, classes[order], scores[order]

    def finish(self, detections: Instances) -> Instances:
        """The detections that stay once they have masks, in their order."""
        return detections

    @torch.no_grad()
    def statistics(self, found: Predictions, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """What is logged beside the losses; scalars by name, the same names at every call."""
        return {}


def _descending_order_by_pairs(scores: Tensor) -> Tensor:
    rows = torch.arange(len(scores), device=scores.device)
    ahead = (scores > scores[:, None]) | ((scores == scores[:, None]) & (rows < rows[:, None]))
    return ahead.sum(1).argsort()


@exportable(_descending_order_by_pairs)
def descending_order(scores: Tensor) -> Tensor:
    """Numbers (n,) of the scores (n,) from the highest to the lowest, equal ones in their own order."""
    return scores.argsort(descending=True, stable=True)


def _mark_left_out(instances: Instances, kept: Tensor) -> Instances:
    instances.scores = instances.scores.where(kept, -1)
    return instances


@exportable(_mark_left_out)
def keep_rows(instances: Instances, kept: Tensor) -> Instances:
    """The detections (n) that are marked in ``kept`` (n,) bool, which is on the host: a GPU would be waited for."""
    return instances[to_device(kept.nonzero().flatten(), instances.scores.device)]


def select_top_scores(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (query, class) pairs of one image; a query may appear with several classes.

    Args:
        scores: (Q, K).
        count: how many, limited by Q * K.

    Returns:
        scores (n,) in descending order, queries (n,), classes (n,).
    """
    num_classes = scores.shape[1]
    best, index = scores.flatten().topk(min(count, scores.numel()))
    return best, torch.div(index, num_classes, rounding_mode="floor"), index % num_classes
