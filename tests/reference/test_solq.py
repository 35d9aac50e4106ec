"""SOLQ against its official implementation: network, detections, losses, gradients, and that checkpoints load."""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_document, load_manifest
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from tiny_models import find_key
from training_steps import training_step

import querymask
from querymask.common.mask_coding import DCTMaskCoding, PCAMaskCoding, binarize_at_half_range
from querymask.common.mask_coding.targets import CodedTargets
from querymask.common.masks import crop_masks, paste_masks
from querymask.common.position_encoding import sine_position_encoding
from querymask.common.predictions import Assignment, Normalizers, Predictions, Targets, unweighted, weighted
from querymask.solq.checkpoint import convert
from querymask.solq.sqr import SQRBranch
from querymask.solq.vectors import VectorBranch

# Official setting -> config key. Settings with a fixed meaning are handled in `configure`.
SETTINGS = {
    "hidden_dim": "HIDDEN_DIM",
    "nheads": "NUM_HEADS",
    "enc_layers": "ENC_LAYERS",
    "dec_layers": "DEC_LAYERS",
    "dim_feedforward": "DIM_FEEDFORWARD",
    "num_queries": "NUM_QUERIES",
    "num_feature_levels": "NUM_FEATURE_LEVELS",
    "enc_n_points": "ENC_POINTS",
    "dec_n_points": "DEC_POINTS",
    "with_box_refine": "BOX_REFINE",
    "two_stage": "TWO_STAGE",
    "n_keep": "CODING_LENGTH",
    "gt_mask_len": "CODING_SIZE",
    "vector_hidden_dim": "VECTOR_HIDDEN_DIM",
    "vector_loss_coef": "VECTOR_WEIGHT",
    "vector_start_stage": "VECTOR_START_LAYER",
    "set_cost_class": "COST_CLASS",
    "set_cost_bbox": "COST_BBOX",
    "set_cost_giou": "COST_GIOU",
    "cls_loss_coef": "CLASS_WEIGHT",
    "bbox_loss_coef": "BBOX_WEIGHT",
    "giou_loss_coef": "GIOU_WEIGHT",
    "focal_alpha": "FOCAL_ALPHA",
    "mask_loss_coef": "SQR_MASK_WEIGHT",
    "dice_loss_coef": "SQR_DICE_WEIGHT",
}
NUM_CLASSES = 91


# The label noise of the cases is 0.03; noise is 0.05 times a variate
NOISE_VARIATE = 0.6


def model_cases(kind: str) -> list[str]:
    return list(load_cases("solq", kind))


def has_sqr(case: dict[str, Any]) -> bool:
    """The baseline puts a prefix before its detector; no setting tells it."""
    return any(key.startswith("detr.") for key in load_manifest("solq", case["manifest"]))


def configure(case: dict[str, Any]) -> CfgNode:
    """The project's config for the official settings of a case; a setting without counterpart is an error."""
    settings = case["configuration"]
    cfg = querymask.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SOLQ"
    solq, vector = cfg.MODEL.SOLQ, cfg.MODEL.MASK_BRANCH.VECTOR
    solq.NUM_CLASSES = NUM_CLASSES
    architecture = "solq"
    for name, value in settings.items():
        if name in SETTINGS:
            node, key = find_key(cfg, SETTINGS[name])
            node[key] = type(node[key])(value)
        elif name == "meta_arch":
            assert value in ("solq", "fast_solq", "solq_pca", "deformable_detr"), f"unknown meta_arch {value}"
            architecture = value
        elif name == "with_vector":
            cfg.MODEL.MASK_BRANCH.NAME = "VectorBranch" if value else "none"
        elif name == "no_vector_loss_norm":
            vector.LOSS_REDUCTION = "sum" if value else "mean"
        elif name == "backbone":
            set_backbone(cfg, value)
        else:
            pytest.fail(f"the case has a setting that the project does not know: {name} = {value}")
    if architecture == "fast_solq":
        vector.LOSS_REDUCTION = "sum"
        vector.PASTE = "soft"
    elif architecture == "solq_pca":
        cfg.MODEL.MASK_CODING.NAME = "pca"
        vector.LOSS = "l2_dice"
        vector.PASTE = "soft"
    if has_sqr(case):
        cfg.MODEL.MASK_BRANCH.NAME = "SQRBranch"
    if solq.NUM_FEATURE_LEVELS == 1:
        solq.IN_FEATURES = solq.IN_FEATURES[-1:]
    return cfg


