"""Copies to the model's device change nothing but the place. A CPU has none to copy to: a recorder stands for a GPU."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from querymask.common import transfer

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
