"""ISDA against its official implementation: network, detections, matching, losses, gradients, and that files load."""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_document, load_manifest, reference_dir
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from tiny_models import find_key
from training_steps import training_step

import querymask
from querymask.common.boxes import inverse_sigmoid
from querymask.common.deformable_attention import encoder_reference_points, valid_ratios
from querymask.common.losses import dice_loss
from querymask.common.position_encoding import sine_position_encoding
from querymask.common.predictions import Predictions, Targets, weighted
from querymask.common.set_criterion import SetDetector
from querymask.isda.checkpoint import convert
from querymask.isda.criterion import ClassCriterion
from querymask.isda.kernels import KernelBranch, Kernels, soft_iou
from querymask.isda.masks import reduce_masks

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NUM_CLASSES = 80


def load_isda_cases(kind: str) -> dict[str, dict[str, Any]]:
    """The cases of a kind by name; this subject lists them."""
    if not (reference_dir() / "isda" / "cases.json").exists():
        return {}
    return {case["name"]: case for case in load_document("isda")["cases"] if case["kind"] == kind}


def test_every_kind_of_case_is_known() -> None:
    known = {"inference", "training"} | {f"component/{name}" for name in COMPONENTS}
    if (reference_dir() / "isda" / "cases.json").exists():
        unknown = {case["name"]: case["kind"] for case in load_document("isda")["cases"] if case["kind"] not in known}
        assert not unknown, f"cases of a kind that the project does not know: {unknown}"


# Official setting -> config key. Settings with a fixed meaning are handled in `configure`.
SETTINGS = {
    "num_query": "NUM_QUERIES",
    "num_kernel_fcs": "KERNEL_NUM_FCS",
    "encoder_layers": "ENC_LAYERS",
    "decoder_layers": "DEC_LAYERS",
    "mask_thr": "KERNEL_MASK_THRESHOLD",
    "maskness_thr": "KERNEL_MASKNESS_THRESHOLD",
    "mask_stride": "KERNEL_MASK_STRIDE",
    "mfr_positions": "KERNEL_MASK_POSITIONS",
}


def configure(case: Mapping[str, Any]) -> CfgNode:
    """The project's config for a case; a setting without counterpart is an error."""
    cfg = querymask.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ISDA"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for name, value in {**load_document("isda")["config_defaults"], **case["config"]}.items():
        if name in SETTINGS:
            node, key = find_key(cfg, SETTINGS[name])
            node[key] = type(node[key])(value)
        elif name == "max_per_img":
            cfg.TEST.DETECTIONS_PER_IMAGE = value
        elif name == "kernel_positions":
            cfg.MODEL.MASK_BRANCH.KERNEL.POSITIONS = "logit" if value else "none"
        else:
            pytest.fail(f"the case has a setting that the project does not know: {name} = {value}")
    return cfg


def manifest(cfg: CfgNode) -> dict[str, list[int]]:
    """Keys and shapes of the official checkpoint for a configuration: the stored ones, adapted to its switches."""
    isda, kernel, shapes = cfg.MODEL.ISDA, cfg.MODEL.MASK_BRANCH.KERNEL, {}
    last = 2 * kernel.NUM_FCS
    for key, shape in load_manifest("isda", "checkpoint.json").items():
        if ".kernel_branches." in key or ".cls_branches." in key or "mask_feat_head.convs_all" in key:
            continue  # their number depends on the configuration
        layer = re.match(r"(bbox_head\.transformer\.(en|de)coder\.layers\.)(\d+)(\..*)", key)
        if layer is None:
            shapes[key] = [isda.NUM_QUERIES, *shape[1:]] if "query_embedding" in key else shape
        elif layer[3] == "0":
            number = isda.ENC_LAYERS if layer[2] == "en" else isda.DEC_LAYERS
            shapes |= {f"{layer[1]}{i}{layer[4]}": shape for i in range(number)}
    for layer in range(isda.DEC_LAYERS):
        shapes |= {
            f"bbox_head.cls_branches.{layer}.weight": [NUM_CLASSES, 256],
            f"bbox_head.cls_branches.{layer}.bias": [NUM_CLASSES],
        }
        for index in range(0, last + 1, 2):
            length = 256 if index < last or kernel.POSITIONS == "none" else 254
            shapes[f"bbox_head.kernel_branches.{layer}.{index}.weight"] = [length, 256]
            shapes[f"bbox_head.kernel_branches.{layer}.{index}.bias"] = [length]
    upsamplings = {2: [1, 2, 3, 4], 4: [0, 1, 2, 3], 8: [0, 1, 2]}[kernel.MASK_STRIDE]
    for branch, count in enumerate(upsamplings):
        for unit in range(max(count, 1)):
            prefix = f"mask_feat_head.convs_all_levels.{branch}.conv{unit}"
            coordinates = 2 if kernel.MASK_POSITIONS and branch == len(upsamplings) - 1 else 0
            shapes[f"{prefix}.conv.weight"] = [128, 128 if unit else 256 + coordinates, 3, 3]
            shapes[f"{prefix}.gn.weight"] = shapes[f"{prefix}.gn.bias"] = [128]
    return shapes


