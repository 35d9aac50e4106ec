"""``torch.compile`` of what models compute: in one graph, once for every size of a batch."""

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from mask_bases import give_basis
from tiny_configs import NUM_CLASSES, tiny_config
from tiny_models import spread_weights
from torch import nn
from torch._dynamo.testing import CompileCounter

from querymask.common.predictions import Predictions
from querymask.effseg.region_branch import RegionBranch

MODELS = (
    "solq/solq_r50",
    "solq/solq_r50_two_stage",
    "solq/sqr_r50",
    "isda/isda_r50",
    "istr/istr_r50",
    "istr/istr_v2_smt_r50",
    "effseg/effseg_r50",
    "effseg/effseg_r50_deform_encoder",
)
HEADS = ("effseg/effseg_r50", "effseg/mask_rcnn_r50", "effseg/refine_mask_r50", "effseg/pointrend_r50")


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    cfg = tiny_config(name)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    give_basis(getattr(model.mask_branch, "coding", None))
    return model


def batch(sizes: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)} for size in sizes]


def same(found: Predictions, expected: Predictions) -> None:
    for name in ("logits", "hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_network(name: str) -> None:
    """No break from the backbone to the heads, and one compilation for all batches of one size, padded or not."""
    model = make_model(name)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.network, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed, sizes in enumerate(([(120, 128), (128, 100)], [(128, 90), (65, 128)], [(128, 128), (128, 128)])):
            inputs = model.network_inputs(model.preprocess(batch(sizes, seed)))
            assert inputs[-1] == (seed < 2)
            same(compiled(*inputs)[0], model.network(*inputs)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["isda/isda_r50", "effseg/effseg_r50"])
def test_gradients(name: str) -> None:
    """Those of all parameters are the same, without a break either."""
    model = make_model(name)
    inputs = model.network_inputs(model.preprocess(batch([(120, 128)], seed=0)))
    torch._dynamo.reset()
    gradients = []
    for network in (model.network, torch.compile(model.network, backend="eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        found = network(*inputs)[0]
        (found.logits.square().mean() + found.hidden.square().mean()).backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    eager, compiled = gradients
    assert len(eager) > 100 and eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=key)


@pytest.mark.parametrize("name", ["istr/istr_r50", "effseg/mask_rcnn_r50"])
def test_recipe(name: str) -> None:
    """As the documentation has it: detections of the model are those of before, of images of one padded size."""
    model = make_model(name)
    model.size_divisibility = 128
    batches = [batch([size], seed) for seed, size in enumerate(((120, 100), (128, 128), (70, 90)))]
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad():
        expected = [model(items) for items in batches]
        model.network = torch.compile(model.network, backend=counter, fullgraph=True, dynamic=False)
        if isinstance(model.mask_branch, RegionBranch):
            model.mask_branch.head.compile(backend="eager", fullgraph=True)
        found = [model(items) for items in batches]
    assert counter.frame_count == 1
    for (one,), (other,) in zip(found, expected, strict=True):
        one, other = one["instances"], other["instances"]
        assert len(one) and one.image_size == other.image_size
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        assert (one.pred_masks != other.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_region_heads(name: str) -> None:
    """The heads of regions, which run on what is detected: one graph, and a second one for any number of regions."""
    model = make_model(name)
    spread_weights(model.mask_branch.parameters())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.mask_branch.head.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        for number in (6, 7, 3, 9):
            found, pyramid = model.predict(model.preprocess(batch([(128, 128)], seed=number)))
            queries, labels = torch.arange(number), torch.arange(number) % NUM_CLASSES
            regions = model.mask_branch._regions(found, 0, queries, labels, layer=-1)
            expected = model.mask_branch.head(pyramid[:], (128, 128), regions)  # which keeps what it lays out
            torch.testing.assert_close(compiled(pyramid, (128, 128), regions), expected, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 2
