"""The exponential moving average of a model's weights, which often scores higher than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of the weights over the iterations, and of the statistics of batch norms.

    After iteration i it is ``d * average + (1 - d) * weights``, where d = min(decay, (1 + i) / (10 + i)) lets go of
    the first, random weights soon.

    Args:
        model: on its device.
        decay: between 0 and 1.

    Raises:
        ValueError: another decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY is {decay}: give a number between 0 (no average) and 1, as 0.9998")
        self.decay = decay
        self.tensors = {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            if value.is_floating_point() and (value.requires_grad or not isinstance(value, nn.Parameter))
        }
        self.others = {name: value.detach().clone() for name, value in self.tensors.items()}
        self.is_applied = False

    @torch.no_grad()
    def reset(self) -> None:
        """Begin with the model's present weights."""
        torch._foreach_copy_(list(self.others.values()), list(self.tensors.values()))

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after an iteration, counted from 0."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(self.others.values()), [value.detach() for value in self.tensors.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average; afterwards its own weights again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, value in self.tensors.items():
            value.data, self.others[name] = self.others[name], value.data
        self.is_applied = not self.is_applied

    def training_weights(self) -> dict[str, Tensor]:
        """The model's own weights, also while the average is applied: what a checkpoint needs beside the average."""
        return {name: x.detach() for name, x in (self.others if self.is_applied else self.tensors).items()}

    @torch.no_grad()
    def restore(self, training_weights: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint: the average is what the model has now, and the model gets the weights."""
        self.reset()
        restore_weights(self.tensors, training_weights)


@torch.no_grad()
def restore_weights(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names.

    Raises:
        ValueError: they are of another model.
    """
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(
                f"the weights in training that the checkpoint has beside their average do not fit the model: {name}. "
                "Start from the average: without --resume, with MODEL.WEIGHTS"
            )
        tensors[name].copy_(value)
