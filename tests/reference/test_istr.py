"""ISTR against its official implementations: network, detections, matching, losses, gradients, strict loading."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_manifest
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from istr_model import double_precision, official_value, unpack

import querymask
from querymask.common.mask_coding import PCAMaskCoding
from querymask.common.matching import Assignment
from querymask.istr.checkpoint import convert
from querymask.istr.criterion import ISTROutput, ISTRTargets
from querymask.istr.stage import apply_deltas

STRIDES = (4, 8, 16, 32)
# Official name -> project's name of a loss
LOSSES = {
    "loss_ce": "loss_ce",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_feat": "loss_vector",
    "loss_dice": "loss_dice",
}
CODINGS = {"PCA": "pca", "DCT": "dct", "AE": "autoencoder", "SMT": "autoencoder", "SMT (autoencoder)": "autoencoder"}
# Setting -> config key, for settings whose values are the project's too
SETTINGS = {
    "num_proposals": "NUM_QUERIES",
    "num_queries": "NUM_QUERIES",
    "num_stages": "NUM_STAGES",
    "embedding_dim": "VECTOR_LENGTH",
    "mask_size": "MASK_SIZE",
    "num_classes": "NUM_CLASSES",
    "use_image_feature": "USE_IMAGE_FEATURE",
    "image_feature": "USE_IMAGE_FEATURE",
    "deep_supervision": "DEEP_SUPERVISION",
}
# Names that the two switches of table 1e may have: pooling of the image feature, and the position embedding
POOLING_NAME = r"(image_|feature_|image_feature_|query_|spatial_)?pool(ing)?(_type)?"
POSITION_NAME = r"(use_|with_)?pos(ition)?(al)?(_embed(ding)?s?)?"
POOLING = {"max": "max", "maximum": "max", "avg": "mean", "average": "mean", "mean": "mean"}
V2 = {
    "MASK_HEAD": "convolution",
    "MASK_TARGET": "predicted",
    "FIRST_SCORED_STAGE": 2,
    "VECTOR_LOSS": "smooth_l1",
    "VECTOR_WEIGHT": 1.0,
    "DICE_WEIGHT": 5.0,
    "COST_MASK": 1.0,
    "PASTE_THRESHOLD": 0.45,
}


def configure(settings: Mapping[str, Any]) -> CfgNode:
    """The project's config for the official settings; a setting without counterpart fails by name."""
    cfg = querymask.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ISTR"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    istr = cfg.MODEL.ISTR
    istr.LABEL_NOISE = False  # u = 0.5
    for name, value in settings.items():
        if name == "release":
            assert value in ("paper", "v2"), f"unknown release {value}"
            if value == "v2":
                for key, changed in V2.items():
                    istr[key] = changed
            cfg.MODEL.BACKBONE.FREEZE_AT = 2 if value == "paper" else 0
        elif name == "backbone_depth":
            cfg.MODEL.RESNETS.DEPTH = value
        elif name == "mask_encoding":
            assert value in CODINGS, f"unknown mask encoding {value}"
            istr.MASK_CODING = CODINGS[value]
        elif re.fullmatch(POOLING_NAME, name):
            assert value in POOLING, f"unknown pooling {value}"
            istr.QUERY_POOLING = POOLING[value]
        elif name in SETTINGS or re.fullmatch(POSITION_NAME, name):
            key = SETTINGS.get(name, "USE_POSITION")
            assert isinstance(value, type(istr[key])), f"{name} = {value!r}"
            istr[key] = value
        else:
            pytest.fail(f"the case has a setting that the project does not know: {name} = {value}")
    return cfg


