"""Every config of ISTR: it loads, has the size that the paper's model has, and trains."""

import copy
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from tiny_configs import tiny_config
from tiny_models import set_keys

from querymask.common.flops import count_parameters
from querymask.common.measured_models import build_on_meta
from querymask.common.solver import build_lr_scheduler, build_optimizer
from querymask.model_zoo import find_leaves

LEAVES = {leaf.name: leaf for leaf in find_leaves() if leaf.method == "istr" and not leaf.name.startswith("pairs/")}
# Other schedules, each with a test of its own
OTHER = {"istr_v2_smt_swin_l_lsj_50ep", "istr_v2_smt_swin_l_lsj_100ep", "istr_v2_smt_r50_cityscapes"}
OWN = {name for name in LEAVES if name.endswith(("_shapes", "_nuclei"))}  # on other data than COCO
# All parameters and trained ones with 80 classes, those of the backbone that are trained, of the head, of a stage,
# and entries of the state dict, as measured on the releases
PUBLISHED_SIZES = {
    "istr_r50": (108_411_612, 108_141_328, 26_799_296, 81_486_432, 13_581_072, 628),
    "istr_r101": (127_351_516, 127_081_232, 45_739_200, 81_486_432, 13_581_072, 883),
    "istr_v2_pca_r50": (142_167_656, 138_943_592, 26_799_296, 112_066_296, 18_677_716, 658),
    "istr_v2_dct_r50": (138_943_592, 138_943_592, 26_799_296, 112_066_296, 18_677_716, 655),
    "istr_v2_smt_r50": (143_703_241, 141_924_345, 26_799_296, 113_341_560, 18_890_260, 890),
    "istr_v2_pca_r101": (161_107_560, 157_883_496, 45_739_200, 112_066_296, 18_677_716, 913),
    "istr_v2_smt_r101": (162_643_145, 160_864_249, 45_739_200, 113_341_560, 18_890_260, 1145),
    "istr_v2_smt_swin_l": (315_203_773, 313_424_877, 198_299_828, 113_341_560, 18_890_260, 982),
}
# A batch norm takes these out again, so they get no gradient but for rounding
BIAS_BEFORE_BATCH_NORM = r"(mask_module|ret_roi_layer_\d)\.[03]\.bias|coding\.decoder\.(1|\d\.1)\.bias"
SWIN_L_INDEX_BUFFERS = 24  # the published file stores what the model computes


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_size(name: str) -> None:
    model = build_on_meta(LEAVES[name].config())
    counts = count_parameters(model)
    backbone = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad or "v2" in name)
    if "v2" not in name:  # the release counts stem and res2, which are frozen, to the trained ones in this column
        backbone = sum(p.numel() for p in model.backbone.parameters())
    entries = len(model.state_dict()) + (SWIN_L_INDEX_BUFFERS if "swin_l" in name else 0)
    measured = (
        counts[""].total,
        counts[""].trainable,
        backbone,
        counts["detector.stages"].total + counts["mask_branch.heads"].total,
        counts["detector.stages.0"].total + counts["mask_branch.heads.0"].total,
        entries,
    )
    assert measured == PUBLISHED_SIZES[name]


