"""Every config of ISDA: its model has the size of its row and trains; schedules and optimiser."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from tiny_configs import tiny_config

from querymask.common.flops import count_parameters
from querymask.common.measured_models import build_on_meta
from querymask.common.solver import build_lr_scheduler, build_optimizer
from querymask.model_zoo import find_leaves

LEAVES = {leaf.name: leaf for leaf in find_leaves() if leaf.method == "isda"}
COCO_LEAVES = {name: leaf for name, leaf in LEAVES.items() if not name.endswith(("_shapes", "_nuclei"))}

# Values of a R50 model, batch norms' affine parameters (53,120, frozen) included, as measured on the release
FROZEN_NORMS = 53_120
PUBLISHED_SIZES = {
    "isda_r50": 41_908_624,
    "ablations/mask_stride_8": 41_318_032,
    "ablations/mask_stride_2": 42_351_760,
    "ablations/positions_kernel": 41_906_320,
    "ablations/positions_mask": 41_909_138,
}
R50_PARTS = {
    "backbone": 23_508_032 - FROZEN_NORMS,
    "projections": 5_704_192,
    "mask feature head": 1_659_392,
    "encoder": 4_541_184,
    "decoder": 6_123_264,
    "reference layer": 514,
    "level embedding": 1_024,
    "class head": 20_560,
    "kernel head": 196_862,
    "queries": 153_600,
}


def size(module: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    counts = count_parameters(module)[""]
    return counts.total, counts.trainable


@pytest.mark.parametrize("name", LEAVES)
def test_training_step(name: str, make_batch: Callable[..., list[dict[str, Any]]]) -> None:
    """The losses reach every trained parameter, and one step of the row's optimiser changes all."""
    torch.manual_seed(0)
    cfg = tiny_config(f"isda/{name}")
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    with torch.no_grad():  # offsets and weights of attention start at zero, which holds gradients back
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.requires_grad:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    before = copy.deepcopy(model.state_dict())
    sum(model(make_batch([3, 0], [(64, 90), (70, 60)])).values()).backward()
    optimizer.step()
    scheduler.step()
    for key, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        assert moved == parameter.requires_grad, f"{key}: moved is {moved}"
        assert torch.isfinite(parameter).all(), key


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_size(name: str) -> None:
    assert size(build_on_meta(LEAVES[name].config()))[0] == PUBLISHED_SIZES[name] - FROZEN_NORMS


def test_published_size_of_each_part() -> None:
    model = build_on_meta(LEAVES["isda_r50"].config())
    modules = {
        "backbone": [model.backbone],
        "projections": [model.detector.fine_proj, model.detector.input_proj],
        "mask feature head": [model.mask_branch.mask_features],
        "encoder": [model.detector.transformer.encoder],
        "decoder": [model.detector.transformer.decoder],
        "reference layer": [model.detector.transformer.reference_points],
        "class head": [model.detector.class_embed],
        "kernel head": [model.mask_branch.kernel_embed],
        "queries": [model.detector.query_embed],
    }
    sizes = {part: sum(size(module)[0] for module in those) for part, those in modules.items()}
    sizes["level embedding"] = model.detector.transformer.level_embed.numel()
    assert sizes == R50_PARTS
    assert sum(sizes.values()) == size(model)[0], "a part is missing from the list"
    assert size(model)[1] == 41_633_104


def test_published_optimiser() -> None:
    """253 tensors with 17,610,574 values at the full rate, 68 with 24,022,530 at a tenth; decay on all of them."""
    cfg = LEAVES["isda_r50"].config()
    optimizer = build_optimizer(cfg, build_on_meta(cfg))
    groups: dict[float, list[int]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(round(group["lr"] / cfg.SOLVER.BASE_LR, 6), []).extend(p.numel() for p in group["params"])
    assert {rate: (len(sizes), sum(sizes)) for rate, sizes in groups.items()} == {
        1.0: (253, 17_610_574),
        0.1: (68, 24_022_530),
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, cfg.SOLVER.WARMUP_ITERS) == (True, "full_model", 0.1, 0)


def test_schedules_in_epochs() -> None:
    """Of the 117,266 images of train2017 with annotations, in whole batches."""
    epochs = {"isda_r50": (42, [27, 33, 35, 36, 37]), "isda_r50_paper": (24, [16, 22])}
    epochs["isda_r50_second_head"] = epochs["isda_r50"]
    for name, leaf in COCO_LEAVES.items():
        cfg = leaf.config()
        epoch = 117_266 // cfg.SOLVER.IMS_PER_BATCH
        total, steps = epochs.get(name, (12, [9, 11]))
        assert (cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)) == (total * epoch, [s * epoch for s in steps]), name
        rate = 1.25e-4 if name in ("isda_r50", "isda_r50_second_head") else 1.87e-5
        assert cfg.SOLVER.BASE_LR == rate, name
        # Deformable DETR's rate for a batch of 32, scaled
        assert cfg.SOLVER.BASE_LR == pytest.approx(2e-4 * cfg.SOLVER.IMS_PER_BATCH / 32, rel=0.005), name


def test_names_of_ablations_say_their_setting() -> None:
    nodes = {
        name: leaf.config().MODEL.MASK_BRANCH.KERNEL for name, leaf in LEAVES.items() if name.startswith("ablations/")
    }
    found = {name: (n.MASK_STRIDE, n.MASK_POSITIONS, n.POSITIONS) for name, n in nodes.items()}
    assert found == {
        "ablations/mask_stride_8": (8, True, "point"),
        "ablations/mask_stride_4": (4, True, "point"),
        "ablations/mask_stride_2": (2, True, "point"),
        "ablations/positions_none": (4, False, "none"),
        "ablations/positions_mask": (4, True, "none"),
        "ablations/positions_kernel": (4, False, "point"),
        "ablations/positions_both": (4, True, "point"),
    }
    paper = LEAVES["isda_r50_paper"].config().MODEL
    isda, kernel = paper.ISDA, paper.MASK_BRANCH.KERNEL
    assert (kernel.LOSS, isda.CLASS_WEIGHT, kernel.WEIGHT, kernel.POSITIONS) == ("iou", 1, 3, "point")
    assert (isda.CLASS_COST, isda.COST_CLASS, kernel.COST_WEIGHT, kernel.MASKNESS) == ("probability", 1, 3, False)
    for name in nodes:
        model = LEAVES[name].config().MODEL
        for key in ("MASK_STRIDE", "MASK_POSITIONS", "POSITIONS"):
            model.MASK_BRANCH.KERNEL[key] = kernel[key]
        assert model == paper, f"{name} differs from the paper's model in more than its setting"
    assert LEAVES["isda_r50_second_head"].config().MODEL.MASK_BRANCH.KERNEL.MASKNESS_THRESHOLD == 1e-6