def official_shapes(cfg: CfgNode) -> dict[str, list[int]]:
    """Keys and shapes of the official checkpoint for a config: a stored one, with what depends on the sizes adapted."""
    istr = cfg.MODEL.ISTR
    if istr.MASK_HEAD == "vector":
        name = {50: "checkpoint.json", 101: "checkpoint_r101.json"}[cfg.MODEL.RESNETS.DEPTH]
    else:
        assert cfg.MODEL.RESNETS.DEPTH == 50, "no checkpoint of that depth is stored"
        kind = {"pca": "pca", "dct": "dct", "autoencoder": "smt"}[istr.MASK_CODING]
        name = f"checkpoint_v2_{kind}_r50.json"
    shapes = dict(load_manifest("istr", name))
    for key, shape in list(shapes.items()):
        parts = key.split(".")
        if key == "pos_embeddings.weight" and not istr.USE_POSITION:
            del shapes[key]
        elif key.startswith("head.head_series.") and int(parts[2]) >= istr.NUM_STAGES:
            del shapes[key]
        elif key in ("pos_embeddings.weight", "init_proposal_boxes.weight"):
            shapes[key] = [istr.NUM_QUERIES, *shape[1:]]
        elif "class_logits" in parts:
            shapes[key] = [istr.NUM_CLASSES, *shape[1:]]
        elif "mask_logits" in parts or key == "mask_encoding.explained_variances":
            shapes[key] = [istr.VECTOR_LENGTH, *shape[1:]]
        elif key == "mask_encoding.components":
            shapes[key] = [istr.VECTOR_LENGTH, istr.MASK_SIZE**2]
    missing = {f"head.head_series.{stage}" for stage in range(istr.NUM_STAGES)} - {
        ".".join(key.split(".")[:3]) for key in shapes
    }
    for prefix in missing:
        for key, shape in list(shapes.items()):
            if key.startswith("head.head_series.0."):
                shapes[key.replace("head.head_series.0", prefix)] = shape
    return shapes


def load_model(case: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, str]]:
    """The project's model with the official weights, in evaluation mode, and its names by official name."""
    cfg = configure(case["configuration"])
    dct = cfg.MODEL.ISTR.MASK_CODING == "dct"
    state = {key: official_value(key, shape, dct) for key, shape in official_shapes(cfg).items()}
    with double_precision():
        model = build_model(cfg).double().eval()
    converted, report = convert(state)
    model.load_state_dict(converted, strict=True)
    return model, {line.source: line.target for line in report.lines if line.target}


INPUT_KEYS = {"image_seed", "height", "width", "output_height", "output_width", "target_seed", "count"}


def model_inputs(case: Mapping[str, Any], num_classes: int) -> list[dict[str, Any]]:
    """The batch of a case."""
    assert set(case["inputs"]) == {"images"}, f"the case has inputs that are not known: {sorted(case['inputs'])}"
    batch = []
    for image in case["inputs"]["images"]:
        assert set(image) <= INPUT_KEYS, f"an image has settings that are not known: {sorted(set(image) - INPUT_KEYS)}"
        size = (image["height"], image["width"])
        pixels = fixture().image(image["image_seed"], *size)[:, :, ::-1]
        item: dict[str, Any] = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}
        if "output_height" in image:
            item["height"], item["width"] = image["output_height"], image["output_width"]
        if "target_seed" in image:
            item["instances"] = make_targets(image["target_seed"], size, image["count"], num_classes)
        batch.append(item)
    return batch


def make_targets(seed: int, size: tuple[int, int], count: int, num_classes: int) -> Instances:
    labels, masks, boxes = fixture().targets(seed, *size, count, num_classes)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.zeros(len(boxes), 4))
    instances.gt_boxes.tensor = torch.from_numpy(boxes)  # the constructor would make it float32
    instances.gt_classes = torch.from_numpy(labels)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    return instances


def every(array: torch.Tensor, step: int, axis: int) -> torch.Tensor:
    return array.index_select(axis, torch.arange(0, array.shape[axis], step))


def thin_map(array: torch.Tensor, level: int) -> torch.Tensor:
    step = {2: 4, 3: 2}.get(level, 1)
    return array[:, ::16, ::step, ::step]