def batch(make_batch: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return make_batch([2, 0], [(64, 96), (80, 50)])


@pytest.mark.parametrize("name", LEAVES)
def test_training_step(name: str, make_batch: Any, give_basis: Any) -> None:
    """One step of the row's optimiser changes every trained parameter and no other."""
    torch.manual_seed(0)
    cfg = tiny_config(f"istr/{name}")
    cfg.SOLVER.WARMUP_ITERS = 0
    model = build_model(cfg).train()
    give_basis(getattr(model.mask_branch, "coding", None))
    for stage in model.detector.stages:  # so that boxes stay in the image
        stage.bboxes_delta.weight.data *= 0.05
        stage.bboxes_delta.bias.data.zero_()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    before = copy.deepcopy(dict(model.named_parameters()))

    losses = model(batch(make_batch))
    istr = cfg.MODEL.ISTR
    masks = ("loss_mask",) if cfg.MODEL.MASK_BRANCH.NAME == "PixelBranch" else ("loss_vector", "loss_dice")
    kinds = ("loss_ce", "loss_bbox", "loss_giou", *masks)
    suffixes = ["", *(f"_{stage}" for stage in range(istr.NUM_STAGES - 1))]
    assert set(losses) == {kind + suffix for kind in kinds for suffix in suffixes}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        # Levels at which no box happens to lie are read by the image feature alone
        unread = not istr.USE_IMAGE_FEATURE and key.startswith("backbone.fpn_output")
        if not unread and not re.search(BIAS_BEFORE_BATCH_NORM, key):
            assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


def test_schedule_of_the_paper() -> None:
    """36 epochs with drops after 27 and 33, by the overrides that the method's page gives."""
    leaf = LEAVES["istr_r50"]
    page = (leaf.path.parents[1] / "README.md").read_text()
    (overrides,) = re.findall(r"drops after 27 and 33 .*`(SOLVER\..*)`", page)
    cfg = leaf.config()
    cfg.merge_from_list(shlex.split(overrides))
    epoch = 117_266 / cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.MAX_ITER == pytest.approx(36 * epoch, rel=1e-3)
    assert cfg.SOLVER.STEPS == pytest.approx((27 * epoch, 33 * epoch), rel=1e-3)


def test_published_schedule() -> None:
    """Of the releases: 36.8 epochs with drops after 28.6 and 34.1, one learning rate, clipping of the whole norm."""
    for name, leaf in LEAVES.items():
        if name in OWN | OTHER:
            continue
        cfg = leaf.config()
        steps = (cfg.SOLVER.MAX_ITER, *cfg.SOLVER.STEPS)
        expected = (87_960, 65_970, 80_630) if name.startswith("ablations/") else (270_000, 210_000, 250_000)
        assert steps == expected, name
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (2.5e-5, 16), name
        assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR) == (1000, 0.01), name
        clip = cfg.SOLVER.CLIP_GRADIENTS
        assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 1.0), name
        assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and cfg.INPUT.DROP_EMPTY_MASKS, name
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",), name
        v2 = name.startswith("istr_v2")
        assert list(cfg.INPUT.DETR_CROP.RELATIVE_SIZE) == ([] if v2 else [0.7, 0.7]), name
        assert list(cfg.INPUT.MIN_SIZE_TRAIN) == list(range(416, 1089, 32) if v2 else range(480, 801, 32)), name
        assert cfg.MODEL.BACKBONE.FREEZE_AT == (0 if v2 else 2), name
        assert cfg.SEED == (2333333 if v2 else 40244023), name
        if "swin" not in name:
            assert cfg.MODEL.WEIGHTS.endswith(f"torchvision/R-{cfg.MODEL.RESNETS.DEPTH}.pkl"), name
            assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.NORM == "FrozenBN", name


def test_published_optimiser() -> None:
    cfg = LEAVES["istr_r50"].config()
    cfg.SOLVER.WARMUP_ITERS = 0
    optimizer = build_optimizer(cfg, build_on_meta(cfg))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(2.5e-5, 1e-4)}


