"""Every config of EffSeg: it loads, has the size that the published model has, and trains."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from tiny_configs import tiny_config

from querymask.common.flops import count_parameters
from querymask.common.measured_models import build_on_meta
from querymask.common.meta_arch import mask_branch_name
from querymask.common.solver import build_lr_scheduler, build_optimizer, parameter_groups
from querymask.effseg.region_branch import PointRendBranch
from querymask.model_zoo import find_leaves

LEAVES = {leaf.name: leaf for leaf in find_leaves() if leaf.method == "effseg" and not leaf.name.startswith("pairs/")}
# On other data than COCO, with a schedule of their own
SMALL = {name for name in LEAVES if any(data in name for data in ("_shapes", "_nuclei", "_balloon"))}
HEADS = {
    "EffSegBranch": 4_208_872,
    "MaskRCNNBranch": 2_906_192,
    "PointRendBranch": 3_191_968,
    "RefineMaskBranch": 6_580_590,
}
# Trained parameters of the whole models, as measured on the release or summed from its parts
TRAINED = {
    "mask_rcnn_r50": 37_507_214,
    "pointrend_r50": 37_792_990,
    "refine_mask_r50": 41_181_612,
    "effseg_r50": 38_809_894,
    "ablations/processing_sfm": 38_809_894,
    "mask_rcnn_v2_r50": 40_524_174,
    "pointrend_v2_r50": 40_809_950,
    "refine_mask_v2_r50": 44_198_572,
    "effseg_v2_r50": 41_826_854,
}
# Millions, in the tables of the paper and of the release
ROUNDED = {
    "mask_rcnn_r50_deform_encoder": 45.0,
    "pointrend_r50_deform_encoder": 45.3,
    "refine_mask_r50_deform_encoder": 48.7,
    "effseg_r50_deform_encoder": 46.3,
    "fqdet_r50": 33.9,
}
PARTS = {"backbone": 23_232_512, "neck": 4_524_544, "detector": 6_843_966}
DETECTOR_V2, DEFORM_ENCODER = 9_860_926, 12_037_184
LOSSES = {
    "none": set(),
    "EffSegBranch": {"loss_segmentation", "loss_refinement"},
    "MaskRCNNBranch": {"loss_mask"},
    "PointRendBranch": {"loss_mask", "loss_point"},
    "RefineMaskBranch": {"loss_mask"},
}
DETECTOR_LOSSES = {"loss_selection", "loss_class", "loss_box"}


def trained(name: str) -> dict[str, int]:
    """Trained parameters of a row's model, of the whole ("") and of its parts."""
    counts = count_parameters(build_on_meta(LEAVES[name].config()))
    names = {"": "", "backbone": "backbone", "neck": "detector.neck", "detector": "detector", "head": "mask_branch"}
    found = {part: counts[key].trainable for part, key in names.items() if key in counts}
    return found | {"detector": found["detector"] - found["neck"]}


@pytest.mark.parametrize("name", TRAINED)
def test_published_size(name: str) -> None:
    cfg = LEAVES[name].config()
    counts = trained(name)
    assert counts.pop("") == TRAINED[name]
    version = {"detector": DETECTOR_V2} if cfg.MODEL.EFFSEG.VERSION == 2 else {}
    assert counts == PARTS | version | {"head": HEADS[mask_branch_name(cfg)]}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_size(name: str) -> None:
    counts = trained(name)
    assert round(counts[""] / 1e6, 1) == ROUNDED[name]
    if "deform_encoder" in name:
        assert counts["neck"] == DEFORM_ENCODER


def test_more_epochs_are_of_the_same_model() -> None:
    longer = [name for name in LEAVES if name.endswith("_24_epochs")]
    assert len(longer) == 8
    for name in longer:
        assert LEAVES[name].config().MODEL == LEAVES[name.removesuffix("_24_epochs")].config().MODEL, name


