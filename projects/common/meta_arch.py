"""What the meta-architectures share: from Detectron2's inputs to a padded batch, and on to losses or detections."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from torch import nn

from querymask.common.cuda_graphs import CudaGraphs, build_cuda_graphs
from querymask.common.images import batch_images


class QuerySegmenter(nn.Module):
    """A model that turns queries into instances; subclasses say how.

    Args:
        backbone: the first module of the network.
        pixel_mean, pixel_std: per channel, for pixels in 0..255.
        size_divisibility: height and width of a batch are multiples of it; 0: the largest height and width.
        graphs: what repeats the network in inference; None: it is run as it is.
        graph_divisibility: with graphs, height and width are multiples of it, too.
    """

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = 0,
        graphs: CudaGraphs | None = None,
        graph_divisibility: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.size_divisibility = size_divisibility
        self.graphs = graphs
        self.graph_divisibility = graph_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor] | list[dict[str, Instances]]:
        """Detectron2's contract: weighted losses in training, ``{"instances": Instances}`` per image otherwise."""
        images = self.preprocess(batched_inputs)
        if self.training:
            return self.training_losses(images, batched_inputs)
        sizes = [
            (item.get("height", size[0]), item.get("width", size[1]))
            for item, size in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        return [{"instances": instances} for instances in self.inference(images, sizes)]

    def preprocess(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Normalise, then pad with zeros at the right and the bottom to one size."""
        divisibility = self.size_divisibility
        if self.graphs is not None and not self.training:
            divisibility = math.lcm(max(divisibility, 1), self.graph_divisibility)
        return batch_images(batched_inputs, self.pixel_mean, self.pixel_std, divisibility)

    def predict(self, images: ImageList) -> Any:
        """Run the network on a batch of normalised images."""
        return self.network(*self.network_inputs(images))

    def predict_for_inference(self, images: ImageList) -> Any:
        """``predict``, as a CUDA graph where those are on: then the next call overwrites the tensors of this one."""
        if self.graphs is None:
            return self.predict(images)
        return self.graphs(self.network, *self.network_inputs(images))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if self.graphs is not None:
            self.graphs.clear()  # parameters move
        return super()._apply(fn, recurse)

    def network_inputs(self, images: ImageList) -> tuple[Any, ...]:
        """What ``network`` reads of a batch: tensors on the device, and constants."""
        raise NotImplementedError(f"{type(self).__name__} has no network that can be a CUDA graph")

    def network(self, *inputs: Any) -> Any:
        """From ``network_inputs`` to predictions, without a wait for the device or a copy from the host."""
        raise NotImplementedError(f"{type(self).__name__} has no network that can be a CUDA graph")

    @abstractmethod
    def training_losses(
        self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch of normalised images."""

    @abstractmethod
    def inference(self, images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of every image, scaled to (height, width) of ``sizes``."""


def graph_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of the constructor of :class:`QuerySegmenter` that follow from ``TEST.CUDA_GRAPHS``."""
    divisibility = cfg.TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY
    if divisibility < 1:
        raise ValueError(f"TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY is {divisibility}: set at least 1")
    return {"graphs": build_cuda_graphs(cfg), "graph_divisibility": divisibility}


def feature_channels(backbone: Backbone, names: Sequence[str]) -> list[int]:
    """Channels of the backbone's maps ``names``.

    Raises:
        ValueError: it does not give one of them.
    """
    shapes = backbone.output_shape()
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"IN_FEATURES names {missing}, but the backbone gives {sorted(shapes)}: name some of these, or have it "
            "give more by its OUT_FEATURES"
        )
    return [shapes[name].channels for name in names]


def image_names(batched_inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How to call the images of a batch in an error."""
    return [str(item.get("file_name", f"image {i} of the batch")) for i, item in enumerate(batched_inputs)]
