"""The pretended device itself: what it computes, refuses and reports."""

import copy
import io
import os
from collections.abc import Callable

import pretend_cuda
import pytest
import torch
import torchvision
from torch import Tensor, nn

GPU = torch.device("cuda")


def happenings(function: Callable[[], object]) -> list[tuple[str, str]]:
    with pretend_cuda.events() as found:
        function()
    return [(event.kind, event.operator.removeprefix("aten::")) for event in found]


def test_computes_what_the_processor_does() -> None:
    torch.manual_seed(0)
    there = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 4))
    attention = nn.MultiheadAttention(4, 2)
    images = torch.randn(2, 3, 7, 7)
    results = {}
    for device in ("cpu", GPU):
        model, attend = copy.deepcopy(there).to(device), copy.deepcopy(attention).to(device)
        optimizer = torch.optim.AdamW([*model.parameters(), *attend.parameters()], lr=0.1)
        for _ in range(2):
            x = model(images.to(device))
            loss = attend(x, x, x)[0].square().sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert loss.device.type == torch.device(device).type
        results[str(device)] = [loss, *model.parameters()]
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu)


def test_views_and_resizing_keep_their_memory() -> None:
    x = torch.arange(6.0, device=GPU)
    x.view(2, 3)[1].t().mul_(10)
    assert x.tolist() == [0, 1, 2, 30, 40, 50] and x.view(2, 3).is_cuda
    out = torch.empty(0, device=GPU)
    torch.add(x, 1, out=out)
    assert out.is_cuda and out.tolist() == [1, 2, 3, 31, 41, 51]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_loss_scale(dtype: torch.dtype) -> None:
    layer, norm = nn.Linear(4, 4).to(GPU), nn.LayerNorm(4).to(GPU)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = layer.weight.detach().clone()
    with torch.autocast("cuda", dtype):
        product = layer(torch.ones(2, 4, device=GPU))
        loss = norm(product.softmax(-1)).square().sum() + product.sum()
    assert product.dtype == dtype and product.softmax(-1, torch.float32).dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.weight.grad.dtype == torch.float32 and not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.ones(4).add_(x),
        lambda x: torch.cat([x, torch.ones(4)]),
        lambda x: torch.ones(4)[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda x: nn.functional.linear(x, torch.ones(2, 4)),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: x.normal_(generator=torch.Generator()),
    ],
)
def test_mixed_devices_raise(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="mixed devices: "):
        function(torch.ones(4, device=GPU))
    assert torch.ones(4, device=GPU).sum() == 4  # all are back where they were


def test_numbers_and_indices_from_the_host_are_taken() -> None:
    x = torch.arange(4.0, device=GPU)
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert x.masked_fill(x > 1, torch.tensor(7.0)).tolist() == [0, 1, 7, 7]
    assert happenings(lambda: x[torch.tensor([3])]) == [("upload", "index")]


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("_index_put_impl_", lambda x, at: x.view(1, 4).__setitem__((at - 3, at), 1)),
        ("_index_put_impl_", lambda x, at: x.index_put_((at,), torch.tensor(1.0))),
        ("_index_put_impl_", lambda x, at: x.index_put((at,), torch.tensor(1.0), accumulate=True)),
        ("_index_put_impl_", lambda x, at: x.index_put_((x > 2,), torch.tensor(1.0), accumulate=True)),
        ("where", lambda x, at: torch.where(x > 2, x, torch.tensor(1.0))),
    ],
)
def test_numbers_that_are_copied_to_the_device(operator: str, function: Callable[..., object]) -> None:
    x, at = torch.arange(4.0, device=GPU), torch.arange(3, 4, device=GPU)
    assert ("upload", operator) in happenings(lambda: function(x, at))
    for same in (
        lambda: x.view(1, 4).index_put_((at - 3, at), x.new_ones(())),
        lambda: x[None, 3:].__setitem__(0, 1),  # a fill
        lambda: torch.where(x > 2, x, 1.0),
    ):
        assert not happenings(same)


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 0).any())),
        ("copy_", lambda x: x.cpu()),
        ("copy_", lambda x: torch.empty(4).copy_(x, non_blocking=True)),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("_index_put_impl_", lambda x: x.index_put_((x > 0,), x[:1])),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("_unique2", lambda x: x.unique()),
        ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
        ("torchvision::nms", lambda x: torchvision.ops.nms(x.expand(2, 4), x[:2], 0.5)),
        ("torch.cuda.synchronize", lambda x: torch.cuda.synchronize()),
        ("torch.cuda.Event.synchronize", lambda x: torch.cuda.Event().synchronize()),
    ],
)
def test_waits_are_reported(operator: str, function: Callable[[Tensor], object]) -> None:
    x = torch.arange(4.0, device=GPU)
    assert happenings(lambda: function(x)) == [("wait", operator)]