@pytest.mark.parametrize("name", [name for name in LEAVES if not name.endswith("_24_epochs")])
def test_training_step(name: str, make_batch: Callable[..., list[dict[str, Any]]]) -> None:
    """One step of the row's optimiser changes every trained parameter and no other."""
    torch.manual_seed(0)
    cfg = tiny_config(f"effseg/{name}")
    cfg.MODEL.EFFSEG.NUM_QUERIES = 500  # so many that some are matched without any training
    cfg.SOLVER.WARMUP_ITERS = 0
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    before = copy.deepcopy(dict(model.named_parameters()))

    losses = model(make_batch([3, 0], [(64, 96), (80, 50)]))
    assert set(losses) == DETECTOR_LOSSES | LOSSES[mask_branch_name(cfg)]
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        # Without gradient, as for an anchor's shape that no query has, weight decay may be too small to be seen
        if not parameter.requires_grad or parameter.grad.any():
            assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    unreached = sum(not p.grad.any() for p in model.parameters() if p.requires_grad)
    assert unreached < 0.5 * len(before)


EPOCHS = {"fqdet_r50": (9, 11, 12)}  # others: 9 and 12, or 18, 22 and 24


@pytest.mark.parametrize("name", sorted(set(LEAVES) - SMALL))
def test_published_schedule(name: str) -> None:
    cfg = LEAVES[name].config()
    images = 4 if name == "fqdet_r50" else 2
    epochs = EPOCHS.get(name, (18, 22, 24) if name.endswith("_24_epochs") else (9, 12))
    solver = cfg.SOLVER
    assert (*solver.STEPS, solver.MAX_ITER) == tuple(118_287 // images * epoch for epoch in epochs)
    assert (solver.IMS_PER_BATCH, solver.GAMMA, solver.WARMUP_ITERS) == (images, 0.1, 0)
    clip = solver.CLIP_GRADIENTS
    assert clip.ENABLED == ("deform_encoder" in name)
    if clip.ENABLED:
        assert (clip.CLIP_TYPE, clip.CLIP_VALUE) == ("full_model", 0.1)
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and not solver.AMP.ENABLED
    suffix = "_panoptic" if name.startswith("panoptic/") else ""
    assert cfg.DATASETS.TRAIN == (f"coco_2017_train{suffix}",) and cfg.DATASETS.TEST == (f"coco_2017_val{suffix}",)
    assert cfg.INPUT.DETR_CROP.ENABLED and list(cfg.INPUT.MIN_SIZE_TRAIN) == list(range(480, 801, 32))
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1333, 800, 1333)
    assert cfg.MODEL.WEIGHTS.endswith("torchvision/R-50.pkl")
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert cfg.MODEL.MASK_BRANCH.REGION.MAX_TRAIN_REGIONS == 0


def test_detectors() -> None:
    """What neither the number of parameters nor a small run shows."""
    for name in set(LEAVES) - SMALL:
        cfg, v2 = LEAVES[name].config(), "_v2_" in name
        effseg, head = cfg.MODEL.EFFSEG, cfg.MODEL.MASK_BRANCH.EFFSEG
        assert (effseg.VERSION, effseg.NUM_QUERIES) == ((2, 600) if v2 else (1, 300))
        if not name.startswith("panoptic/"):
            assert effseg.NMS_THRESHOLD == (0.65 if v2 else 0.5)
        assert head.REFINEMENTS == 10_000 and list(head.DILATIONS) == [1, 3, 5]