def set_backbone(cfg: CfgNode, name: str) -> None:
    swins = {"swin_t_p4w7": (96, [2, 2, 6, 2], [3, 6, 12, 24]), "swin_l_p4w7": (192, [2, 2, 18, 2], [6, 12, 24, 48])}
    if name in ("resnet50", "resnet101"):
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.DEPTH = int(name.removeprefix("resnet"))
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    elif name in swins:
        cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
        cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.NUM_HEADS = swins[name]
        cfg.MODEL.SOLQ.IN_FEATURES = ["stage1", "stage2", "stage3"]
    else:
        pytest.fail(f"the case has a backbone that the project does not know: {name}")


def canonical(key: str, box_refine: bool) -> str:
    """The one name whose weights all copies of a shared module have."""
    if key.startswith("detr."):
        return "detr." + canonical(key.removeprefix("detr."), box_refine)
    parts = key.removeprefix("transformer.decoder.").split(".")
    if key.startswith("transformer.decoder.") and parts[0] in ("bbox_embed", "class_embed"):
        key = ".".join(parts)
    if parts[0] == "vector_embed" or (parts[0] in ("bbox_embed", "class_embed") and not box_refine):
        key = ".".join([parts[0], "0", *parts[2:]])
    return key


@contextmanager
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def load_model(case: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The project's model with the official weights, in evaluation mode, and those weights."""
    settings = case["configuration"]
    state = {
        key: torch.from_numpy(np.asarray(fixture().weight(canonical(key, settings["with_box_refine"]), shape)))
        for key, shape in load_manifest("solq", case["manifest"]).items()
        if not key.endswith("relative_position_index")
    }
    if "pca_of" in case:
        quoted = re.search(r'"(\w+)"', case["pca_of"])
        basis = pca_basis(load_cases("solq")[quoted[1] if quoted else case["pca_of"]]["pca"])
        state.update({f"processor_pca.{name}": torch.from_numpy(value) for name, value in basis.items()})
    with double_precision():
        model = build_model(configure(case)).double().eval()
    converted, _ = convert(state, class_ids=None)
    model.load_state_dict(converted, strict=True)
    coding = getattr(model.mask_branch, "coding", None)
    if isinstance(coding, PCAMaskCoding):
        coding.noise = lambda pixels: torch.full_like(pixels, NOISE_VARIATE)
    return model, state


def pca_basis(recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    """The made-up basis of the cases with PCA, by the release's names."""
    length, pixels = recipe["vector_length"], recipe["mask_size"] ** 2
    components, variances, mean = (
        np.random.default_rng(recipe[f"{name}_seed"]) for name in ("components", "explained_variance", "mean")
    )
    return {
        "components": components.standard_normal((length, pixels)) / recipe["mask_size"],
        "explained_variances": variances.uniform(0.5, 2.0, length),
        "means": 0.1 * mean.standard_normal(pixels),
    }


def model_input(image: dict[str, Any]) -> dict[str, Any]:
    pixels = fixture().image(image["seed"], image["height"], image["width"])[:, :, ::-1]
    item = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}
    if "original_height" in image:
        item["height"], item["width"] = image["original_height"], image["original_width"]
    if "target_seed" in image:
        size = (image["height"], image["width"])
        labels, masks, boxes = fixture().targets(image["target_seed"], *size, image["target_count"], NUM_CLASSES)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes))
        instances.gt_classes = torch.from_numpy(labels)
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        item["instances"] = instances
    return item


def thin(array: torch.Tensor) -> np.ndarray:
    """The stored cells of a map."""
    step = 2 if array.shape[-1] > 10 else 1
    return array[:, :, ::step, ::step].detach().numpy()


