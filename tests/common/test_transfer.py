"""Copies to the model's device change nothing but the place. A CPU has none to copy to: a recorder stands for a GPU."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from querymask.common import transfer
from querymask.common.engine.sampling import TrainLoader
from querymask.common.masks import instance_masks

CPU = torch.device("cpu")


class Recorder:
    """Counts the bytes that are copied, and gives them back where they were."""

    def __init__(self):
        self.bytes = 0

    def __call__(self, values, device):
        assert device.type == "cuda"
        self.bytes += values.numel() * values.element_size()
        return values


def test_fields_arrive_as_they_were():
    instances = Instances((5, 7))
    instances.gt_boxes = Boxes(torch.rand(3, 4))
    instances.gt_classes = torch.tensor([4, 2, 9])
    instances.gt_masks = BitMasks(torch.rand(3, 5, 7) > 0.5)
    instances.names = ["a", "b", "c"]
    moved = transfer.instances_to_device(instances, CPU)
    assert moved.image_size == (5, 7) and list(moved.get_fields()) == list(instances.get_fields())
    assert torch.equal(moved.gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(moved.gt_masks.tensor, instances.gt_masks.tensor)
    assert torch.equal(moved.gt_classes, instances.gt_classes) and moved.names == instances.names


def test_numbers():
    assert torch.equal(transfer.numbers_to_device([(1, 2), (3, 4)], torch.int64, CPU), torch.tensor([[1, 2], [3, 4]]))
    assert transfer.numbers_to_device([], torch.float64, CPU).shape == (0,)


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 1, 1), (3, 5, 7), (2, 16, 8)])
def test_masks_travel_as_bits(monkeypatch, shape):
    """An eighth of the bytes, and every pixel as it was, whether or not the number of pixels is a multiple of 8."""
    recorder = Recorder()
    monkeypatch.setattr(transfer, "to_device", recorder)
    monkeypatch.setattr(transfer, "_bits", lambda device: torch.arange(8, dtype=torch.uint8))
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    arrived = transfer.masks_to_device(masks.transpose(1, 2).contiguous().transpose(1, 2), torch.device("cuda"))
    assert arrived.dtype == torch.bool and torch.equal(arrived, masks)
    assert recorder.bytes == -(-masks.numel() // 8)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pack_masks", [False, True])
def test_batches_of_the_loader(
    make_batch: Callable[..., list[dict[str, Any]]], pack_masks: bool, num_workers: int
) -> None:
    """What a loader packs and pins gives the instances that went in, whoever does it; other entries stay."""
    items = make_batch([3, 0, 2], [(37, 21), (16, 8), (5, 7)])
    options = {"num_workers": num_workers, "pin_memory": True, "pack_masks": pack_masks}
    (batch,) = itertools.islice(TrainLoader(items, lambda item: item, 3, **options), 1)
    assert isinstance(batch, transfer.HostBatch)
    for item in batch:
        (original,) = (x for x in items if x["file_name"] == item["file_name"])
        instances = original["instances"]
        assert torch.equal(item["image"], original["image"])
        packed = item["instances"].gt_masks
        assert isinstance(packed, transfer.PackedMasks if pack_masks else BitMasks) and len(packed) == len(instances)
        assert torch.equal(instance_masks(item["instances"]), instances.gt_masks.tensor)
        arrived = transfer.instances_to_device(item["instances"], CPU)
        assert torch.equal(arrived.gt_masks.tensor, instances.gt_masks.tensor)
        assert torch.equal(arrived.gt_boxes.tensor, instances.gt_boxes.tensor)


def test_pinning(monkeypatch: pytest.MonkeyPatch, make_batch: Callable[..., list[dict[str, Any]]]) -> None:
    """Every tensor of a batch is pinned once."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = transfer.HostBatch.packed(make_batch([3, 1]))
    copied = batch.pin_memory()
    assert len(pinned) == 2 * 4
    assert {x.dtype for x in pinned} == {torch.uint8, torch.float32, torch.int64}
    for before, after in zip(batch, copied):
        assert torch.equal(before["image"], after["image"]) and before["image"] is not after["image"]
        assert torch.equal(instance_masks(before["instances"]), instance_masks(after["instances"]))


def test_copies_to_the_host() -> None:
    values = torch.rand(3, requires_grad=True)
    assert torch.equal(transfer.HostCopy(values).read(), values.detach())


def test_constants_in_a_captured_graph() -> None:
    rows = [(1, 2), (3, 4)]
    with transfer.capture():
        assert torch.equal(transfer.constants_to_device(rows, torch.int64, CPU), torch.tensor(rows))
    assert torch.equal(transfer.constants_to_device(rows, torch.int64, CPU), torch.tensor(rows))
