"""The tiny model: forms, empty images, gradients, analysis of stages, errors."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import nn

from querymask.common.mask_coding import MissingBasisError
from querymask.common.solver import build_optimizer
from querymask.istr.stage import DynamicInteraction

MakeCfg = Callable[..., CfgNode]
MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

V2 = {"CODE_HEAD": "convolution", "CODE_TARGET": "predicted", "CODE_LOSS": "smooth_l1", "FIRST_SCORED_STAGE": 1}
FORMS = {
    "paper": {"CODING_NAME": "pca"},
    "dct": {},
    "second release, PCA": {**V2, "CODING_NAME": "pca"},
    "second release, DCT": V2,
    "second release, autoencoder": {**V2, "CODING_NAME": "autoencoder", "CODING_SIZE": 32},
    "pixels as vector": {"CODING_NAME": "flatten", "CODING_LENGTH": 256},
    "pixels": {"BRANCH": "PixelBranch", "PIXEL_POOL_SIZE": 5},
    "no masks": {"BRANCH": "none"},
    "softmax": {"CLASSIFIER": "softmax", "CODING_NAME": "pca", "CODING_LABEL_NOISE": False},
    "equations": {
        "STAGE_INPUT": "initial",
        "DYNAMIC_LAYERS": 1,
        "CLASSIFIER": "softmax",
        "SOFTMAX_LOSS": "focal",
        "CODING_NAME": "pca_linear",
    },
    "attention": {"ATTENTION": "multi_head", "CODE_COST": "dice"},
    "queries": {"USE_POSITION": False, "QUERY_POOLING": "max", "CODE_COST": "l1"},
    "last stage": {"DEEP_SUPERVISION": False},
    "last stage, equations": {"DEEP_SUPERVISION": False, "STAGE_INPUT": "initial"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", [[2, 0], [0, 0]])
def test_training_step(make_model: MakeModel, make_batch: MakeBatch, form: str, counts: list[int]) -> None:
    """Every trained parameter gets a gradient, also where no image has an instance."""
    model = make_model(**FORMS[form])
    losses = model(make_batch(counts))
    kinds = ["loss_ce", "loss_bbox", "loss_giou"]
    if model.mask_branch is not None:
        kinds += ["loss_mask"] if form == "pixels" else ["loss_vector", "loss_dice"]
    suffixes = ["", "_0"] if model.detector.deep_supervision else [""]
    assert set(losses) == {kind + suffix for kind in kinds for suffix in suffixes}
    assert all(torch.isfinite(value) for value in losses.values())
    for name, value in losses.items():
        empty = sum(counts) == 0 and not name.startswith("loss_ce")
        assert (value == 0) == empty, name
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_inference(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    model = make_model(**FORMS[form]).eval()
    batch = make_batch([0, 0], [(64, 96), (80, 50)])
    batch[0].update(height=32, width=48)
    with torch.no_grad():
        found = [output["instances"] for output in model(batch)]
    for instances, size in zip(found, [(32, 48), (80, 50)], strict=True):
        assert instances.image_size == size and 0 < len(instances) <= 9
        boxes = instances.pred_boxes.tensor
        assert boxes.min() >= 0 and (boxes[:, 2:] <= boxes.new_tensor([size[1], size[0]])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (instances.scores.diff() <= 0).all() and instances.pred_classes.max() < 5
        assert instances.has("pred_masks") == (form != "no masks")
        if form != "no masks":
            assert instances.pred_masks.shape == (len(instances), *size) and instances.pred_masks.dtype == torch.bool


@pytest.mark.parametrize("form", ["paper", "second release, autoencoder", "attention"])
def test_autocast(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    """Losses and detections in bfloat16 are near those in float32."""
    results = []
    for enabled in (False, True):
        model, batch = make_model(**FORMS[form]), make_batch([2, 1])
        torch.manual_seed(1)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses = model(batch)
            with torch.no_grad():
                found = model.eval()(batch)
        total = sum(losses.values())
        assert total.dtype == torch.float32 and found[0]["instances"].pred_boxes.tensor.dtype == torch.float32
        total.backward()
        results.append(float(total.detach()))
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_diverged_predictions_are_named(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    torch.nn.init.constant_(model.detector.stages[0].bboxes_delta.bias, float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"layer 0 for 0\.jpg .*L1 box cost: the predictions of 6 of 6 queries"
    ):
        model(make_batch([2, 1]))


def test_padding_counts_in_the_image_feature_only(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    with torch.no_grad():
        levels = list(model.backbone(model.preprocess(make_batch([0, 0], [(64, 96), (32, 32)])).tensor).values())
        queries = model.detector.initial_queries(levels)
    expected = sum(level.flatten(2).mean(2) for level in levels)
    assert torch.allclose(queries, expected[:, None] + model.detector.pos_embeddings.weight, atol=1e-6)
    found, _ = model.predict(model.preprocess(make_batch([0, 0], [(64, 96), (32, 32)])))
    assert found.canvas.sides.tolist() == [[96, 64, 96, 64], [32, 32, 32, 32]]


def test_gradient_reaches_initial_boxes_through_the_first_stage_alone(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model, batch = make_model(), make_batch([2, 1])
    outputs, _ = model.predict(model.preprocess(batch))
    weight = model.detector.init_proposal_boxes.weight
    for stage, reaches in ((0, True), (1, False)):
        (gradient,) = torch.autograd.grad(outputs.boxes[stage].sum(), weight, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == reaches
    embedding = model.detector.pos_embeddings.weight  # features are not detached
    (gradient,) = torch.autograd.grad(outputs.logits[1].sum(), embedding)
    assert gradient.any()


def test_masks_of_the_second_release_do_not_train_the_queries(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(**FORMS["second release, DCT"])
    losses = model(make_batch([2, 1]))
    masks = sum(value for name, value in losses.items() if name.startswith(("loss_vector", "loss_dice")))
    masks.backward()
    assert (
        model.detector.pos_embeddings.weight.grad is None and model.detector.stages[0].bboxes_delta.weight.grad is None
    )
    assert model.mask_branch.heads[0].mask_module[0].weight.grad.any()
    assert model.backbone.fpn_output2.weight.grad.any()


def test_mask_heads_see_selected_queries_only(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """At inference, and in training where neither matching nor batch norms need more."""
    seen = []
    for overrides, training, rows in (
        ({}, False, [9]),
        ({"CODE_COST": "none"}, True, [2, 2]),
        ({}, True, [6, 6]),
    ):
        model, seen = make_model(**overrides).train(training), []
        for head in model.mask_branch.heads:
            head.register_forward_hook(lambda _, arguments, output, seen=seen: seen.append(output))
        with torch.no_grad():
            result = model(make_batch([2]))
        expected = rows if training else [len(result[0]["instances"])]
        assert [len(code.vectors) for code in seen] == expected


def test_detections_of_a_stage(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(FIRST_SCORED_STAGE=0).eval()
    with torch.no_grad():
        outputs, made = model.predict(model.preprocess(make_batch([0])))
        (first,), (last,) = (model.detect(outputs, made, [(64, 96)], stage) for stage in (0, None))
    assert torch.equal(model.detector.scores(outputs, 0), outputs.logits[0].sigmoid())
    assert torch.allclose(model.detector.scores(outputs), outputs.logits.mean(0).sigmoid())
    query = first.pred_queries[0]
    box = outputs.boxes[0, 0, query]
    assert torch.allclose(first.pred_boxes.tensor[0], box.clamp(min=0).minimum(outputs.canvas.sides[0]))
    assert not torch.equal(first.scores, last.scores)


@pytest.mark.parametrize(("first", "stages"), [(-1, [1]), (-2, [0, 1]), (0, [0, 1]), (1, [1]), (2, [1])])
def test_scored_stages(make_model: MakeModel, make_batch: MakeBatch, first: int, stages: list[int]) -> None:
    """Of a model with fewer stages than that, the last one."""
    model = make_model(FIRST_SCORED_STAGE=first).eval()
    outputs, _ = model.predict(model.preprocess(make_batch([0])))
    assert torch.allclose(model.detector.scores(outputs), outputs.logits[stages].mean(0).sigmoid())


@pytest.mark.parametrize("number", [1, 2])
def test_dynamic_layers_against_loops(number: int) -> None:
    """Of equation 11 there is one: every bin times the query's matrix, LayerNorm, ELU; then all bins together."""
    torch.manual_seed(0)
    width, inner, bins = 6, 3, 4
    module = DynamicInteraction(width, inner, 2, number).double()
    for norm in (module.norm1, module.norm2, module.norm3)[:: 3 - number]:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    queries, crops = torch.randn(2, width).double(), torch.randn(2, bins, width).double()
    result = module(queries, crops)
    for query, crop, found in zip(queries, crops, result, strict=True):
        matrices = module.dynamic_layer.weight @ query + module.dynamic_layer.bias
        rows = []
        for x in crop:
            x = torch.stack([sum(x[c] * matrices[c * inner + d] for c in range(width)) for d in range(inner)])
            x = slow_norm_and_elu(x, module.norm1)
            if number == 2:
                back = matrices[width * inner :]
                x = torch.stack([sum(x[d] * back[d * width + c] for d in range(inner)) for c in range(width)])
                x = slow_norm_and_elu(x, module.norm2)
            rows.append(x)
        out = module.out_layer.weight @ torch.cat(rows) + module.out_layer.bias
        assert torch.allclose(found, slow_norm_and_elu(out, module.norm3), rtol=0, atol=1e-12)
    assert module.out_layer.in_features == bins * (inner if number == 1 else width)


