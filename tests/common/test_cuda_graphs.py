"""CUDA graphs give what the network gives. Captures are recorded and repeated on the CPU: see ``recorded_graphs``."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from mask_bases import give_basis
from recorded_graphs import RecordedGraph, record_graphs
from tiny_configs import tiny_config

from querymask import get_cfg
from querymask.common.cuda_graphs import CudaGraphs
from querymask.common.engine.unused_keys import check_unused_keys

METHODS = {
    "SOLQ": "solq/solq_r50",
    "two stages": "solq/solq_r50_two_stage",
    "SQR": "solq/sqr_r50",
    "ISDA": "isda/isda_r50",
    "ISTR": "istr/istr_r50",
}
MakeBatch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    return record_graphs(monkeypatch)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_inference(name: str, recorded: list[RecordedGraph], make_batch: MakeBatch) -> None:
    """Images of several sizes, in an order in which each is run, captured and replayed, some padded to one size."""
    torch.manual_seed(0)
    eager = build_model(tiny_config(METHODS[name])).eval()
    give_basis(getattr(eager.mask_branch, "coding", None))
    graphed = copy.deepcopy(eager)
    graphed.graphs = CudaGraphs(8)
    sizes = [(64, 96), (60, 90), (64, 96), (48, 80), (60, 90), (64, 96), (60, 90)]
    for index, size in enumerate(sizes):
        (item,) = make_batch([0], [size])
        item["image"] = item["image"].roll(index, 2)
        item.update(height=50 + index, width=70)
        ((expected,), (found,)) = eager([item]), graphed([item])
        expected, found = expected["instances"].get_fields(), found["instances"].get_fields()
        assert list(found) == list(expected)
        for key, value in expected.items():
            a, b = (getattr(x, "tensor", x) for x in (value, found[key]))
            assert a.shape == b.shape and torch.equal(a, b), key
    assert recorded and sum(graph.replays for graph in recorded) >= len(sizes) - 3


@torch.no_grad()
def test_limit(recorded: list[RecordedGraph]) -> None:
    """A size is captured when it comes again, and forgotten when more than ``limit`` others came since."""
    calls = []
    graphs = CudaGraphs(2)

    def function(x: torch.Tensor, factor: int) -> list[torch.Tensor]:
        calls.append(len(x))
        return [x * factor]

    def call(n: int, factor: int = 2) -> None:
        x = torch.rand(n)
        assert torch.equal(graphs(function, x, factor)[0], factor * x)

    for _ in range(4):
        call(1)
    assert calls == [1] * 3, "once as it is; once to warm up and once to capture"
    call(1, factor=3)
    assert len(calls) == 4, "constants are part of a graph"
    call(2)
    call(1)
    assert calls[-2:] == [2, 1], "the graph of two sizes ago is gone"
    graphs.clear()
    call(2)
    assert len(recorded) == 1 and len(calls) == 7
    copied = copy.deepcopy(graphs)
    assert copied.limit == 2 and copied is not graphs


def test_gradients_need_the_network(recorded: list[RecordedGraph]) -> None:
    graphs = CudaGraphs(2)
    for _ in range(3):
        x = torch.rand(3, requires_grad=True)
        graphs(torch.square, x).sum().backward()
        assert torch.equal(x.grad, 2 * x)
    assert not recorded


@torch.no_grad()
def test_moved_parameters(recorded: list[RecordedGraph], make_batch: MakeBatch) -> None:
    """In place a graph follows; a model that is moved captures anew."""
    model = build_model(tiny_config(METHODS["SOLQ"])).eval()
    model.graphs = CudaGraphs(8)
    batch = make_batch([0])
    for change in (lambda: None, lambda: model.detector.class_embed[-1].bias.add_(1), lambda: model.double().float()):
        change()
        for _ in range(3):
            found = model(batch)[0]["instances"].scores
            assert torch.equal(found, model.detect(*model.predict(model.preprocess(batch)), [(64, 96)])[0].scores)
    assert len(recorded) == 2


@torch.no_grad()
def test_waits_cannot_be_captured(recorded: list[RecordedGraph]) -> None:
    graphs = CudaGraphs(2)
    graphs(torch.nonzero, torch.ones(2))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs(torch.nonzero, torch.ones(2))


@torch.no_grad()
def test_fewer_sizes(make_batch: MakeBatch) -> None:
    cfg = tiny_config(METHODS["ISDA"])
    model = build_model(cfg).eval()
    assert model.preprocess(make_batch([0], [(64, 90)])).tensor.shape == (1, 3, 64, 96)
    model.graphs, model.graph_divisibility = CudaGraphs(1), 48
    assert model.preprocess(make_batch([0], [(64, 90)])).tensor.shape == (1, 3, 96, 96)
    assert model.train().preprocess(make_batch([0], [(64, 90)])).tensor.shape == (1, 3, 64, 96)


def enabled(leaf: str, **settings: Any) -> CfgNode:
    cfg = tiny_config(leaf)
    cfg.TEST.CUDA_GRAPHS.ENABLED = True
    for key, value in settings.items():
        cfg.TEST.CUDA_GRAPHS[key] = value
    return cfg


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'cpu': CUDA graphs need an NVIDIA GPU"):
        cfg = enabled(METHODS["ISTR"])
        cfg.MODEL.DEVICE = "cpu"
        build_model(cfg)
    with pytest.raises(ValueError, match=r"CUDA_GRAPHS\.ENABLED is True, but in FQDet and EffSegBranch values decide"):
        build_model(enabled("effseg/effseg_r50"))
    with pytest.raises(ValueError, match=r"SIZE_DIVISIBILITY is 0: set at least 1"):
        build_model(enabled(METHODS["SOLQ"], SIZE_DIVISIBILITY=0))
    with pytest.raises(ValueError, match=r"MAX_SIZES is 0: set at least 1"):
        CudaGraphs(0)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.TEST.CUDA_GRAPHS.ENABLED = True
    with pytest.raises(ValueError, match=r"TEST\.CUDA_GRAPHS\.ENABLED True: only SOLQ, ISDA and ISTR read it"):
        check_unused_keys(cfg)
