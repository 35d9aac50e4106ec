"""CUDA graphs on the pretended GPU: networks are captured without a wait or a copy, and replays give what they give."""

import copy
from collections.abc import Callable
from typing import Any

import pretend_cuda
import pytest
import torch
from check_configs import prepared_model
from tiny_configs import tiny_config
from torch.utils._pytree import tree_leaves

from querymask.common.evaluation.coco import instances_to_host
from querymask.common.transfer import HostBatch, capture

Batch = list[dict[str, Any]]
CAPTURED = ["solq/solq_r50", "solq/solq_r50_two_stage", "isda/isda_r50", "istr/istr_r50", "istr/istr_v2_smt_r50"]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", CAPTURED)
def test_inference(
    name: str, autocast: torch.dtype | None, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asked for by the config: what comes again is captured once, and gives what it should."""
    cfg = tiny_config(name)
    eager = prepared_model(cfg).eval()
    cfg.TEST.CUDA_GRAPHS.ENABLED = True
    cfg.TEST.CUDA_GRAPHS.SIZE_DIVISIBILITY = 32
    graphed = prepared_model(cfg).eval()
    eager.graph_divisibility, eager.graphs = 32, None
    eager.size_divisibility = graphed.size_divisibility or 32  # the same padding
    captured = []
    plain = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured.append(plain()) or captured[-1])
    with torch.no_grad(), torch.autocast("cuda", autocast, enabled=autocast is not None):
        for index, size in enumerate([(64, 96), (60, 90), (64, 96), (60, 90), (96, 64), (64, 96), (60, 90)]):
            (item,) = make_batch([0], [size])
            item["image"] = item["image"].roll(index, 2)
            item.update(height=50 + index, width=70)
            expected = eager([item])[0]["instances"]
            with pretend_cuda.events() as found:
                instances = graphed([item])[0]["instances"]
            assert not [event for event in found if event.kind == "upload"]
            assert len(instances) == len(expected) > 0
            for key, value in expected.get_fields().items():
                a, b = (getattr(x, "tensor", x) for x in (value, instances.get(key)))
                assert torch.equal(a, b), (index, key)
    assert len(captured) == 2  # of padded images and of others


@pytest.mark.parametrize("name", CAPTURED[:3])
def test_training_up_to_the_matching(name: str, make_batch: Callable[..., Batch]) -> None:
    """SOLQ's and ISDA's predictions in training, and gradients of what one likes of them, in one graph."""
    cfg = tiny_config(name)
    cfg.MODEL[cfg.MODEL.META_ARCHITECTURE].DROPOUT = 0.0  # another draw would be another result
    model = prepared_model(cfg)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = model.network_inputs(model.preprocess(make_batch([2, 1], [(64, 96), (80, 50)])))

    def step() -> list[torch.Tensor]:
        parts = [vars(part) for part in model.network(*inputs) if part is not None]
        outputs = [x for x in tree_leaves(parts) if torch.is_tensor(x)]
        total = sum(x.square().mean() for x in outputs if x.requires_grad)
        return [total.detach(), *torch.autograd.grad(total, parameters, allow_unused=True)]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with capture(), torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b)
    assert sum(x is not None for x in found) > len(parameters) // 2


def test_batches_and_predictions(make_batch: Callable[..., Batch]) -> None:
    """A packed batch goes to the device, and predictions come back, without a blocking copy."""
    model = prepared_model(tiny_config("solq/solq_r50"))
    batch = make_batch([2, 3])
    pinned = HostBatch.packed(copy.deepcopy(batch)).pin_memory()
    torch.manual_seed(0)
    expected = model(batch)
    torch.manual_seed(0)
    with pretend_cuda.events() as found:
        losses = model(pinned)
    assert [event.kind for event in found if event.blocks] == ["wait"]
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    with torch.no_grad():
        instances = model.eval()(batch)[0]["instances"]
    with pretend_cuda.never_blocks():  # an event that is over is not waited for
        host = instances_to_host(instances)
    for key, value in instances.to("cpu").get_fields().items():
        a, b = (getattr(x, "tensor", x) for x in (value, host.get(key)))
        assert b.device.type == "cpu" and torch.equal(a, b), key
