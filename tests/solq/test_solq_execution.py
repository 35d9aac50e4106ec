"""Other ways to run SOLQ than eagerly in float32: mixed precision, export, inference mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.structures import ImageList
from torch import nn

from querymask.common.predictions import Targets

MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

SIZE = (64, 96)


@pytest.mark.parametrize("form", [{}, {"TWO_STAGE": True}, {"BOX_REFINE": False}])
def test_training_under_autocast(make_model: MakeModel, make_batch: MakeBatch, form: dict[str, bool]) -> None:
    """The losses are float32 and near those of float32, gradients are finite."""
    model, batch = make_model(**form), make_batch([3, 0], [SIZE, (56, 80)])
    expected = model(batch)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        losses = model(batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.1), name
    assert losses != expected, "autocast must have changed something"
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("form", [{}, {"TWO_STAGE": True}, {"BOX_REFINE": False}])
def test_positions_under_autocast(make_model: MakeModel, make_batch: MakeBatch, form: dict[str, bool]) -> None:
    """References, boxes, sums along the layers and targets stay in float32; learned references do not even change."""
    model, batch = make_model(**form).eval(), make_batch([3, 0], [SIZE, (56, 80)])
    with torch.no_grad():
        images = model.preprocess(batch)
        exact, _ = model.predict(images)
        targets = Targets.from_inputs(batch, model.device, with_masks=True)
        truth = model.mask_branch.encode(targets, exact)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            found, _ = model.predict(images)
            low_truth = model.mask_branch.encode(targets, found)
    for tensor in (found.memory, found.hidden, found.boxes, *found.references):
        assert tensor.dtype == torch.float32
    if not form.get("TWO_STAGE"):
        assert torch.equal(found.references[0], exact.references[0])
        assert (found.boxes - exact.boxes).abs().max() < 0.02
    assert torch.equal(low_truth.vectors, truth.vectors) and torch.equal(low_truth.crops, truth.crops)


def test_detection_under_autocast(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
        (result,) = model(make_batch([0]))
    instances = result["instances"]
    assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32
    assert instances.pred_masks.dtype == torch.bool and len(instances) == 9


def test_training_after_inference_mode(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Nothing that inference leaves behind may hinder training; the size is met by no other test."""
    model, batch = make_model(), make_batch([1], [(48, 112)])
    with torch.inference_mode():
        model.eval()(batch)
    sum(model.train()(batch).values()).backward()


class Network(nn.Module):
    """Normalised images (B, 3, H, W) of one size -> logits, boxes and mask vectors of the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [tuple(images.shape[-2:])] * len(images)
        found, _ = self.model.predict(ImageList(images, sizes))
        return found.logits[-1], found.boxes[-1], self.model.mask_branch.vector_embed(found.hidden[-1])


def test_export(make_model: MakeModel) -> None:
    """The exported program gives what eager execution gives, also on other pixels; that goes on working."""
    network = Network(make_model(ENC_LAYERS=1, DEC_LAYERS=1).eval())
    generator = torch.Generator().manual_seed(0)
    example, image = torch.randn(2, 1, 3, *SIZE, generator=generator).to(network.model.device)
    program = torch.export.export(network, (example,)).module()
    with torch.no_grad():
        outputs = program(image)
        for actual, expected in zip(outputs, network(image), strict=True):
            assert actual.shape == expected.shape
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[0], program(example)[0])
