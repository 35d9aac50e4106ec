"""What flows between the parts of a model: targets, what a detector found, and losses. Plain data, no modules.

Letters: B images, N decoder layers or stages, Q queries, C width, K classes, T targets of an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from querymask.common.images import Canvas
from querymask.common.masks import instance_masks
from querymask.common.pyramid import FeaturePyramid
from querymask.common.transfer import instances_to_device, numbers_to_device


@dataclass
class Targets:
    """Ground truth of a batch, concatenated over its images.

    Attributes:
        counts: number of targets of every image.
        labels: (sum of counts,) class indices.
        boxes: (sum of counts, 4) x0, y0, x1, y1 in pixels of the network's input.
        image_sizes: (height, width) of every image without padding.
        masks: (T, H, W) bool of every image; empty where no mask is wanted.
        images: how to name the images in an error.
    """

    counts: Sequence[int]
    labels: Tensor
    boxes: Tensor
    image_sizes: Sequence[tuple[int, int]]
    masks: Sequence[Tensor] = ()
    images: Sequence[str] = ()

    @classmethod
    def from_inputs(
        cls,
        batched_inputs: Sequence[Mapping[str, Any]],
        device: torch.device,
        with_masks: bool,
        with_boxes: bool = True,
    ) -> "Targets":
        """Of Detectron2's model inputs; boxes are zeros where none are wanted.

        Raises:
            ValueError: masks are wanted, and there are none.
        """
        instances = [instances_to_device(item["instances"], device) for item in batched_inputs]
        labels = torch.cat([x.gt_classes for x in instances])
        boxes = torch.cat([x.gt_boxes.tensor for x in instances]) if with_boxes else labels.new_zeros(len(labels), 4)
        return cls(
            counts=[len(x) for x in instances],
            labels=labels,
            boxes=boxes,
            image_sizes=[tuple(x.image_size) for x in instances],
            masks=[instance_masks(x) for x in instances] if with_masks else (),
            images=[str(item.get("file_name", f"image {i} of the batch")) for i, item in enumerate(batched_inputs)],
        )

    @property
    def starts(self) -> list[int]:
        """Index of every image's first target."""
        return [sum(self.counts[:image]) for image in range(len(self.counts))]

    def sides(self, dtype: torch.dtype) -> Tensor:
        """(sum of counts, 4): width, height, width, height of each target's image."""
        rows = [[width, height] * 2 for (height, width), n in zip(self.image_sizes, self.counts) for _ in range(n)]
        return numbers_to_device(rows, dtype, self.boxes.device).view(-1, 4)


@dataclass(frozen=True)
class Assignment:
    """Pairs of queries and targets.

    With several layers, every layer has the same number n of pairs; pairs are ordered by layer, image and query, so a
    vector over pairs viewed as (N, n) has a row per layer.

    Attributes:
        layer, image, query: (N * n,) indices of the prediction.
        target: (N * n,) index among the concatenated targets of the batch.
        num_layers: N.
        image_pairs: number of every image's pairs in a layer, where the host knows it.
        proposals: of what a two-stage detector proposes, where it does.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    num_layers: int
    image_pairs: Sequence[int] | None = None
    proposals: "Assignment | None" = None

    def pairs_per_layer(self) -> int:
        """n."""
        return len(self.layer) // self.num_layers

    def select(self, predictions: Tensor) -> Tensor:
        """(N, B, Q, ...) -> (N * n, ...)."""
        return predictions[self.layer, self.image, self.query]

    def sum_layers(self, values: Tensor) -> Tensor:
        """Sum over the pairs of a layer: (N * n,) -> (N,)."""
        return values.view(self.num_layers, -1).sum(1)

    def pairs_of_images(self, num_images: int) -> list[int]:
        """Number of every image's pairs in a layer; a GPU is asked for it only if the host does not know."""
        if self.image_pairs is not None:
            return list(self.image_pairs)
        return self.image[: self.pairs_per_layer()].bincount(minlength=num_images).tolist()

    def last(self) -> "Assignment":
        """The last layer's pairs, as those of one layer."""
        return self.since(self.num_layers - 1)

    def since(self, layer: int) -> "Assignment":
        """The pairs of a layer and those after it; ``layer`` counts on from 0."""
        start = layer * self.pairs_per_layer()
        return Assignment(
            self.layer[start:] - layer,
            self.image[start:],
            self.query[start:],
            self.target[start:],
            self.num_layers - layer,
            self.image_pairs,
        )


@dataclass
class Normalizers:
    """What sums over this process's part of a batch are divided by.

    Averages over the processes, so that gradients averaged by DDP are those of the whole batch in one process.

    Attributes:
        targets: number of targets.
        pairs: number of matched pairs of a layer.
    """

    targets: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class LossTerm:
    """One loss.

    Attributes:
        name: such as "loss_bbox".
        value: (,) before its weight.
        weight: that the total gives it.
        layer: that it is of; None for the last layer, "enc" for proposals.
    """

    name: str
    value: Tensor
    weight: float = 1.0
    layer: int | str | None = None

    @property
    def key(self) -> str:
        """In logs: ``loss_bbox`` for the last layer, ``loss_bbox_0`` for the first."""
        return self.name if self.layer is None else f"{self.name}_{self.layer}"


def loss_terms(name: str, values: Tensor, weight: float, num_layers: int) -> list[LossTerm]:
    """Terms of the last layers.

    Args:
        values: (n,) of as many layers as there are values, the last value being the last layer's.
        num_layers: N.
    """
    first = num_layers - len(values)
    layers = [*range(first, num_layers - 1), None]
    return [LossTerm(name, value, weight, layer) for value, layer in zip(values.unbind(), layers, strict=True)]


def weighted(terms: Iterable[LossTerm]) -> dict[str, Tensor]:
    """Losses by key, times their weights."""
    terms = list(terms)
    # One call; of each loss the gradient reaches what it depends on, and nothing else
    values = torch._foreach_mul([term.value for term in terms], [term.weight for term in terms])
    return {term.key: value for term, value in zip(terms, values, strict=True)}


def unweighted(terms: Iterable[LossTerm]) -> dict[str, Tensor]:
    """Losses by key, before their weights."""
    return {term.key: term.value for term in terms}


@dataclass
class Predictions:
    """What a detector says about a batch. Detectors have subclasses with what only they know.

    Attributes:
        logits: (N, B, Q, K) of the layers that have losses.
        hidden: (N, B, Q, C) what the queries have become.
        canvas: of the batch.
        image_sizes: (height, width) of every image without padding.
        features: maps of the backbone by name.
        pyramid: maps of the detector, C wide.
    """

    logits: Tensor
    hidden: Tensor
    canvas: Canvas | None = None
    image_sizes: Sequence[tuple[int, int]] = ()
    features: Mapping[str, Tensor] = field(default_factory=dict)
    pyramid: FeaturePyramid | None = None

    @property
    def num_layers(self) -> int:
        """N."""
        return len(self.logits)

    def pixel_boxes(self, image: Tensor, query: Tensor, layer: Tensor | int = -1) -> Tensor:
        """Boxes (n, 4) x0, y0, x1, y1 in pixels of the network's input, not clipped, of chosen queries (n,)."""
        raise NotImplementedError(f"{type(self).__name__} has no boxes")

    def positions(self) -> Tensor:
        """(N, B, Q, 2) or (1, B, Q, 2): where queries are, x and y relative to the images without padding."""
        raise NotImplementedError(f"{type(self).__name__} has no positions")
