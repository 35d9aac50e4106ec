"""What tests of several folders use. Importing the package first lets every test import Detectron2 of any version."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tests: threads, of several processes at that, hinder each other

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings

import querymask  # noqa: F401

torch.backends.cudnn.allow_tf32 = False  # tests on a GPU (support/devices.py) are as exact as on the processor

# The same examples in every run; others by `pytest --hypothesis-profile=default`.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


# Those with tests of tens of seconds: begun last, they would leave the other processes idle
LONG = (
    "reference/test_istr.py",
    "pretend_cuda/test_pretend_cuda.py",
    "benchmarks/test_gpu_trial.py",
    "cuda_on_cpu/test_kernels.py",
    "engine/test_distributed.py",
    "reference/test_effseg.py",
    "reference/test_effseg_baselines.py",
    "common/test_wheel.py",
    "common/test_compat.py",
    "ops/test_extension.py",
    "tools/test_compare_costs.py",
    "common/test_export.py",
    "tools/test_export_model.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, for processes that share the tests (pytest-xdist)."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


@pytest.fixture
def catalog() -> Iterator[None]:
    """Data sets that a test registers are forgotten after it."""
    from data_folders import restored_catalog  # the tests of the operators do without Detectron2

    with restored_catalog():
        yield


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The lines of the project's log."""
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    caplog.set_level(logging.INFO, "querymask")
    return caplog


@pytest.fixture
def make_batch() -> Callable[..., list[dict[str, Any]]]:
    """Function (numbers of instances, sizes of the images) that gives model inputs with ellipses in random boxes."""
    from detectron2.structures import BitMasks, Boxes, Instances  # the tests of the operators do without Detectron2

    def make(counts: Sequence[int], sizes: Sequence[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        items = []
        for index, (count, size) in enumerate(zip(counts, sizes or [(64, 96)] * len(counts), strict=True)):
            extent = torch.tensor([size[1], size[0]])
            low = torch.rand(count, 2, generator=generator) * extent * 0.6
            high = low + (torch.rand(count, 2, generator=generator) * 0.3 + 0.1) * extent
            y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
            position = torch.stack((x, y), dim=-1)
            center, half = ((low + high) / 2)[:, None, None], ((high - low) / 2)[:, None, None]
            instances = Instances(size)
            instances.gt_boxes = Boxes(torch.cat((low, high), dim=1))
            instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
            instances.gt_masks = BitMasks((((position - center) / half) ** 2).sum(-1) < 1)
            image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
            items.append({"image": image, "instances": instances, "file_name": f"{index}.jpg"})
        return items

    return make


@pytest.fixture
def precision_batches(make_batch: Callable[..., list[dict[str, Any]]]) -> Callable[[], list[list[dict[str, Any]]]]:
    """Function that gives batches of an image each for ``rounded_products.check_precision``."""

    def make() -> list[list[dict[str, Any]]]:
        generator = torch.Generator().manual_seed(1)
        batches = [make_batch([3], [size]) for size in [(96, 128), (80, 152)] * 8]
        for item in (item for batch in batches for item in batch):
            item["image"] = torch.randint(0, 256, item["image"].shape, dtype=torch.uint8, generator=generator)
        return batches

    return make