def test_waits_of_the_backward_pass_are_reported_with_their_function() -> None:
    x = torch.ones(2, 2, device=GPU, requires_grad=True)
    with pretend_cuda.events() as found:
        x.prod().backward()
    assert {(event.kind, event.node) for event in found} == {("wait", "ProdBackward0")}
    assert all(event.line.startswith("tests/pretend_cuda/check_device.py:") for event in found)


def test_what_does_not_wait() -> None:
    x = torch.arange(4.0, device=GPU)
    assert not happenings(lambda: x.masked_fill(x > 0, 1).sort().values.topk(2).indices)
    assert not happenings(lambda: x.repeat_interleave(x.long(), output_size=6))
    assert not happenings(lambda: x.__setitem__(x > 0, 0))  # a fill
    assert not happenings(lambda: torchvision.ops.roi_align(x.view(1, 1, 2, 2), [x.view(1, 4)], 2))


def test_copies_to_the_device() -> None:
    plain, pinned = torch.ones(3), torch.ones(3).pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not plain.is_pinned()
    assert happenings(lambda: plain.to(GPU)) == [("upload", "copy_")]
    assert happenings(lambda: plain.to(GPU, non_blocking=True)) == [("upload", "copy_")]
    assert happenings(lambda: pinned.to(GPU)) == [("upload", "copy_")]
    assert happenings(lambda: pinned.to(GPU, non_blocking=True)) == [("async_upload", "copy_")]
    assert happenings(lambda: torch.tensor([1, 2], device=GPU)) == [("upload", "copy_")]
    down = torch.empty(3, pin_memory=True)
    x = torch.arange(3.0, device=GPU)
    assert happenings(lambda: down.copy_(x, non_blocking=True)) == [("async_download", "copy_")]
    assert down.tolist() == [0, 1, 2]


def test_nothing_may_block() -> None:
    x = torch.ones(2, device=GPU)
    with pretend_cuda.never_blocks():
        y = x * 2
    assert y.tolist() == [2, 2]
    with pytest.raises(AssertionError, match="aten::_local_scalar_dense"), pretend_cuda.never_blocks():
        bool(x.any())


def test_state_is_saved_loaded_and_copied() -> None:
    layer = nn.Linear(2, 2).to(GPU)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for location in ("cpu", "cuda", None):
        file.seek(0)
        weight = torch.load(file, map_location=location)["weight"]
        assert weight.device.type == (location or "cuda") and torch.equal(weight.cpu(), layer.weight.cpu())
    twin = copy.deepcopy(layer)
    assert twin.weight.is_cuda and torch.equal(twin.weight, layer.weight)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_has_random_numbers_of_its_own() -> None:
    torch.manual_seed(3)
    first = torch.rand(4, device=GPU)
    torch.rand(4)
    second = torch.rand(4, device=GPU)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=GPU), first)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(4, device=GPU), second)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=GPU), second)


def test_graphs_repeat_on_the_same_memory() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4).to(GPU), torch.zeros(2, 4, device=GPU)
    x.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x).relu()
        (gradient,) = torch.autograd.grad(y.sum(), x)
    values = torch.randn(2, 4)
    with torch.no_grad():
        x.copy_(values)
        layer.weight.mul_(2)
    graph.replay()
    expected = layer(x).relu()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("function", [lambda x: x.sum().item(), lambda x: x + torch.ones(2).to(GPU)])
def test_nothing_may_wait_in_a_capture(function: Callable[[Tensor], object]) -> None:
    x = torch.ones(2, device=GPU)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            function(x)
    assert not torch.cuda.is_current_stream_capturing() and x.sum().item() == 2


def test_forked_processes_have_no_device() -> None:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, str(torch.ones(2).add(1).to(GPU)).encode())
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1000).startswith(b"Cannot re-initialize CUDA in forked subprocess")
