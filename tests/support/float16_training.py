"""Training in float16: what autocast cannot hold, and what its loss scale makes vanish, shows in the gradients."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from rounded_products import Choices
from torch import Tensor, nn

from querymask.common.engine.step import TrainingStep


def step_gradients(model: nn.Module, batches: Iterable[list[dict[str, Any]]], autocast: torch.dtype | None) -> Tensor:
    """Gradients of training steps of length zero, one for each batch: (steps, elements of all parameters) in float64.

    Asserts that all are finite, so that no step is lost and the loss scale is not halved.
    """
    batches = list(batches)
    step = TrainingStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), 0, autocast)
    gradients = []
    with EventStorage() as storage:
        for step.iter in range(len(batches)):
            storage.iter = step.iter
            step.run_step()
            trained = [x for x in model.parameters() if x.requires_grad]
            parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in trained]
            gradients.append(torch.cat([part.double().flatten() for part in parts]))
    finite = torch.stack(gradients).isfinite().all(dim=1)
    assert finite.all(), f"by step: {finite.tolist()}; the last loss scale is {step.grad_scaler.get_scale()}"
    return torch.stack(gradients)


def check_float16_training(
    model: nn.Module, batches: Iterable[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tolerance: float = 0.08
) -> None:
    """Assert that steps in float16 give the gradients of float32, all of them together, but for ``tolerance`` of them.

    Args:
        model: in float32, without dropout.
        batches: model inputs with instances.
    """
    choices = Choices()
    choices.install(monkeypatch)
    batches = list(batches)
    exact = step_gradients(model, batches, None)
    with choices.replayed():
        found = step_gradients(model, batches, torch.float16)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < error.max() < tolerance, f"errors {error.tolist()} of gradients of size {exact.norm(dim=1).tolist()}"