# What the row sets, where it differs from the published model
ROWS = {
    "length_40": {"CODING_LENGTH": 40},
    "length_60": {},
    "length_80": {"CODING_LENGTH": 80},
    "length_784": {"CODING_LENGTH": 784, "CODING_NAME": "flatten"},
    "mask_pixels": {"BRANCH": "PixelBranch"},
    "mask_cost_none": {"CODE_COST": "none"},
    "mask_cost_dice": {"CODE_COST": "dice"},
    "mask_cost_l1": {"CODE_COST": "l1"},
    "mask_cost_cosine": {},
    "mask_loss_dice": {"CODE_WEIGHT": 0.0},
    "mask_loss_l2": {"CODE_DICE_WEIGHT": 0.0},
    "mask_loss_both": {},
    "attention_multi_head": {"ATTENTION": "multi_head"},
    "attention_dynamic": {},
    "queries_max": {"QUERY_POOLING": "max", "USE_POSITION": False},
    "queries_avg": {"USE_POSITION": False},
    "queries_position": {"USE_IMAGE_FEATURE": False},
    "queries_both": {},
    "paper_equations": {
        "STAGE_INPUT": "initial",
        "DYNAMIC_LAYERS": 1,
        "CLASSIFIER": "softmax",
        "SOFTMAX_LOSS": "focal",
        "CODING_NAME": "pca_linear",
    },
    **{f"refinement_stages_{number}": {"NUM_STAGES": number} for number in range(1, 7)},
}


def test_rows_differ_in_their_setting_alone() -> None:
    found = {name.removeprefix("ablations/"): leaf for name, leaf in LEAVES.items() if name.startswith("ablations/")}
    assert set(found) == set(ROWS)
    for name, leaf in found.items():
        expected = LEAVES["istr_r50"].config()
        set_keys(expected, ROWS[name])
        assert leaf.config().MODEL == expected.MODEL, name


def test_swin_l() -> None:
    """What neither the number of parameters nor a small run shows."""
    cfg = LEAVES["istr_v2_smt_swin_l"].config()
    assert (cfg.MODEL.SWIN.WINDOW_SIZE, cfg.MODEL.SWIN.DROP_PATH_RATE) == (12, 0.3)
    assert (cfg.INPUT.MIN_SIZE_TEST, LEAVES["istr_v2_smt_swin_l_1088"].config().INPUT.MIN_SIZE_TEST) == (800, 1088)


@pytest.mark.parametrize("epochs, iterations", [(50, (368_750, 327_778, 355_092)), (100, (737_500, 655_556, 710_184))])
def test_large_scale_jitter(epochs: int, iterations: tuple[int, ...]) -> None:
    cfg, plain = LEAVES[f"istr_v2_smt_swin_l_lsj_{epochs}ep"].config(), LEAVES["istr_v2_smt_swin_l"].config()
    assert (cfg.SOLVER.MAX_ITER, *cfg.SOLVER.STEPS) == iterations
    assert cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.BACKBONE_MULTIPLIER == 0.1
    assert cfg.INPUT.LSJ.ENABLED and not cfg.INPUT.DETR_CROP.ENABLED
    assert (cfg.INPUT.LSJ.SIZE, list(cfg.INPUT.LSJ.SCALE), cfg.INPUT.LSJ.PAD_VALUE) == (1024, [0.1, 2.0], 128)
    assert cfg.MODEL == plain.MODEL


def test_cityscapes() -> None:
    cfg, coco = LEAVES["istr_v2_smt_r50_cityscapes"].config(), LEAVES["istr_v2_smt_r50"].config()
    solver, keys = cfg.SOLVER, cfg.INPUT
    assert (solver.MAX_ITER, *solver.STEPS, solver.IMS_PER_BATCH) == (48_000, 18_000, 36_000, 4)
    assert solver.BASE_LR == 1.5e-5 and not keys.DETR_CROP.ENABLED
    assert (min(keys.MIN_SIZE_TRAIN), max(keys.MIN_SIZE_TRAIN), keys.MAX_SIZE_TRAIN) == (800, 1024, 2048)
    assert (keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST) == (1024, 2048)
    assert cfg.MODEL.ISTR.NUM_CLASSES == 8
    coco.MODEL.ISTR.NUM_CLASSES = 8
    for section in ("ISTR", "MASK_BRANCH", "MASK_CODING"):
        assert cfg.MODEL[section] == coco.MODEL[section]
