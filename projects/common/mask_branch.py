"""How a query becomes a mask: the interface of mask branches, and their registry."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from fvcore.common.registry import Registry
from torch import Tensor, nn

from querymask.common.detector import Detector
from querymask.common.masks import Bands
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets

MASK_BRANCH_REGISTRY = Registry("MASK_BRANCH")
MASK_BRANCH_REGISTRY.__doc__ = "Classes whose ``from_config(cfg, detector, shapes)`` builds a :class:`MaskBranch`."


class MaskBranch(nn.Module):
    """Masks of a detector's queries.

    In training, in this order: ``forward`` once for all queries, ``encode`` the targets, ``costs`` for the matching,
    ``losses`` of the assigned queries. At inference ``forward``, then ``add_masks`` for the chosen queries of an image,
    or ``bands`` where the model is panoptic.

    Attributes:
        sections: of the config below ``MODEL`` that the branch reads.
        needs_boxes: of queries, so not every detector will do.
        size_divisibility: sides of a batch must be multiples of it; 0: any.
        finishes: ``add_masks`` leaves out what is empty, and orders what remains.
        capturable: ``forward`` neither waits for a GPU nor copies to it, so a CUDA graph can repeat it.
    """

    sections: tuple[str, ...] = ()
    needs_boxes: bool = False
    size_divisibility: int = 0
    finishes: bool = False
    capturable: bool = True

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode, detector: Detector, shapes: Mapping[str, ShapeSpec]) -> "MaskBranch":
        """Build what the config describes, on a detector and a backbone that gives maps of these shapes.

        Raises:
            ValueError: they do not go together; says why.
        """

    def forward(self, found: Predictions) -> Any:
        """What the masks of all queries are made of, computed once; None if there is no such thing."""
        return None

    @abstractmethod
    def encode(self, targets: Targets, found: Predictions) -> Any:
        """Targets in the form that costs and losses compare with; made once for all layers."""

    def costs(self, found: Predictions, made: Any, truth: Any, targets: Targets) -> dict[str, Tensor]:
        """What is added to the matching's costs, (N, B, Q, T) by name. Called without gradient.

        Args:
            made: of ``forward``.
            truth: of ``encode``.
        """
        return {}

    @abstractmethod
    def losses(
        self,
        found: Predictions,
        made: Any,
        truth: Any,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> list[LossTerm]:
        """Losses of the assigned queries; with a gradient for every parameter, also without targets."""

    @abstractmethod
    def add_masks(
        self, found: Predictions, made: Any, image: int, detections: Instances, layer: int | None = None
    ) -> Instances:
        """The detections of an image with ``pred_masks`` (n, height, width) bool at their image size.

        A branch may multiply scores by how sure it is of a mask.

        Args:
            made: of ``forward``.
            detections: of ``Detector.select``.
            layer: as there.
        """

    @abstractmethod
    def bands(self, found: Predictions, made: Any, image: int, queries: Tensor, labels: Tensor) -> Bands:
        """Probabilities of the masks of chosen queries of an image on the canvas, for panoptic segmentation.

        Args:
            made: of ``forward``.
            queries: (n,) of the last layer, each once.
            labels: (n,) their classes.
        """