@pytest.mark.parametrize("name", model_cases("inference"))
def test_solq_inference(name: str) -> None:
    case = load_cases("solq")[name]
    expected = load_arrays("solq", case)
    model, _ = load_model(case)
    seen: dict[str, Any] = {}

    def keep(key: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(key, output)

    encoder = model.detector.transformer.encoder
    model.backbone.register_forward_hook(keep("backbone"))
    model.detector.input_proj.register_forward_hook(keep("levels"))
    encoder.layers[0].self_attn.register_forward_hook(keep("attention"))
    encoder.layers[0].register_forward_hook(keep("layer"))
    encoder.register_forward_pre_hook(lambda module, arguments: seen.__setitem__("encoder", arguments))
    batch = [model_input(image) for image in case["images"]]
    with torch.no_grad():
        found, made = model.predict(model.preprocess(batch))
        sizes = [(item["height"], item["width"]) for item in batch]
        detections = model.detect(found, made, sizes)

    for i, feature in enumerate(model.detector.in_features):
        assert_close(thin(seen["backbone"][feature])[:, ::16], expected[f"backbone_{i}"], f"backbone_{i}")
    for i, level in enumerate(seen["levels"]):
        assert_close(thin(level)[:, ::8], expected[f"input_proj_{i}"], f"input_proj_{i}")
    _, position, shapes, ratios, padding = seen["encoder"]
    assert np.array_equal(shapes, expected["spatial_shapes"])
    assert_close(ratios, expected["valid_ratios"], "valid_ratios")
    if padding is None:
        assert not expected["padding_mask"].any()
    else:
        assert np.array_equal(padding, expected["padding_mask"])
    tokens = slice(None, None, 7 if position.shape[1] > 300 else 1)
    for key, array in {
        "position": position,
        "encoder_attention_0": seen["attention"],
        "encoder_layer_0": seen["layer"],
        "memory": found.memory,
    }.items():
        assert_close(array[:, tokens, ::8], expected[key], key)

    arrays = {
        "decoder_hidden": found.hidden[:, :, ::6, ::8],
        "initial_reference": found.references[0],
        "references": torch.stack(found.references[1:])[:, :, ::3],
        "logits": found.logits[:, :, ::6, ::3],
        "boxes": found.boxes[:, :, ::3],
    }
    if isinstance(model.mask_branch, VectorBranch):
        with torch.no_grad():
            arrays["vectors"] = model.mask_branch.vector_embed(found.hidden)[:, :, ::10, ::4]
    if isinstance(model.mask_branch, SQRBranch):
        queries = torch.arange(0, found.hidden.shape[2], 10)
        image = torch.arange(len(batch)).repeat_interleave(len(queries))
        hidden = found.hidden[-1][:, queries].flatten(0, 1)
        with torch.no_grad():
            logits = model.mask_branch.coarse_logits(hidden, made, image)
        arrays["mask_logits"] = logits.unflatten(0, (len(batch), -1))
    compared = {"vectors", "mask_logits"} & set(expected)
    assert compared == {"vectors", "mask_logits"} & set(arrays)
    for key, array in arrays.items():
        assert_close(array, expected[key], key)

    for b, instances in enumerate(detections):
        assert_close(instances.scores, expected[f"det_scores_{b}"], "scores")
        order_actual = np.lexsort((instances.pred_classes, instances.pred_queries))
        order_expected = np.lexsort((expected[f"det_labels_{b}"], expected[f"det_queries_{b}"]))
        assert np.array_equal(instances.pred_classes[order_actual], expected[f"det_labels_{b}"][order_expected])
        assert np.array_equal(instances.pred_queries[order_actual], expected[f"det_queries_{b}"][order_expected])
        boxes = instances.pred_boxes.tensor[order_actual]
        assert_close(boxes, expected[f"det_boxes_{b}"][order_expected], "boxes of detections")
        if model.mask_branch is None:
            continue
        areas = instances.pred_masks.sum((1, 2))[order_actual]
        assert np.array_equal(areas, expected[f"det_mask_areas_{b}"][order_expected]), "areas of masks"
        stored = case["masks_stored"]
        masks = unpack(expected[f"det_masks_{b}"], (stored, *instances.image_size))
        assert np.array_equal(instances.pred_masks[:stored].numpy(), masks), "masks"


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits.reshape(shape[0], -1), axis=1)[:, : int(np.prod(shape[1:]))].reshape(shape).astype(bool)


@pytest.mark.parametrize("name", model_cases("training"))
def test_solq_training(name: str) -> None:
    case = load_cases("solq")[name]
    expected = load_arrays("solq", case)
    model, official = load_model(case)
    batch = [model_input(image) for image in case["images"]]
    step = training_step(model, batch)
    assignment, targets = step.assignment, step.targets
    last = assignment.num_layers - 1
    check_matches(assignment, targets, {i: f"match_aux_{i}" for i in range(last)} | {last: "match_final"}, expected)
    if assignment.proposals is not None:
        check_matches(assignment.proposals, targets, {0: "match_enc"}, expected)

    losses = unweighted(step.terms)
    statistics = model.detector.statistics(step.found, targets, assignment)
    named = {**losses, **statistics}
    for key, value in case["losses"].items():
        assert key in named, f"the case has a loss that the project does not compute: {key}"
        assert_close(named[key].detach(), np.asarray(value), key)
    assert set(losses) == set(case["loss_weights"]) & set(case["losses"])
    total = sum(weighted(step.terms).values())
    assert_close(total.detach(), np.asarray(case["total"]), "total")
    if case["gradient_norms"]:
        total.backward()
        check_gradients(model, official, case["gradient_norms"])


