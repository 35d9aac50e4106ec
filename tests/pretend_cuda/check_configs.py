"""Small forms of the configs on the pretended GPU: how often the host waits in a training step and for an image."""

import re
from collections.abc import Callable
from typing import Any

import pretend_cuda
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from mask_bases import give_basis
from tiny_configs import tiny_config
from torch import nn

from querymask.common.engine.step import TrainingStep
from querymask.common.measured_models import prepare_for_measurement
from querymask.common.solver import build_optimizer
from querymask.common.transfer import numbers_to_device

Batch = list[dict[str, Any]]
# By config: waits in an iteration of two images, and for an image. A matching needs its costs, a detector with
# non-maximum suppression what is left, a region head the sizes of what it selects.
SET_MATCHING, FQDET, REGION_HEAD = (1, 1), (2, 2), (4, 4)
LIMITS = {
    "solq/solq_r50": SET_MATCHING,
    "solq/solq_r50_two_stage": SET_MATCHING,
    "solq/solq_r50_pca": SET_MATCHING,
    "solq/sqr_r50": SET_MATCHING,
    "isda/isda_r50": SET_MATCHING,
    "isda/isda_r50_second_head": SET_MATCHING,
    "istr/istr_r50": SET_MATCHING,
    "istr/istr_v2_smt_r50": SET_MATCHING,
    "effseg/fqdet_r50": FQDET,
    "effseg/effseg_r50": REGION_HEAD,
    "effseg/ablations/choose_boundary": REGION_HEAD,
    "effseg/ablations/choose_uncertainty": REGION_HEAD,
    "effseg/ablations/separate_children": REGION_HEAD,
    "effseg/ablations/targets_centre": REGION_HEAD,
    "effseg/refine_mask_r50": REGION_HEAD,
    "effseg/pointrend_r50": REGION_HEAD,
    "effseg/mask_rcnn_r50": REGION_HEAD,
}
SIZES = [(64, 96), (80, 50)]


def prepared_model(cfg: Any) -> nn.Module:
    """In training mode, with weights with which it finds something."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    give_basis(getattr(model.mask_branch, "coding", None))
    prepare_for_measurement(model)  # boxes stay in the image
    for key, parameter in model.named_parameters():  # EffSeg leaves out detections whose mask is empty
        if re.search(r"mask_branch\.head\.(segmentation\.\d\.2|.*classifiers?(\.\d)?)\.(weight|bias)$", key):
            nn.init.constant_(parameter, 4 if key.endswith("bias") else 1e-3)
    return model


def check(found: list[pretend_cuda.Event], limit: int, what: str) -> None:
    __tracebackhide__ = True
    text = "\n".join(map(str, found))
    uploads = [event for event in found if event.kind == "upload"]
    assert not uploads, f"{what}: {len(uploads)} copies to the device block\n{text}"
    waits = [event for event in found if event.kind == "wait"]
    assert len(waits) <= limit, f"{what}: the host waits {len(waits)} times, which may be {limit}\n{text}"


def check_config(name: str, make_batch: Callable[..., Batch], autocast: torch.dtype | None, extra: int = 0) -> None:
    train_limit, image_limit = LIMITS[name]
    cfg = tiny_config(name)
    model = prepared_model(cfg)
    assert next(model.parameters()).is_cuda
    counts = [[2, 1], [2, 3], [3, 1], [0, 2]]
    step = TrainingStep(model, [make_batch(count, SIZES) for count in counts], build_optimizer(cfg, model), 1, autocast)
    with EventStorage() as storage:
        for iteration, count in enumerate(counts):
            step.iter = storage.iter = 20 * iteration  # where there is most to log
            with pretend_cuda.events() as found:
                step.run_step()
            if iteration > 0:  # the first one may make constants
                check(found, train_limit + extra, f"training with {' and '.join(map(str, count))} instances")
        step.write_metrics()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.eval()
    image = make_batch([0], SIZES[:1])[0]["image"]
    for _ in range(2):
        with pretend_cuda.events() as found, torch.no_grad(), torch.autocast("cuda", autocast, enabled=bool(autocast)):
            outputs = model([{"image": image, "height": 100, "width": 150}])
    assert len(outputs[0]["instances"]) > 0
    check(found, image_limit, "an image")


class AddConstant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + numbers_to_device([1.0, 2.0], torch.float32, x.device)


def test_constants_from_the_host_are_exported() -> None:
    x = torch.zeros(2, device="cuda")
    program = torch.export.export(AddConstant(), (x,)).module()
    assert program(x).tolist() == AddConstant()(x).tolist() == [1, 2]


@pytest.mark.parametrize("name", LIMITS)
def test_waits(name: str, make_batch: Callable[..., Batch]) -> None:
    check_config(name, make_batch, None)


@pytest.mark.parametrize("name", ["solq/solq_r50", "isda/isda_r50", "istr/istr_r50", "effseg/refine_mask_r50"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_waits_in_mixed_precision(name: str, dtype: str, make_batch: Callable[..., Batch]) -> None:
    # A loss scale waits once more, for whether the gradients are finite
    check_config(name, make_batch, getattr(torch, dtype), extra=int(dtype == "float16"))
