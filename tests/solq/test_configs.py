"""Every config: it loads, has the size that the paper's model has, and trains; the model zoo names it."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_configs import tiny_config
from tool_loader import load_tool

from querymask import get_cfg
from querymask.common.engine.unused_keys import leaves
from querymask.common.flops import count_parameters
from querymask.common.mask_coding import fill_missing_bases
from querymask.common.measured_models import build_on_meta
from querymask.common.meta_arch import mask_branch_name, uses_masks
from querymask.common.solver import build_lr_scheduler, build_optimizer
from querymask.model_zoo import find_leaves

zoo = load_tool("make_model_zoo")
LEAVES = {leaf.name: leaf for leaf in find_leaves() if leaf.method == "solq" and not leaf.name.startswith("pairs/")}
OWN = {
    "solq_shapes",
    "solq_shapes_quick",
    "solq_r50_overfit",
    "deformable_detr_shapes",
    "solq_nuclei",
}  # this project's, on other data than COCO
COCO_LEAVES = {name: leaf for name, leaf in LEAVES.items() if name not in OWN}

# Parameters with 91 classes, in all and trained, as measured on the release
PUBLISHED_SIZES = {
    "solq_r50": (54_193_660, 53_971_260),
    "solq_r50_width256": (42_424_828, 42_202_428),
    "solq_r101": (73_133_564, 72_911_164),
    "solq_swin_l": (223_622_992, 223_622_992),
    "solq_swin_l_1536": (223_622_992, 223_622_992),
    "fast_solq_r50": (54_193_660, 53_971_260),
    "ablations/coding_dct": (45_190_780, 44_968_380),
    "deformable_detr_r50_refine": (52_487_420, 52_265_020),
    "sqr_r50": (66_957_717, 66_735_317),
}
R50_PARTS = {
    "backbone": 23_454_912,
    "projections": 8_458_752,
    "encoder": 7_397_376,
    "decoder with box heads": 12_733_464,
    "class heads": 210_210,
    "mask head": 1_706_240,
    "query embedding": 230_400,
    "level embedding": 1_536,
    "reference layer": 770,
}


def size(module: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    counts = count_parameters(module)[""]
    return counts.total, counts.trainable


def batch() -> list[dict[str, Any]]:
    """Two images of different size, the second without instances."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for height, width, boxes in ((64, 90, [[4.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 60.0]]), (80, 60, [])):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(boxes)) + 1
        masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[int(y0) + 5 : int(y1), int(x0) : int(x1) - 5] = True
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        items.append({"image": image, "instances": instances, "height": height // 2, "width": width // 2})
    return items


@pytest.mark.parametrize("name", LEAVES)
def test_training_step(name: str) -> None:
    """The losses of the row are there, reach every trained parameter, and one step of its optimiser changes all."""
    torch.manual_seed(0)
    cfg = tiny_config(f"solq/{name}")
    model = build_model(cfg).train()
    fill_missing_bases(model)
    for head in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        torch.nn.init.normal_(head.weight, std=0.1)  # heads and offsets start at zero, which holds gradients back
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    before = copy.deepcopy(model.state_dict())

    losses = model(batch())
    assert set(losses) == expected_losses(cfg)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            assert not torch.equal(parameter, before[key]), f"{key} did not move"
        else:
            assert torch.equal(parameter, before[key]), f"{key} is frozen but moved"


def expected_losses(cfg: CfgNode) -> set[str]:
    solq = cfg.MODEL.SOLQ
    last = solq.DEC_LAYERS - 1
    suffixes = ["" if layer == last else f"_{layer}" for layer in range(solq.DEC_LAYERS)]
    names = {kind + suffix for kind in ("loss_ce", "loss_bbox", "loss_giou") for suffix in suffixes}
    if solq.TWO_STAGE:
        names |= {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"}
    branch = mask_branch_name(cfg)
    if branch == "SQRBranch":
        names |= {"loss_mask", "loss_dice"}
    elif branch == "VectorBranch":
        first = min(cfg.MODEL.MASK_BRANCH.VECTOR.START_LAYER, last)
        names |= {f"loss_vector{suffix}" for suffix in suffixes[first:]}
    return names


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_size(name: str) -> None:
    cfg = LEAVES[name].config()
    cfg.MODEL.SOLQ.NUM_CLASSES = 91
    assert size(build_on_meta(cfg)) == PUBLISHED_SIZES[name]


def test_published_size_of_sqr() -> None:
    """The count in the log with ResNet-101, and those of the release at SOLQ's width, also with a frozen detector."""
    cfg = LEAVES["sqr_r101"].config()
    cfg.MODEL.SOLQ.NUM_CLASSES = 91
    assert size(build_on_meta(cfg))[1] == 85_675_221
    for name, trainable in {"sqr_r50": 79_874_037, "sqr_r50_frozen": 27_609_017}.items():
        cfg = LEAVES[name].config()
        cfg.MODEL.SOLQ.NUM_CLASSES, cfg.MODEL.SOLQ.HIDDEN_DIM = 91, 384
        assert size(build_on_meta(cfg)) == (80_096_437, trainable)


def test_published_size_of_each_part() -> None:
    cfg = LEAVES["solq_r50"].config()
    cfg.MODEL.SOLQ.NUM_CLASSES = 91
    model = build_on_meta(cfg)
    modules = {
        "backbone": [model.backbone],
        "projections": [model.detector.input_proj],
        "encoder": [model.detector.transformer.encoder],
        "decoder with box heads": [model.detector.transformer.decoder, model.detector.bbox_embed],
        "class heads": [model.detector.class_embed],
        "mask head": [model.mask_branch.vector_embed],
        "query embedding": [model.detector.query_embed],
        "reference layer": [model.detector.transformer.reference_points],
    }
    sizes = {part: sum(size(module)[0] for module in those) for part, those in modules.items()}
    sizes["level embedding"] = model.detector.transformer.level_embed.numel()
    assert sizes == R50_PARTS
    assert sum(sizes.values()) == size(model)[0], "a part is missing from the list"


def test_schedule_in_epochs() -> None:
    """50 epochs with a drop after 40, of all 118,287 images of train2017 in whole batches of 32."""
    for name, leaf in COCO_LEAVES.items():
        cfg = leaf.config()
        epoch = 118_287 // cfg.SOLVER.IMS_PER_BATCH
        assert (cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)) == (50 * epoch, [40 * epoch]), name
        assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, name
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",), name


def test_image_sizes_of_the_paper() -> None:
    """Shorter sides of 408 to 800, by the overrides that the method's page gives."""
    leaf = LEAVES["solq_r50"]
    page = (leaf.path.parents[1] / "README.md").read_text()
    (overrides,) = re.findall(r"408 to 800, are\s+`(INPUT\..*)`", page)
    cfg = leaf.config()
    cfg.merge_from_list(shlex.split(overrides))
    assert (cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN) == ("range", (408, 800))


def test_published_optimiser() -> None:
    """Learning rates by group, weight decay on everything, one norm over all gradients, no warm-up."""
    cfg = LEAVES["solq_r50"].config()
    optimizer = build_optimizer(cfg, build_on_meta(cfg))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "base": pytest.approx(2e-4),
        "backbone": pytest.approx(2e-5),
        "slow": pytest.approx(2e-5),
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.1)
    assert cfg.SOLVER.WARMUP_ITERS == 0


def test_names_of_ablations_say_their_setting() -> None:
    nodes = {name: leaf.config().MODEL for name, leaf in LEAVES.items() if name.startswith("ablations/")}
    settings = {
        "loss_weight": lambda node: node.MASK_BRANCH.VECTOR.WEIGHT,
        "stages": lambda node: node.SOLQ.DEC_LAYERS - node.MASK_BRANCH.VECTOR.START_LAYER,
        "mask_size": lambda node: node.MASK_CODING.SIZE,
        "vector_length": lambda node: node.MASK_CODING.LENGTH,
    }
    rows = {kind: [] for kind in settings}
    for name, node in nodes.items():
        assert (node.SOLQ.NUM_FEATURE_LEVELS, node.SOLQ.IN_FEATURES) == (1, ["res5"]), name
        kind, _, value = name.removeprefix("ablations/").rpartition("_")
        if kind in settings:
            assert settings[kind](node) == float(value), name
            rows[kind].append(float(value))
        if kind == "loss_weight":
            assert node.MASK_BRANCH.VECTOR.START_LAYER == 5, name
    assert {kind: sorted(values) for kind, values in rows.items()} == {
        "loss_weight": [0.3, 0.7, 1, 2, 3, 4],
        "stages": [1, 2, 3, 4, 5, 6],
        "mask_size": [64, 96, 128, 256],
        "vector_length": [144, 256, 300, 400],
    }


def test_codings_of_the_ablations() -> None:
    """Table 3a: coding, side of the mask, length of the vector, loss."""
    rows = {}
    for kind in ("dct", "pca", "flatten", "sparse"):
        model = LEAVES[f"ablations/coding_{kind}"].config().MODEL
        coding, vector = model.MASK_CODING, model.MASK_BRANCH.VECTOR
        rows[coding.NAME] = (coding.SIZE, coding.LENGTH, vector.LOSS, vector.PASTE)
    assert rows == {
        "dct": (128, 256, "l1", "binary"),
        "pca_pixels": (28, 60, "l1", "soft"),
        "flatten": (28, 784, "l2_dice", "soft"),
        "sparse": (28, 256, "l1", "soft"),
    }
    assert not uses_masks(LEAVES["ablations/coding_none"].config())


def test_forms_of_the_paper_and_of_the_release() -> None:
    paper, release = (LEAVES[name].config() for name in ("solq_r50_paper", "solq_r50"))
    assert (paper.INPUT.MIN_SIZE_TRAIN, paper.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((408, 800), "range")
    assert not paper.MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD and release.MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD
    paper.MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD = True
    assert paper.MODEL == release.MODEL
    head = R50_PARTS["mask head"]
    sizes = [size(build_on_meta(LEAVES[name].config()))[0] for name in ("solq_r50_paper", "solq_r50")]
    assert sizes[0] - sizes[1] == 5 * head
    pca = LEAVES["solq_r50_pca"].config().MODEL
    assert (pca.MASK_CODING.NAME, pca.MASK_BRANCH.VECTOR.LOSS) == ("pca", "l2_dice")


def test_backbone_as_torchvision_has_it() -> None:
    for name, leaf in COCO_LEAVES.items():
        cfg = leaf.config()
        if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
            if not cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR:  # that starts from a whole detector
                assert "torchvision/R-" in cfg.MODEL.WEIGHTS, name
                assert cfg.MODEL.WEIGHTS.endswith(f"R-{cfg.MODEL.RESNETS.DEPTH}.pkl"), name
            assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1, name
            assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (2, "FrozenBN"), name
        assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD[0] == pytest.approx(0.229 * 255), name


def test_swin_l() -> None:
    """What neither the number of parameters nor a small run shows."""
    keys = ("MIN_SIZE_TRAIN_SAMPLING", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST")
    sizes = {}
    for name in ("solq_swin_l", "solq_swin_l_1536"):
        cfg = LEAVES[name].config()
        assert (cfg.MODEL.SWIN.WINDOW_SIZE, cfg.MODEL.SWIN.DROP_PATH_RATE) == (7, 0.3)
        sizes[name] = (list(cfg.INPUT.MIN_SIZE_TRAIN), *(cfg.INPUT[key] for key in keys))
    assert sizes == {
        "solq_swin_l": (list(range(416, 1089, 32)), "choice", 1333, 1088, 1333),
        "solq_swin_l_1536": ([400, 1200], "range", 1536, 1200, 1536),
    }


def test_model_zoo_is_in_step() -> None:
    page = zoo.OUTPUT.read_text()
    assert page == zoo.render(find_leaves(), zoo.read_gflops(page)), "run tools/make_model_zoo.py"
    for leaf in LEAVES.values():
        assert page.count(f"/configs/{leaf.name}.yaml)") == 1, f"{leaf.name} must have one row"


@pytest.mark.parametrize("method", ["solq", "isda", "istr", "effseg"])
def test_ablations_in_the_methods_page_are_in_step(method: str) -> None:
    page = (zoo.ROOT / "projects" / method / "README.md").read_text()
    leaves = zoo.find_leaves()
    own = [leaf for leaf in leaves if leaf.method == method]
    assert page == zoo.render_ablations(page, own), "run tools/make_model_zoo.py --keep-gflops"
    assert page == zoo.render_comparisons(page, method, leaves), "run tools/make_model_zoo.py --keep-gflops"
    with pytest.raises(ValueError, match="must have the lines '<!-- Begin of comparisons, written by"):
        zoo.render_comparisons(page.replace("<!-- End of comparisons", ""), method, leaves)
    assert page.count("](configs/ablations/") >= sum(leaf.name.startswith("ablations/") for leaf in own) > 1


def test_configs_set_nothing_that_their_bases_give() -> None:
    defaults = dict(leaves(get_cfg()))
    for path in sorted((zoo.ROOT / "projects").glob("*/configs/**/*.yaml")):
        own = yaml.safe_load(path.read_text())
        if "_BASE_" not in own:
            continue
        bases = own.pop("_BASE_")
        given = dict(defaults)
        for base in [bases] if isinstance(bases, str) else bases:
            given |= decoded(CfgNode.load_yaml_with_base(str(path.parent / base)))
        repeated = [key for key, value in decoded(own).items() if value == given[key]]
        assert not repeated, f"{path}: {repeated}"


def decoded(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys with their values, which YAML holds as strings where they are tuples."""
    return {key: CfgNode._decode_cfg_value(value) for key, value in leaves(CfgNode(settings))}


def test_configs_with_an_incomplete_head_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "solq" / "configs" / "nameless.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("MODEL: {}\n")
    with pytest.raises(ValueError, match=r"nameless\.yaml: its first line must be a comment"):
        find_leaves(tmp_path)
    path.write_text("# A model\n# Weights: somebody's, R50\nMODEL: {}\n")
    with pytest.raises(ValueError, match=r"nameless\.yaml: weights of somebody's, which is none of SOLQ's release,"):
        find_leaves(tmp_path)