def check_matches(
    assignment: Assignment, targets: Targets, names: dict[int, str], expected: Mapping[str, np.ndarray]
) -> None:
    starts = np.cumsum([0, *targets.counts])
    for layer, name in names.items():
        for b in range(len(targets.counts)):
            here = (assignment.layer == layer) & (assignment.image == b)
            pairs = np.stack((assignment.query[here], assignment.target[here] - starts[b]))
            assert np.array_equal(pairs, expected[f"{name}_{b}"]), f"{name}_{b}"


def check_gradients(model: torch.nn.Module, official: dict[str, torch.Tensor], norms: dict[str, float]) -> None:
    """Parameters of the project are recognised by their values, not by their names."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    squares = sum(float(p.grad.square().sum()) for p in trained.values())
    assert_close(squares**0.5, np.asarray(norms["__total__"]), "__total__")
    by_content = {(tuple(p.shape), p.detach().flatten()[:4].sum().item()): (n, p) for n, p in trained.items()}
    explained = set()
    for key, norm in norms.items():
        if key == "__total__":
            continue
        content = (tuple(official[key].shape), official[key].flatten()[:4].sum().item())
        assert content in by_content, f"no trained parameter has the values of {key}"
        name, parameter = by_content[content]
        explained.add(name)
        assert_close(parameter.grad.norm(), np.asarray(norm), f"gradient of {key}")
    for name in set(trained) - explained:  # the case leaves out what is negligible
        assert trained[name].grad.norm() <= 1.001e-7 * norms["__total__"], f"gradient of {name}"


def assert_same_masks(
    actual: torch.Tensor, expected: np.ndarray, maps: torch.Tensor, boxes: torch.Tensor, name: str
) -> None:
    """Equal but for pixels whose exact value is 0.5 to the precision of float32, in which the masks were pasted."""
    for i, y, x in np.argwhere(actual.numpy() != expected):
        value = bilinear(maps[i].double().numpy(), boxes[i].numpy(), x + 0.5, y + 0.5)
        assert abs(value - 0.5) < 1e-5, f"{name}: mask {i} differs at row {y}, column {x}, where its value is {value}"


def bilinear(values: np.ndarray, box: np.ndarray, x: float, y: float) -> float:
    """The value at a point of an image of a map that fills a box; zero outside of the map."""
    size = len(values)
    u = (x - box[0]) / (box[2] - box[0]) * size - 0.5
    v = (y - box[1]) / (box[3] - box[1]) * size - 0.5
    total = 0.0
    for row in (int(np.floor(v)), int(np.floor(v)) + 1):
        for column in (int(np.floor(u)), int(np.floor(u)) + 1):
            if 0 <= row < size and 0 <= column < size:
                total += values[row, column] * (1 - abs(v - row)) * (1 - abs(u - column))
    return total


def component_cases(*marks: str) -> list[str]:
    return [name for name, case in load_cases("solq", "component").items() if all(mark in case for mark in marks)]


@pytest.mark.parametrize("name", component_cases("codings"))
def test_solq_dct(name: str) -> None:
    case = load_cases("solq")[name]
    expected = load_arrays("solq", case)
    recipe = case["targets"]
    height, width = recipe["height"], recipe["width"]
    _, masks, boxes = fixture().targets(recipe["seed"], height, width, recipe["count"], recipe["num_classes"])
    masks = torch.from_numpy(masks)
    boxes = torch.from_numpy(boxes + np.asarray(case["box_offset"]))
    assert_close(boxes, expected["boxes"], "boxes")
    for setting in case["codings"]:
        size, length = setting["mask_size"], setting["vector_length"]
        tag = f"{size}_{length}"
        with double_precision():
            coding = DCTMaskCoding(size, length)
        crops = crop_masks(masks, boxes, size)
        assert np.array_equal(crops, unpack(expected[f"crop_{tag}"], (len(masks), size, size))), f"crop_{tag}"
        vectors = coding.encode(crops)
        assert_close(vectors, expected[f"vectors_{tag}"], f"vectors_{tag}")
        maps = coding.decode(vectors)
        assert_close(maps[:, ::8, ::8], expected[f"raw_{tag}"], f"raw_{tag}")
        extremes = torch.stack((maps.amin((1, 2)), maps.amax((1, 2))), dim=-1)
        assert_close(extremes, expected[f"range_{tag}"].reshape(extremes.shape), f"range_{tag}")
        decoded = binarize_at_half_range(maps)
        assert np.array_equal(decoded, unpack(expected[f"decoded_{tag}"], (len(masks), size, size))), f"decoded_{tag}"
        iou = (decoded & crops).sum((1, 2)) / (decoded | crops).sum((1, 2))
        assert_close(iou, expected[f"iou_{tag}"], f"iou_{tag}")
        image = (len(masks), height, width)
        for key, source in {"pasted": decoded, "pasted_fast": maps}.items():
            pasted = paste_masks(source, boxes, height, width, threshold=0.5)
            assert_same_masks(pasted, unpack(expected[f"{key}_{tag}"], image), source, boxes, f"{key}_{tag}")


@pytest.mark.parametrize("name", component_cases("codings"))
def test_solq_dct_of_arbitrary_vectors(name: str) -> None:
    expected = load_arrays("solq", load_cases("solq")[name])
    if "synthetic_vectors" not in expected:
        return
    vectors = torch.from_numpy(expected["synthetic_vectors"].astype(np.float64))
    with double_precision():
        coding = DCTMaskCoding(128, vectors.shape[1])
    maps = coding.decode(vectors)
    assert_close(maps[:, ::8, ::8], expected["synthetic_raw"], "synthetic_raw")
    decoded = unpack(expected["synthetic_decoded"], (len(vectors), 128, 128))
    assert np.array_equal(binarize_at_half_range(maps), decoded)
    full = DCTMaskCoding(128, 128 * 128)
    rows, columns = full.cells // 128, full.cells % 128
    assert np.array_equal(rows * 128 + columns, expected["zigzag_128"])


@pytest.mark.parametrize("name", component_cases("pca"))
def test_solq_pca(name: str) -> None:
    case = load_cases("solq")[name]
    expected = load_arrays("solq", case)
    recipe = case["targets"]
    height, width = recipe["height"], recipe["width"]
    _, masks, boxes = fixture().targets(recipe["seed"], height, width, recipe["count"], recipe["num_classes"])
    masks, boxes = torch.from_numpy(masks), torch.from_numpy(boxes)
    size, length = case["pca"]["mask_size"], case["pca"]["vector_length"]
    coding = PCAMaskCoding(size, length, noise=lambda pixels: torch.full_like(pixels, NOISE_VARIATE)).double()
    coding.load_state_dict({key: torch.from_numpy(value) for key, value in pca_basis(case["pca"]).items()})
    crops = crop_masks(masks, boxes, size)
    assert np.array_equal(crops, unpack(expected["crop"], (len(masks), size, size)))
    vectors = coding.encode(crops)
    assert_close(vectors, expected["vectors"], "vectors")
    maps = coding.decode(vectors)
    assert_close(maps.flatten(1), expected["decoded"], "decoded")
    pasted = paste_masks(maps, boxes, height, width, threshold=0.5)
    assert_same_masks(pasted, unpack(expected["pasted"], (len(masks), height, width)), maps, boxes, "pasted")

    shape = (len(masks), length)
    predicted = torch.from_numpy(np.random.default_rng(case["prediction_seed"]).standard_normal(shape))
    branch = VectorBranch(width=length, hidden_dim=1, coding=coding, weight=3.0, loss="l2_dice")
    branch.vector_embed = torch.nn.Identity()
    index = torch.arange(len(masks))
    assignment = Assignment(torch.zeros_like(index), torch.zeros_like(index), index, index, num_layers=1)
    found = Predictions(predicted, predicted[None, None])
    targets = Targets([len(masks)], index, boxes, [(height, width)])
    count = torch.tensor(float(case["normaliser"]))
    truth = CodedTargets(crops, None)
    (term,) = branch.losses(found, None, truth, targets, assignment, Normalizers(count, count))
    assert_close(term.value, np.asarray(case["loss_vector_at_coefficient_3"]), "loss_vector")


@pytest.mark.parametrize("name", component_cases("valid_sizes"))
def test_solq_position(name: str) -> None:
    case = load_cases("solq")[name]
    mask = torch.ones(len(case["valid_sizes"]), case["map_height"], case["map_width"], dtype=torch.bool)
    for b, (height, width) in enumerate(case["valid_sizes"]):
        mask[b, :height, :width] = False
    encoding = sine_position_encoding([mask], case["channels"] // 2, torch.float64).unflatten(1, mask.shape[1:])
    assert_close(encoding.permute(0, 3, 1, 2), load_arrays("solq", case)["position"], "position")


def test_solq_resize_examples() -> None:
    from querymask.common.data.augmentation import resized_size

    for width, height, short, longest, new_width, new_height in load_document("solq")["resize_examples"]["rows"]:
        assert resized_size(width, height, short, longest) == (new_width, new_height)