def official_weight(key: str, shape: list[int], cfg: CfgNode) -> torch.Tensor:
    """A weight by the rule of the cases."""
    parts = key.split(".")
    shared = parts[:2] in (["bbox_head", "cls_branches"], ["bbox_head", "kernel_branches"])
    value = np.asarray(fixture().weight(".".join([*parts[:2], "0", *parts[3:]]) if shared else key, shape))
    if key == "bbox_head.query_embedding.weight":
        value = value * np.sqrt(512)
    if parts[1] == "cls_branches" and key.endswith("bias"):
        value = value - np.log(99)
    if parts[1] == "kernel_branches" and key.endswith(f".{2 * cfg.MODEL.MASK_BRANCH.KERNEL.NUM_FCS}.bias"):
        value = value - 0.022
    return torch.from_numpy(value)


@contextmanager
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def load_model(case: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The project's model with the official weights, in evaluation mode, and those weights."""
    cfg = configure(case)
    state = {key: official_weight(key, shape, cfg) for key, shape in manifest(cfg).items()}
    with double_precision():
        model = build_model(cfg).double().eval()
    converted, _ = convert(state)
    model.load_state_dict(converted, strict=True)
    return model, state


def test_manifest_of_the_default_configuration() -> None:
    """The rule that adapts the manifest gives the stored one where nothing is adapted."""
    if (reference_dir() / "isda" / "checkpoint.json").exists():
        assert manifest(configure({"config": {}})) == load_manifest("isda", "checkpoint.json")


def model_input(image: Mapping[str, Any], target: Mapping[str, Any] | None = None) -> dict[str, Any]:
    size = (image["height"], image["width"])
    pixels = fixture().image(image["seed"], *size)[:, :, ::-1]
    item: dict[str, Any] = {
        "image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "height": image.get("out_height", size[0]),
        "width": image.get("out_width", size[1]),
    }
    if target is not None:
        labels, masks, _ = fixture().targets(target["seed"], *size, target["count"], NUM_CLASSES)
        instances = Instances(size)
        instances.gt_classes = torch.from_numpy(labels)
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        item["instances"] = instances
    return item


class Comparison:
    """Compares arrays with those of a case; every array of the case must have been compared in the end."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.arrays = load_arrays("isda", case)
        self.strides = {array["name"]: array.get("stride") or [] for array in case["arrays"]}
        self.left = set(self.strides)

    def expected(self, name: str) -> np.ndarray:
        self.left.discard(name)
        return self.arrays[name]

    def thinned(self, name: str, array: Any) -> np.ndarray:
        return np.asarray(array.detach())[tuple(slice(None, None, step) for step in self.strides[name])]

    def close(self, name: str, array: torch.Tensor) -> None:
        if name in self.strides:
            assert_close(self.thinned(name, array), self.expected(name), name)

    def equal(self, name: str, array: torch.Tensor) -> None:
        if name in self.strides:
            assert np.array_equal(self.thinned(name, array), self.expected(name)), name

    def masks(self, name: str, masks: torch.Tensor) -> None:
        step = self.strides[name][0]
        assert np.array_equal(np.packbits(masks.numpy()[::step], axis=-1), self.expected(name)), name

    def finish(self) -> None:
        assert not self.left, f"arrays of the case that were not compared: {sorted(self.left)}"


@pytest.mark.parametrize("name", load_isda_cases("inference"))
def test_isda_inference(name: str) -> None:
    case = load_isda_cases("inference")[name]
    compare = Comparison(case)
    model, _ = load_model(case)
    seen: dict[str, Any] = {}

    def keep(key: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(key, output)

    encoder = model.detector.transformer.encoder
    model.backbone.register_forward_hook(keep("backbone"))
    model.detector.input_proj.register_forward_hook(keep("levels"))
    encoder.layers[0].register_forward_hook(keep("layer"))
    encoder.register_forward_pre_hook(lambda module, arguments: seen.__setitem__("encoder", arguments))
    batch = [model_input(image) for image in case["images"]]
    images = model.preprocess(batch)
    with torch.no_grad():
        predictions, made = model.predict(images)
        detections = model.detect(predictions, made, [(item["height"], item["width"]) for item in batch])
        masks = (made.kernels[-1] @ made.features.flatten(2)).unflatten(-1, made.features.shape[2:])

    for i in range(2, 6):
        compare.close(f"c{i}", seen["backbone"][f"res{i}"])
    with torch.no_grad():
        compare.close("p2", model.detector.fine_proj([seen["backbone"]["res2"]])[0])
    _, position, shapes, ratios, padding = seen["encoder"]
    sizes = [height * width for height, width in shapes]
    position = position - torch.cat([e.expand(n, -1) for e, n in zip(model.detector.transformer.level_embed, sizes)])
    starts = np.cumsum([0, *sizes])
    for level, (height, width) in enumerate(shapes):
        part = slice(starts[level], starts[level + 1])
        compare.close(f"p{level + 3}", seen["levels"][level])
        encoding = position[:, part].transpose(1, 2).unflatten(2, (height, width))
        compare.close(f"position_p{level + 3}", encoding)
        mask = (
            torch.zeros(len(batch), height, width)
            if padding is None
            else padding[:, part].unflatten(1, (height, width))
        )
        compare.equal(f"padding_mask_p{level + 3}", mask.bool())
    compare.close("encoder_first", seen["layer"])
    for key, array in {
        "mfr": made.features,
        "valid_ratios": ratios,
        "memory": predictions.memory,
        "decoder": predictions.hidden,
        "reference_points": predictions.references,
        "class_logits": predictions.logits,
        "kernels": made.kernels,
        "mask_logits": masks,
    }.items():
        compare.close(key, array)
    class_scores = predictions.logits[-1].sigmoid()
    for b, found in enumerate(detections):
        scores = class_scores[b, found.pred_queries, found.pred_classes]
        compare.equal(f"det{b}_query", found.pred_queries)
        compare.equal(f"det{b}_label", found.pred_classes)
        compare.close(f"det{b}_class_score", scores)
        compare.close(f"det{b}_score", found.scores)
        compare.close(f"det{b}_maskness", found.scores / scores)
        compare.equal(f"det{b}_area", found.pred_masks.sum((1, 2)))
        compare.masks(f"det{b}_mask", found.pred_masks)
    compare.finish()


def official_name(name: str) -> str:
    """``loss_cls_0`` -> ``d0.loss_cls``."""
    base, _, layer = name.rpartition("_")
    return f"d{layer}.{base}" if layer.isdigit() else name


@pytest.mark.parametrize("name", load_isda_cases("training"))
def test_isda_training(name: str) -> None:
    case = load_isda_cases("training")[name]
    compare = Comparison(case)
    model, official = load_model(case)
    batch = [model_input(image, target) for image, target in zip(case["images"], case["targets"], strict=True)]
    step = training_step(model, batch)
    found, targets, assignment = step.found, step.targets, step.assignment
    costs = {
        **model.detector.criterion.cost_terms(found, targets),
        **model.mask_branch.costs(found, step.made, step.truth, targets),
    }
    starts = np.cumsum([0, *targets.counts])
    for b, count in enumerate(targets.counts):
        compare.close(f"mask_target{b}", step.truth[starts[b] : starts[b + 1]])
        compare.close(f"class_cost{b}", costs["class cost"][:, b, :, :count])
        compare.close(f"mask_cost{b}", costs["mask cost"][:, b, :, :count])
        match = torch.full((assignment.num_layers, count), -1)
        here = assignment.image == b
        match[assignment.layer[here], assignment.target[here] - int(starts[b])] = assignment.query[here]
        compare.equal(f"match{b}", match)
    losses = {official_name(key): value for key, value in weighted(step.terms).items()}
    assert set(losses) == set(case["loss_names"])
    for key, value in zip(case["loss_names"], compare.expected("loss_values"), strict=True):
        assert_close(losses[key].detach(), np.asarray(value), key)
    total = sum(losses.values())
    assert_close(total.detach(), np.asarray(case["loss_total"]), "total")
    total.backward()
    check_gradients(model, official, dict(zip(case["grad_names"], compare.expected("grad_norms"), strict=True)))
    compare.finish()


def check_gradients(model: torch.nn.Module, official: Mapping[str, torch.Tensor], norms: Mapping[str, float]) -> None:
    """Parameters of the project are found by converting a state dict that holds the number of each official key."""
    numbered = {key: torch.full(value.shape[:1] or (1,), i).float() for i, (key, value) in enumerate(official.items())}
    for key in numbered:  # copies of a shared module must stay equal
        parts = key.split(".")
        if parts[:2] in (["bbox_head", "cls_branches"], ["bbox_head", "kernel_branches"]):
            numbered[key] = numbered[".".join([*parts[:2], "0", *parts[3:]])]
    names = dict(enumerate(official))
    origin = {target: names[int(value[0])] for target, value in convert(numbered)[0].items()}
    found = {origin[key]: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    largest = max(norms.values())
    for key in set(found) | set(norms):  # what a list leaves out has no gradient there
        norm = norms.get(key, 0.0)
        error = abs(found.get(key, 0.0) - norm)
        assert error <= 1e-5 * max(norm, 1e-4 * largest), f"gradient of {key}: off by {error}"


# ---- Components ---------------------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def check_mask_feature_head(case: Mapping[str, Any], compare: Comparison) -> None:
    rng = np.random.default_rng(case["args"]["seed"])
    levels = [normal(rng, *shape) for shape in case["args"]["shapes"]]
    model, _ = load_model(case)
    compare.close("mfr", model.mask_branch.mask_features(levels))


def check_mask_head(case: Mapping[str, Any], compare: Comparison) -> None:
    arguments = case["args"]
    rng = np.random.default_rng(arguments["seed"])
    hidden = normal(rng, 1, arguments["n"], 256)
    references = torch.from_numpy(rng.random((1, arguments["n"], 2)))
    references[0, 0] = torch.tensor([0.0, 1.0])
    references[0, 1] = torch.tensor([1e-6, 1 - 1e-6])
    features = normal(rng, 1, 256, *arguments["hw"]).abs()
    model, _ = load_model(case)
    kernels = model.mask_branch.make_kernels(hidden[None], references[None])[0]
    logits = (kernels @ features.flatten(2)).unflatten(-1, arguments["hw"])
    compare.close("class_logits", model.detector.class_embed(hidden))
    compare.close("reference_logits", inverse_sigmoid(references))
    compare.close("kernels", kernels)
    compare.close("mask_logits", logits)
    compare.close("mask_probabilities", logits.sigmoid())


def kernel_branch(cfg: CfgNode) -> KernelBranch:
    """The mask branch of a config."""
    branch = build_model(cfg).mask_branch
    assert isinstance(branch, KernelBranch)
    return branch


def check_matching_and_losses(case: Mapping[str, Any], compare: Comparison) -> None:
    arguments = case["args"]
    count, (height, width) = arguments["count"], arguments["hw"]
    rng = np.random.default_rng(arguments["seed"])
    logits = 2 * normal(rng, arguments["n"], NUM_CLASSES) - 3
    mask_logits = 2 * normal(rng, arguments["n"], height, width)
    labels, masks, _ = fixture().targets(arguments["tseed"], 4 * height, 4 * width, count, NUM_CLASSES)
    masks = reduce_masks(torch.from_numpy(masks), 4, (height, width), torch.float64)
    cfg = configure(case)
    isda = cfg.MODEL.ISDA
    detector = SetDetector(ClassCriterion(isda.COST_CLASS, isda.CLASS_WEIGHT, isda.FOCAL_ALPHA))
    branch = kernel_branch(cfg)
    # Kernels that pick one channel each: every query has a map of its own
    made = Kernels(torch.eye(arguments["n"], dtype=torch.float64)[None, None], mask_logits[None])
    found = Predictions(logits[None, None], logits[None, None])
    targets = Targets([count], torch.from_numpy(labels), torch.zeros(count, 4), [(4 * height, 4 * width)])
    mask_costs = branch.costs(found, made, masks, targets)
    costs = {key: value[0, 0] for key, value in {**detector.criterion.cost_terms(found, targets), **mask_costs}.items()}
    assignment = detector.match(found, targets, mask_costs)
    normalizers = detector.normalizers(targets, assignment)
    terms = [
        *detector.losses(found, targets, assignment, normalizers),
        *branch.losses(found, made, masks, targets, assignment, normalizers),
    ]
    losses = weighted(terms)
    match = torch.empty(count, dtype=torch.int64)
    match[assignment.target] = assignment.query
    compare.close("mask_targets", masks)
    compare.close("class_cost", costs["class cost"])
    compare.close("mask_cost", costs["mask cost"])
    compare.equal("match", match)
    compare.close("dice", dice_loss(mask_logits[match].sigmoid(), masks, eps=2e-3))
    compare.close("loss_cls", losses["loss_cls"])
    compare.close("loss_mask", losses["loss_mask"])
    # The paper's loss is the cost without its weight
    cfg.MODEL.MASK_BRANCH.KERNEL.LOSS = "iou"
    (paper,) = kernel_branch(cfg).losses(found, made, masks, targets, assignment, normalizers)
    expected = (
        costs["mask cost"][match, torch.arange(count)].sum() / cfg.MODEL.MASK_BRANCH.KERNEL.COST_WEIGHT / (count + 1e-5)
    )
    assert_close(paper.value, expected.numpy(), "1 - IoU")
    assert soft_iou(torch.tensor(2.0), torch.tensor(2.0), torch.tensor(2.0)) == pytest.approx(1)


def check_position(case: Mapping[str, Any], compare: Comparison) -> None:
    height, width = case["args"]["hw"]
    padding = torch.ones(len(case["args"]["valid"]), height, width, dtype=torch.bool)
    for mask, (rows, columns) in zip(padding, case["args"]["valid"], strict=True):
        mask[:rows, :columns] = False
    ratios = valid_ratios([padding], torch.float64)
    points = encoder_reference_points(((height, width),), ratios)
    position = sine_position_encoding([padding], 128, torch.float64).unflatten(1, (height, width))
    compare.close("position", position.permute(0, 3, 1, 2))
    compare.close("valid_ratio", ratios[:, 0])
    compare.close("encoder_reference_points", points[:, :, None] * ratios[:, None])


def check_deformable_attention(case: Mapping[str, Any], compare: Comparison) -> None:
    arguments = case["args"]
    shapes = tuple(tuple(shape) for shape in arguments["levels"])
    tokens = sum(height * width for height, width in shapes)
    rng = np.random.default_rng(arguments["seed"])
    query = normal(rng, arguments["nq"], 1, 256).transpose(0, 1)
    value = normal(rng, tokens, 1, 256).transpose(0, 1)
    position = normal(rng, arguments["nq"], 1, 256).transpose(0, 1)
    references = torch.from_numpy(rng.random((1, arguments["nq"], len(shapes), 2)))
    padding = torch.arange(tokens)[None] >= tokens - arguments["pad"]
    model, _ = load_model(case)
    attention = model.detector.transformer.encoder.layers[0].self_attn
    compare.close("output", query + attention(query + position, references, value, shapes, padding))


def check_postprocess(case: Mapping[str, Any], compare: Comparison) -> None:
    arguments = case["args"]
    rng = np.random.default_rng(arguments["seed"])
    logits = normal(rng, arguments["n"], NUM_CLASSES) - 2
    kernels = 0.15 * normal(rng, arguments["n"], 256)
    features = normal(rng, 1, 256, *arguments["hw"]).abs()
    features = torch.nn.functional.avg_pool2d(features, 3, stride=1, padding=1, divisor_override=3)
    model, _ = load_model(case)
    predictions = Predictions(logits[None, None], logits[None, None], image_sizes=[tuple(arguments["img"])])
    (found,) = model.detect(predictions, Kernels(kernels[None, None], features), [tuple(arguments["out"])])
    compare.equal("label", found.pred_classes)
    compare.equal("query", found.pred_queries)
    compare.close("score", found.scores)
    compare.close("class_score", logits.sigmoid()[found.pred_queries, found.pred_classes])
    compare.equal("area", found.pred_masks.sum((1, 2)))
    compare.masks("mask", found.pred_masks)


COMPONENTS = {
    "mask_feature_head": check_mask_feature_head,
    "mask_head": check_mask_head,
    "matching_and_losses": check_matching_and_losses,
    "position": check_position,
    "deformable_attention": check_deformable_attention,
    "postprocess": check_postprocess,
}


def component_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    return {name: (kind, case) for kind in COMPONENTS for name, case in load_isda_cases(f"component/{kind}").items()}


@pytest.mark.parametrize("name", component_cases())
def test_isda_component(name: str) -> None:
    kind, case = component_cases()[name]
    compare = Comparison(case)
    with torch.no_grad():
        COMPONENTS[kind](case, compare)
    compare.finish()