@pytest.mark.parametrize("name", load_cases("istr", "inference"))
def test_istr_inference(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    strides = case["strides"]
    model, _ = load_model(case)
    seen: dict[str, torch.Tensor] = {}
    model.backbone.register_forward_hook(lambda module, arguments, output: seen.update(output))
    batch = model_inputs(case, case["configuration"]["num_classes"])
    sizes = [(item["height"], item["width"]) for item in batch]
    with torch.no_grad():
        outputs = model.predict(model.preprocess(batch))
        codes = model.all_codes(outputs)
        detections = model.detect(outputs, sizes)
        scores = model.scores(outputs)

    maps = [seen[f"p{level}"] for level in (2, 3, 4, 5)]
    pooling = torch.mean if model.query_pooling == "mean" else torch.amax
    arrays = {f"p{level}": thin_map(x, level) for level, x in enumerate(maps, start=2)}
    arrays["image_feature"] = sum(pooling(x, dim=(2, 3)) for x in maps)
    boxes = model.init_proposal_boxes.weight.detach()
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
    arrays["query_boxes"] = corners * outputs.scale[:, None]
    arrays["stage_boxes"] = outputs.boxes
    arrays["stage_logits"] = every(outputs.logits, strides["q"], 2)
    arrays["stage_object_features"] = every(outputs.features, strides["q"], 2)
    shape = outputs.logits.shape[1:3]
    vectors = [code.vectors.unflatten(0, shape) for code in codes]
    arrays["stage_embeddings"] = every(torch.stack(vectors), strides["e"], 2)
    arrays["final_embeddings"] = every(vectors[-1], strides["e"], 1)
    averaged = torch.log(scores / (1 - scores))
    arrays["averaged_logits"] = every(averaged, strides["q"], 1)
    context = codes[-1].context
    if context is None and "final_mask_roi" in expected:
        images = torch.arange(shape[0]).repeat_interleave(shape[1])
        pool_size = model.stages[-1].mask_head.pool_size
        crops = outputs.pyramid.pool(outputs.boxes[-1].flatten(0, 1), images, pool_size)
        context = crops.unflatten(1, (pool_size, pool_size)).permute(0, 3, 1, 2)
    if context is not None:
        arrays["final_mask_roi"] = every(context.unflatten(0, shape)[:, :, ::4, ::4, ::4], strides["q"], 1)
    compared = set()
    for key, array in arrays.items():
        if key in expected:
            assert_close(array, expected[key], key)
            compared.add(key)

    for b, found in enumerate(detections):
        top = scores[b].flatten().topk(len(expected[f"scores_{b}"]))
        labels, queries = top.indices % scores.shape[2], top.indices // scores.shape[2]
        assert_close(top.values, expected[f"scores_{b}"], f"scores_{b}")
        same_order = np.array_equal(labels, expected[f"labels_{b}"])
        assert same_order, f"labels_{b}"
        assert_close(outputs.boxes[-1, b, queries], expected[f"boxes_{b}"], f"boxes_{b}")
        with torch.no_grad():
            stored = queries[: len(expected[f"masks_{b}"])]
            soft = outputs.mask_code(-1, torch.full_like(stored, b), stored).decode(model.coding)
        assert_close(soft, expected[f"masks_{b}"], f"masks_{b}")

        assert_close(found.scores, expected[f"out_scores_{b}"], f"out_scores_{b}")
        assert np.array_equal(found.pred_classes, expected[f"out_labels_{b}"]), f"out_labels_{b}"
        assert_close(found.pred_boxes.tensor, expected[f"out_boxes_{b}"], f"out_boxes_{b}")
        areas = found.pred_masks.sum((1, 2)).numpy()
        packed = expected[f"out_masks_{b}"]
        truth = unpack(packed, (len(packed), *found.image_size))
        check_masks(found.pred_masks[: len(packed)].numpy(), truth, f"out_masks_{b}")
        # pixels at the threshold to the precision of the pasting may fall on either side
        assert np.abs(areas - expected[f"out_areas_{b}"]).max() <= 1, f"out_areas_{b}"
        compared |= {f"{key}_{b}" for key in ("scores", "labels", "boxes", "masks")}
        compared |= {f"out_{key}_{b}" for key in ("scores", "labels", "boxes", "areas", "masks")}
    assert compared == set(expected), f"not compared: {sorted(set(expected) - compared)}"


def check_masks(masks: np.ndarray, truth: np.ndarray, name: str) -> None:
    """Equal but for at most one pixel a mask, which may lie at the threshold."""
    different = (masks != truth).sum((1, 2))
    assert different.max(initial=0) <= 1 and different.sum() <= 2, f"{name}: {different}"


@pytest.mark.parametrize("name", load_cases("istr", "training"))
def test_istr_training(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model, names = load_model(case)
    model.train()
    v2 = case["configuration"]["release"] == "v2"
    batch = model_inputs(case, case["configuration"]["num_classes"])
    outputs = model.predict(model.preprocess(batch))
    targets = model.encode_targets(batch, torch.float64)
    number, size = sum(targets.counts), model.coding.mask_size
    compared = set()

    def compare(key: str, value: Any) -> None:
        assert_close(value, expected[key], key)
        compared.add(key)

    compare("stage_boxes", outputs.boxes.detach())
    compare("stage_logits", every(outputs.logits.detach(), 10, 2))
    assert np.array_equal(targets.fields["crops"], unpack(expected["target_crops"], (number, size, size)))
    compared.add("target_crops")

    spy = Spy(model)
    losses = model.criterion(outputs, targets)
    weighted = model.criterion.weigh(losses)
    compare("target_embeddings", spy.encoded[0][:number])
    last = len(model.stages) - 1
    rows = 1 if outputs.logits.shape[2] <= 100 else 10
    cost = torch.stack(list(spy.terms.values())).sum(0)
    for stage in range(last + 1):
        check_matches(spy.assignment, targets, stage, expected, compared)
        for b, count in enumerate(targets.counts):
            compare(f"cost_s{stage}_i{b}", cost[stage, b, ::rows, :count])
        for official, own in LOSSES.items():
            suffix = "" if stage == last else f"_{stage}"
            compare(f"{official}_s{stage}", losses[own + suffix].detach())
            released = f"_{stage}" if v2 else suffix
            compare(f"weighted/{official}{released}", weighted[own + suffix].detach())
        if f"loss_crops_s{stage}" in expected:
            here = slice(stage * number, (stage + 1) * number)
            crops = model.criterion.target_crops(outputs, targets, spy.assignment, size)[here]
            truth = unpack(expected[f"loss_crops_s{stage}"], (number, size, size))
            assert np.array_equal(crops, truth), f"loss_crops_s{stage}"
            compared.add(f"loss_crops_s{stage}")
            compare(f"loss_embeddings_s{stage}", spy.loss_embeddings(stage, number))
        if f"match_embeddings_s{stage}" in expected:
            compare(f"match_embeddings_s{stage}", spy.encoded[2 * stage])
    total = sum(weighted.values())
    compare("total", total.detach())
    assert len(weighted) == len(LOSSES) * (last + 1)

    total.backward()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key in expected:
        kind, _, official = key.partition("/")
        if kind == "grad_norm":
            compare(key, parameters[names[official]].grad.norm())
        elif kind == "after":
            compare(key, buffers[names[official]].double())
    assert compared == set(expected), f"not compared: {sorted(set(expected) - compared)}"


class Spy:
    """Keeps costs, assignment and codes of the targets of one call of the criterion."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.encoded: list[torch.Tensor] = []
        self.terms: dict[str, torch.Tensor] = {}
        self.assignment: Assignment | None = None
        coding, criterion = model.coding, model.criterion
        encode, match, cost_terms = coding.encode, criterion.match, criterion.cost_terms

        def spy_encode(masks: torch.Tensor) -> torch.Tensor:
            self.encoded.append(encode(masks))
            return self.encoded[-1]

        def spy_match(outputs: Any, targets: Any) -> Assignment:
            self.assignment = match(outputs, targets)
            return self.assignment

        def spy_terms(outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
            self.terms = cost_terms(outputs, targets)
            if "vectors" in targets.fields:
                self.encoded.append(targets.fields["vectors"])
            return self.terms

        coding.encode, criterion.match, criterion.cost_terms = spy_encode, spy_match, spy_terms

    def loss_embeddings(self, stage: int, number: int) -> torch.Tensor:
        """All stages were encoded at once, or after the targets of each stage's matching."""
        if len(self.encoded) > 2:
            return self.encoded[2 * stage + 1]
        return self.encoded[1][stage * number : (stage + 1) * number]


def check_matches(
    assignment: Assignment, targets: ISTRTargets, stage: int, expected: Mapping[str, np.ndarray], compared: set[str]
) -> None:
    starts = np.cumsum([0, *targets.counts])
    for b in range(len(targets.counts)):
        here = (assignment.layer == stage) & (assignment.image == b)
        for key, value in (("query", assignment.query[here]), ("target", assignment.target[here] - starts[b])):
            assert np.array_equal(value, expected[f"match_{key}_s{stage}_i{b}"]), f"match_{key}_s{stage}_i{b}"
            compared.add(f"match_{key}_s{stage}_i{b}")


# ---- Components ---------------------------------------------------------------------------------------------------


def component_cases(*arrays: str) -> list[str]:
    found = load_cases("istr", "component").items()
    return [name for name, case in found if all(array in case["arrays"] for array in arrays)]


def test_every_component_case_is_run() -> None:
    here = component_cases("interact") + component_cases("deltas", "out") + component_cases("soft")
    here += component_cases("target_embeddings_*")
    codings = component_cases("embedding_half") + component_cases("polygons", "other_boxes")
    codings += component_cases("explained_variance_ratio") + component_cases("see") + component_cases("dct_embedding")
    assert set(here + codings) == set(load_cases("istr", "component"))


@pytest.mark.parametrize("name", component_cases("interact"))
def test_istr_stage(name: str) -> None:
    from querymask.common.roi_pooling import FeaturePyramid
    from querymask.istr.istr import build_stage

    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    cfg = configure(case["configuration"])
    with double_precision():
        coding = PCAMaskCoding(cfg.MODEL.ISTR.MASK_SIZE, cfg.MODEL.ISTR.VECTOR_LENGTH)
        stage = build_stage(cfg.MODEL.ISTR, coding)
    prefix = case["inputs"]["stage"].removeprefix("weights of ") + "."
    state = {key: official_value(key, s) for key, s in official_shapes(cfg).items() if key.startswith(prefix)}
    own = "stages." + prefix.split(".")[2] + "."
    stage.load_state_dict({key.removeprefix(own): value for key, value in convert(state)[0].items()}, strict=True)

    def pseudo(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(fixture().weight(key, shape))

    boxes = torch.from_numpy(expected["boxes"])
    batch, queries = boxes.shape[:2]
    maps = [
        pseudo(f"case.p{i}", (batch, 256, s, s)) * (256 * s * s) ** 0.5 for i, s in zip((2, 3, 4, 5), (64, 32, 16, 8))
    ]
    features = 16 * pseudo("case.query_features", (batch, queries, 256))
    seen: dict[str, Any] = {}
    for module in ("self_attn", "norm1", "inst_interact", "norm2", "norm3", "bboxes_delta"):
        stage.get_submodule(module).register_forward_hook(
            lambda _, arguments, output, module=module: seen.update({module: output, f"{module}.input": arguments})
        )
    pyramid = FeaturePyramid(maps, STRIDES)
    with torch.no_grad():
        output = stage(pyramid, boxes, features)
        images = torch.arange(batch).repeat_interleave(queries)
        code = stage.mask_head(output.features.flatten(0, 1), output.boxes.flatten(0, 1), images, pyramid)
    crops = seen["inst_interact.input"][1].view(batch, queries, 7, 7, -1).permute(0, 1, 4, 2, 3)
    for key, value in {
        "roi": crops[:, :, ::16],
        "attention": seen["self_attn"][0],
        "norm1": seen["norm1"],
        "interact": seen["inst_interact"].view(batch, queries, -1),
        "norm2": seen["norm2"],
        "norm3": seen["norm3"],
        "deltas": seen["bboxes_delta"],
        "logits": output.logits,
        "out_boxes": output.boxes,
        "object_features": output.features,
        "embeddings": code.vectors.view(batch, queries, -1),
    }.items():
        assert_close(value, expected[key], key)


@pytest.mark.parametrize("name", component_cases("deltas", "out"))
def test_istr_deltas(name: str) -> None:
    expected = load_arrays("istr", load_cases("istr")[name])
    boxes, deltas = torch.from_numpy(expected["boxes"]), torch.from_numpy(expected["deltas"])
    moved = apply_deltas(boxes, deltas)
    for row, truth in zip(moved, expected["out"], strict=True):  # scales differ by orders of magnitude
        assert_close(row, truth, "out")


def given_output(model: torch.nn.Module, expected: Mapping[str, np.ndarray], sizes: list[list[int]]) -> ISTROutput:
    """An output of one stage made of a case's inputs."""
    from querymask.istr.mask_head import MaskCode

    def tensor(key: str) -> torch.Tensor:
        value = torch.from_numpy(expected[key].astype(np.float64))
        return value[None] if value.dim() == 3 else value[None, None]

    return ISTROutput(
        logits=tensor("logits"),
        boxes=tensor("boxes"),
        features=torch.zeros(1, *tensor("boxes").shape[1:3], 1),
        scale=torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float64),
        pyramid=None,
        codes=[MaskCode(tensor("embeddings")[0].flatten(0, 1))],
        coding=model.coding,
    )


class Parts:
    """What `given_output` and the methods under test need of a model, without its network."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from querymask.istr import ISTR

        cfg = configure(settings)
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.ISTR.NUM_STAGES = 1
        with double_precision():
            self.model: ISTR = build_model(cfg)
        keys = ("components", "explained_variances", "means")
        for key in keys:
            parameter = getattr(self.model.coding, key)
            parameter.data = official_value(f"mask_encoding.{key}", parameter.shape)


@pytest.mark.parametrize("name", component_cases("target_embeddings_*"))
def test_istr_matching(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model = Parts(case["configuration"]).model
    recipe = case["inputs"]["images"]
    batch = [{"instances": make_targets(i["target_seed"], (i["height"], i["width"]), i["count"], 80)} for i in recipe]
    targets = model.encode_targets(batch, torch.float64)
    outputs = given_output(model, expected, [[i["height"], i["width"]] for i in recipe])
    terms = model.criterion.cost_terms(outputs, targets)
    assignment = model.criterion.match(outputs, targets)
    weights = {"class": 2.0, "L1 box": 5.0, "GIoU box": 2.0, "mask": 2.0}
    start = 0
    for b, count in enumerate(targets.counts):
        here = slice(start, start + count)
        assert np.array_equal(targets.fields["crops"][here], expected[f"crops_{b}"])
        assert_close(targets.fields["vectors"][here], expected[f"target_embeddings_{b}"], "target_embeddings")
        for key, own in {"class": "class", "l1": "L1 box", "giou": "GIoU box", "mask": "mask"}.items():
            assert_close(terms[f"{own} cost"][0, b, :, :count] / weights[own], expected[f"{key}_{b}"], f"{key}_{b}")
        assert_close(sum(terms.values())[0, b, :, :count], expected[f"total_{b}"], f"total_{b}")
        pairs = assignment.image == b
        assert np.array_equal(assignment.query[pairs], expected[f"query_{b}"])
        assert np.array_equal(assignment.target[pairs] - start, expected[f"target_{b}"])
        start += count
    losses = model.criterion(outputs, targets)
    for official, own in LOSSES.items():
        assert_close(losses[own], expected[official], official)


@pytest.mark.parametrize("name", component_cases("soft"))
def test_istr_output(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    model = Parts(case["configuration"]).model
    outputs = given_output(model, expected, [case["inputs"]["network_input"]])
    scores = model.scores(outputs)[0]
    top = scores.flatten().topk(len(expected["scores"]))
    queries = top.indices // scores.shape[1]
    assert_close(top.values, expected["scores"], "scores")
    assert np.array_equal(top.indices % scores.shape[1], expected["labels"])
    assert_close(outputs.boxes[0, 0, queries], expected["raw_boxes"], "raw_boxes")
    stored = queries[: len(expected["soft"])]
    soft = outputs.mask_code(0, torch.zeros_like(stored), stored).decode(model.coding)
    assert_close(soft, expected["soft"], "soft")
    height, width = case["inputs"]["output"]
    (found,) = model.detect(outputs, [(height, width)])
    assert_close(found.scores, expected["out_scores"], "out_scores")
    assert np.array_equal(found.pred_classes, expected["out_labels"])
    assert_close(found.pred_boxes.tensor, expected["out_boxes"], "out_boxes")
    truth = unpack(expected["out_masks"], (len(found), height, width))
    check_masks(found.pred_masks.numpy(), truth, "out_masks")