def slow_norm_and_elu(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    return torch.where(x > 0, x, x.exp() - 1)


def test_what_dynamic_layers_keep() -> None:
    """For the backward pass no more than weights of the query, products, norms' statistics and what is read next."""
    width, inner, side, n = 8, 4, 3, 5
    module = DynamicInteraction(width, inner, side)
    queries, crops = torch.randn(n, width), torch.randn(n, side**2, width)
    inputs = {t.untyped_storage().data_ptr() for t in (queries, crops, *module.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(queries, crops)
    rows = n * side**2
    weights, first, second, out = 2 * n * width * inner, 2 * rows * inner, 2 * rows * width, 2 * n * width
    statistics = 2 * (rows + rows + n)
    assert sum(storage.nbytes() for storage in kept.values()) == 4 * (weights + first + second + out + statistics)
    assert result.shape == (n, width)


def test_initialisation(make_cfg: MakeCfg) -> None:
    torch.manual_seed(0)
    model = build_model(make_cfg())
    assert all(row == [0.5, 0.5, 1, 1] for row in model.detector.init_proposal_boxes.weight.tolist())
    assert model.detector.pos_embeddings.weight.std().item() == pytest.approx(1, abs=0.15)
    for stage in model.detector.stages:
        assert stage.class_logits.bias.tolist() == pytest.approx([-math.log(99)] * 5)
        layer = stage.inst_interact.dynamic_layer.weight
        bound = (6 / sum(layer.shape)) ** 0.5
        assert 0.95 * bound < layer.abs().max() <= bound, "Xavier-uniform"
        assert not stage.self_attn.in_proj_bias.any() and stage.bboxes_delta.bias.any()


def test_unsupervised_stages_are_not_optimised(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(DEEP_SUPERVISION=False)
    model = build_model(cfg)
    trained = {id(p) for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    assert (
        id(model.detector.stages[0].linear1.weight) in trained
        and id(model.detector.stages[1].class_logits.weight) in trained
    )
    assert id(model.detector.stages[0].class_logits.weight) not in trained
    assert id(model.detector.init_proposal_boxes.weight) not in trained


@pytest.mark.parametrize("coding", ["pca", "autoencoder"])
def test_a_learned_coding_needs_its_basis(make_cfg: MakeCfg, make_batch: MakeBatch, coding: str) -> None:
    model = build_model(make_cfg(CODING_NAME=coding))
    with pytest.raises(MissingBasisError, match="has no basis yet. Make one with tools/fit_mask_basis.py"):
        model.train()(make_batch([1]))


ERRORS = {
    "MODEL.MASK_CODING.NAME is 'wavelet': choose one of pca, dct, sparse, autoencoder": {"CODING_NAME": "wavelet"},
    "MODEL.MASK_BRANCH.CODE.HEAD is 'linear': choose one of vector, convolution": {"CODE_HEAD": "linear"},
    "MODEL.MASK_BRANCH.CODE.TARGET is 'box': choose one of ground_truth, predicted": {"CODE_TARGET": "box"},
    "MODEL.MASK_BRANCH.CODE.COST is 'l2': choose one of cosine, l1, dice, none": {"CODE_COST": "l2"},
    "MODEL.MASK_BRANCH.CODE.LOSS is 'l1': choose one of l2, smooth_l1": {"CODE_LOSS": "l1"},
    "MODEL.ISTR.CLASSIFIER is 'svm': choose one of sigmoid, softmax": {"CLASSIFIER": "svm"},
    "MODEL.ISTR.SOFTMAX_LOSS is 'dice': choose one of cross_entropy, focal": {"SOFTMAX_LOSS": "dice"},
    "MODEL.ISTR.DYNAMIC_LAYERS is 3: choose 1 or 2": {"DYNAMIC_LAYERS": 3},
    "MODEL.ISTR.ATTENTION is 'none': choose 'dynamic' or 'multi_head'": {"ATTENTION": "none"},
    "MODEL.ISTR.QUERY_POOLING is 'sum': choose one of mean, max": {"QUERY_POOLING": "sum"},
    "MODEL.ISTR.STAGE_INPUT is 'none': choose one of previous, initial": {"STAGE_INPUT": "none"},
    "all queries would be zero": {"USE_POSITION": False, "USE_IMAGE_FEATURE": False},
    "MODEL.ISTR.IN_FEATURES names ['p6'], but the backbone gives ['p2', 'p3', 'p4', 'p5']": {"IN_FEATURES": ["p6"]},
    "MODEL.ISTR.HIDDEN_DIM is 32, but the pyramid has [16] channels": {"HIDDEN_DIM": 32},
    "MODEL.ISTR.HIDDEN_DIM 16 must be a multiple of MODEL.ISTR.NUM_HEADS 3": {"NUM_HEADS": 3},
    "whose vectors for 16x16 masks have 256 entries: set LENGTH": {"CODING_NAME": "flatten"},
    "a 16x16 mask has 256 principal components, not 300": {"CODING_NAME": "pca", "CODING_LENGTH": 300},
    "MODEL.MASK_CODING.BASIS is 'x.npz', but MODEL.MASK_CODING.NAME 'dct' needs none": {"CODING_BASIS": "x.npz"},
    "x.npz is not a PCA basis": {"CODING_BASIS": "x.npz", "CODING_NAME": "pca"},
    "POOL_SIZE is 6: it must be a multiple of 4": {"CODE_HEAD": "convolution", "CODE_POOL_SIZE": 6},
    "the autoencoder of 16x16 masks needs 4": {"CODE_HEAD": "convolution", "CODING_NAME": "autoencoder"},
    "have sides that are multiples of 16, not 20": {"CODING_NAME": "autoencoder", "CODING_SIZE": 20},
    "CODE.COST 'dice' would decode the masks of all queries": {"CODE_COST": "dice", "CODING_NAME": "autoencoder"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_the_config(make_cfg: MakeCfg, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(make_cfg(**ERRORS[message]))


class Network(nn.Module):
    """Normalised images (B, 3, H, W) of one size -> logits, boxes and mask vectors of the last stage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found, made = self.model.predict(ImageList(images, [tuple(images.shape[-2:])] * len(images)))
        queries = torch.arange(self.model.detector.num_queries, device=images.device)
        code = self.model.mask_branch.codes(found, made, torch.zeros_like(queries), queries, -1)
        return found.logits[-1], found.boxes[-1], code.vectors


def test_export(make_model: MakeModel) -> None:
    """The exported program gives what eager execution gives, also on other pixels."""
    network = Network(make_model().eval())
    generator = torch.Generator().manual_seed(0)
    example, image = torch.randn(2, 1, 3, 64, 96, generator=generator).to(network.model.device)
    program = torch.export.export(network, (example,)).module()
    with torch.no_grad():
        outputs = program(image)
        for actual, expected in zip(outputs, network(image), strict=True):
            assert actual.shape == expected.shape
            assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs[0], program(example)[0])


@pytest.mark.parametrize("form", ["paper", "second release, autoencoder"])
def test_checkpoints_without_parts_load(make_model: MakeModel, form: str) -> None:
    """Names from before there was a detector and a mask branch."""
    model, other = make_model(**FORMS[form]), make_model(**FORMS[form])
    state = model.state_dict()
    old = {}
    for name, value in state.items():
        name = re.sub(r"^mask_branch\.heads\.(\d+)\.", r"stages.\1.mask_head.", name)
        old[re.sub(r"^(detector|mask_branch)\.", "", name)] = value + 1
    assert "stages.1.mask_head.mask_module.0.weight" in old
    other.load_state_dict(old, strict=True)
    assert all(torch.equal(value, state[name] + 1) for name, value in other.state_dict().items())