@pytest.mark.parametrize(
    "name",
    [
        "effseg_r50",
        "effseg_v2_r50",
        "effseg_r50_deform_encoder",
        "mask_rcnn_r50",
        "ablations/processing_deform_conv",
    ],
)
def test_published_optimiser(name: str) -> None:
    """AdamW; sampling offsets and backbone learn at a tenth of the rate; everything decays.

    The offsets of the deformable convolution, which is not in the release, learn at the full rate.
    """
    cfg = LEAVES[name].config()
    model = build_on_meta(cfg)
    assert isinstance(build_optimizer(cfg, model), torch.optim.AdamW)
    rates = {id(p): group["lr"] for group in parameter_groups(cfg, model) for p in group["params"]}
    assert {group["weight_decay"] for group in parameter_groups(cfg, model)} == {1e-4}
    found = {name: rates.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not rates
    slow = {name for name in found if name.startswith("backbone.") or "sampling_offsets" in name}
    assert found == {name: pytest.approx(1e-5 if name in slow else 1e-4) for name in found}
    effseg = cfg.MODEL.EFFSEG
    layers = effseg.DEC_LAYERS + (effseg.ENC_LAYERS if effseg.NECK == "deform_encoder" else 0)
    assert sum("sampling_offsets" in name for name in found) == 2 * layers  # weight and bias of each
    convolution = {rate for name, rate in found.items() if ".offset." in name}
    assert convolution == ({1e-4} if cfg.MODEL.MASK_BRANCH.EFFSEG.PROCESSING == "deform_conv" else set())


# Of MODEL.MASK_BRANCH.EFFSEG
ABLATIONS = {
    **{f"processing_{name}": ("PROCESSING", name) for name in ("mlp", "conv", "deform_conv", "sfm", "dense_sfm")},
    **{f"choose_{name}": ("CHOOSE_BY", name) for name in ("uncertainty", "boundary")},
    "separate_children": ("SEPARATE_CHILDREN", True),
    "targets_centre": ("TARGETS", "centre"),
}


def assert_differs(name: str, base_name: str, key: str, value: Any) -> None:
    base, cfg = LEAVES[base_name].config(), LEAVES[name].config()
    assert cfg.MODEL.MASK_BRANCH.EFFSEG[key] == value
    base.MODEL.MASK_BRANCH.EFFSEG[key] = value
    assert (cfg.MODEL, cfg.SOLVER, cfg.INPUT) == (base.MODEL, base.SOLVER, base.INPUT)


def test_rows_differ_in_their_setting_alone() -> None:
    rows = {name for name in LEAVES if name.startswith("ablations/")}
    assert rows == {f"ablations/{name}" for name in ABLATIONS}
    for name, (key, value) in ABLATIONS.items():
        assert_differs(f"ablations/{name}", "effseg_r50", key, value)
    for choice in ("uncertainty", "boundary"):
        assert_differs(f"effseg_{choice}_shapes", "effseg_shapes", "CHOOSE_BY", choice)


def test_panoptic_models_differ_from_those_of_instances_in_classes_and_thresholds_alone() -> None:
    names = {name for name in LEAVES if name.startswith("panoptic/")} - SMALL
    heads = ("mask_rcnn", "pointrend", "refine_mask", "effseg")
    first = "panoptic/effseg_v2_r50_panoptic_first_thresholds"
    assert names == {f"panoptic/{head}_v2_r50_panoptic" for head in heads} | {first}
    for name in names:
        cfg = LEAVES[name].config()
        base = LEAVES[name.removeprefix("panoptic/").partition("_panoptic")[0]].config()
        panoptic, is_first = cfg.MODEL.PANOPTIC, name == first
        assert panoptic.ENABLED and (panoptic.NUM_THINGS, cfg.MODEL.EFFSEG.NUM_CLASSES) == (80, 133)
        assert (
            cfg.MODEL.EFFSEG.NMS_THRESHOLD,
            panoptic.SCORE_THRESHOLD,
            panoptic.MASK_THRESHOLD,
            panoptic.NMS_THRESHOLD,
            panoptic.PIXEL_THRESHOLD,
            panoptic.AGREEMENT_THRESHOLD,
            panoptic.AREA_THRESHOLD,
        ) == ((0.6, 0.3, 0.5, 0.9, 0.3, 0.6, 200) if is_first else (0.5, 0.3, 0.5, 0.75, 0.35, 0.6, 150))
        base.MODEL.PANOPTIC = panoptic
        for key in ("NUM_CLASSES", "NMS_THRESHOLD"):
            base.MODEL.EFFSEG[key] = cfg.MODEL.EFFSEG[key]
        assert (cfg.MODEL, cfg.SOLVER, cfg.INPUT) == (base.MODEL, base.SOLVER, base.INPUT)


def test_size_of_pointrend_masks() -> None:
    """As the paper's text has it; the release's are twice as large."""
    for name in (name for name in LEAVES if "pointrend_" in name):
        with torch.device("meta"):
            head = PointRendBranch.build_head(LEAVES[name].config(), 256, 80)
        assert head.mask_size == (224 if "_v2_" in name else 112), name
