"""The SOLQ model: its forms, batches, targets, detections, initialisation, and the errors of its config."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import Backbone, build_model
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage
from scipy.fft import dctn, idctn
from scipy.special import expit, logit
from torch import nn
from training_steps import training_step

from querymask.common.predictions import Predictions, Targets
from querymask.solq.criterion import relative_cxcywh
from querymask.solq.sqr import SQRBranch
from querymask.solq.vectors import VectorBranch

MakeCfg = Callable[..., CfgNode]
MakeModel = Callable[..., nn.Module]
MakeBatch = Callable[..., list[dict[str, Any]]]

FORMS = {
    "one stage": {},
    "no refinement": {"BOX_REFINE": False},
    "two stages": {"TWO_STAGE": True},
    "two stages, no refinement": {"TWO_STAGE": True, "BOX_REFINE": False},
    "C5 only": {"IN_FEATURES": ["res5"], "NUM_FEATURE_LEVELS": 1},
    "no masks": {"BRANCH": "none"},
    "fast": {"VECTOR_LOSS_REDUCTION": "sum", "VECTOR_PASTE": "soft"},
    "pca": {
        "CODING_NAME": "pca",
        "CODING_SIZE": 12,
        "CODING_LENGTH": 10,
        "VECTOR_LOSS": "l2_dice",
        "VECTOR_PASTE": "soft",
    },
    "pca, L1": {"CODING_NAME": "pca", "CODING_SIZE": 12, "CODING_LENGTH": 10, "VECTOR_PASTE": "soft"},
    "flatten": {"CODING_NAME": "flatten", "CODING_SIZE": 8, "CODING_LENGTH": 64, "VECTOR_LOSS": "l2_dice"},
    "sparse": {"CODING_NAME": "sparse", "CODING_SIZE": 8, "CODING_LENGTH": 20, "VECTOR_PASTE": "soft"},
    "sqr": {"BRANCH": "SQRBranch", "HIDDEN_DIM": 128, "NUM_HEADS": 8},
    "sqr, two stages": {"BRANCH": "SQRBranch", "HIDDEN_DIM": 128, "NUM_HEADS": 8, "TWO_STAGE": True},
}


@pytest.mark.parametrize("counts", [[0], [0, 3], [3, 0], [9, 1]])
@pytest.mark.parametrize("form", FORMS)
def test_training(make_model: MakeModel, make_batch: MakeBatch, form: str, counts: list[int]) -> None:
    """Every trained parameter gets a finite gradient, also without instances and with more instances than queries."""
    model = make_model(**FORMS[form])
    losses = model(make_batch(counts, [(64, 96), (56, 80)][: len(counts)]))
    sum(losses.values()).backward()
    kinds = {"loss_ce", "loss_bbox", "loss_giou"} | (
        {"loss_vector"} if isinstance(model.mask_branch, VectorBranch) else set()
    )
    expected = kinds | {f"{kind}_0" for kind in kinds}
    if isinstance(model.mask_branch, SQRBranch):
        expected |= {"loss_mask", "loss_dice"}
    if model.detector.transformer.num_proposals:
        expected |= {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"}
    assert set(losses) == expected
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name, parameter in model.named_parameters():
        if not name.startswith("mask_branch.coding."):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_forms(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch([1])
    for form, overrides in FORMS.items():
        model = make_model(**overrides)
        with torch.no_grad():
            found, _ = model.predict(model.preprocess(batch))
        two_stage, refine = "two stages" in form, "no refinement" not in form
        copies = (3 if two_stage else 2) if refine else 1
        assert len(model.detector.class_embed) == len(model.detector.bbox_embed) == copies, form
        branch = type(None) if form == "no masks" else SQRBranch if "sqr" in form else VectorBranch
        assert isinstance(model.mask_branch, branch)
        sizes = [reference.shape[-1] for reference in found.references]
        assert sizes == [4 if two_stage else 2] + [4 if two_stage or refine else 2] * 2, form
        shapes = [tuple(level.shape[2:]) for level in found.pyramid.maps]
        assert shapes == ([(2, 3)] if form == "C5 only" else [(8, 12), (4, 6), (2, 3), (1, 2)]), form
        assert found.logits.shape == (2, 1, 6, 5) and found.boxes.shape == (2, 1, 6, 4)


@pytest.mark.parametrize("two_stage", [False, True])
def test_no_refinement(make_model: MakeModel, make_batch: MakeBatch, two_stage: bool) -> None:
    """One class head and one box head for all layers; every layer's box is relative to the same reference."""
    model = make_model(BOX_REFINE=False, TWO_STAGE=two_stage).double()
    with torch.no_grad():
        found, _ = model.predict(model.preprocess(make_batch([1])))
        deltas = model.detector.bbox_embed[0](found.hidden).cpu().numpy()
        class_head = model.detector.class_embed[0]
        logits = found.hidden @ class_head.weight.T + class_head.bias
    reference = found.references[0].cpu().numpy()
    for other in found.references[1:]:
        assert np.array_equal(other.cpu(), reference)
    deltas[..., : reference.shape[-1]] += logit(reference)
    assert np.allclose(found.boxes.cpu(), expit(deltas), rtol=0, atol=1e-12)
    assert torch.allclose(found.logits, logits, rtol=0, atol=1e-12)


def test_fewer_tokens_than_queries(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """The two-stage form then has as many queries as tokens: 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2."""
    model = make_model(TWO_STAGE=True, NUM_QUERIES=300)
    batch = make_batch([3, 1])
    found, _ = model.predict(model.preprocess(batch))
    assert found.logits.shape == (2, 2, 128, 5)
    assert all(torch.isfinite(loss) for loss in model(batch).values())
    assert len(model.eval()(batch)[0]["instances"]) == 9


def test_losses_of_proposals(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """They ask whether there is anything, not of which class; the other losses do ask."""
    model = make_model(TWO_STAGE=True)
    batch = make_batch([3, 1])
    before = model(batch)
    for item in batch:
        item["instances"].gt_classes = (item["instances"].gt_classes + 1) % 5
    after = model(batch)
    for kind in ("loss_ce", "loss_bbox", "loss_giou"):
        assert torch.equal(before[f"{kind}_enc"], after[f"{kind}_enc"])
    assert before["loss_ce"] != after["loss_ce"]


def test_no_masks_needed_without_mask_branch(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch([2, 1])
    for item in batch:
        item["instances"].remove("gt_masks")
    model = make_model(BRANCH="none")
    assert set(model(batch)) == {f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in ("", "_0")}
    assert not model.eval()(batch)[0]["instances"].has("pred_masks")
    with pytest.raises(ValueError, match="no gt_masks.*MASK_BRANCH.NAME none"):
        make_model()(batch)


def test_masks_change_nothing_but_their_loss(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """With the weights of a model with masks, the model without gives the same boxes and the same other losses."""
    batch = make_batch([2, 1])
    full, plain = make_model(), make_model(BRANCH="none")
    state = {name: value for name, value in full.state_dict().items() if not name.startswith("mask_branch.")}
    plain.load_state_dict(state, strict=True)
    losses = full(batch)
    assert plain(batch) == {name: loss for name, loss in losses.items() if "vector" not in name}


ZIGZAG = sorted(np.ndindex(32, 32), key=lambda c: (sum(c), c[1] if sum(c) % 2 == 0 else c[0]))[:40]


def test_targets(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Boxes relative to each image's own size, and the DCT of masks cut out at the boxes."""
    model = make_model()
    batch = make_batch([2, 0, 1], [(64, 96), (32, 32), (40, 50)])
    targets = Targets.from_inputs(batch, model.device, with_masks=True)
    truth = model.mask_branch.encode(targets, Predictions(torch.zeros(0, dtype=torch.float64), torch.zeros(0)))
    boxes = relative_cxcywh(targets, torch.zeros(0, dtype=torch.float64))
    assert (targets.counts, targets.images) == ([2, 0, 1], ["0.jpg", "1.jpg", "2.jpg"])
    assert boxes.dtype == truth.vectors.dtype == torch.float64
    row = 0
    for item, (height, width) in zip(batch, [(64, 96), (32, 32), (40, 50)], strict=True):
        instances = item["instances"]
        crops = instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 32).numpy()
        for box, label, crop in zip(instances.gt_boxes.tensor.tolist(), instances.gt_classes, crops, strict=True):
            x0, y0, x1, y1 = box
            expected = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            assert boxes[row].tolist() == pytest.approx(expected, rel=1e-6)
            coefficients = dctn(crop.astype(float), norm="ortho")
            vector = [coefficients[cell] for cell in ZIGZAG]
            assert truth.vectors[row].tolist() == pytest.approx(vector, abs=1e-4)
            assert targets.labels[row] == label
            row += 1
    assert row == len(targets.labels)


def test_targets_from_polygons(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch([1, 0])
    polygons = PolygonMasks([[[10.0, 10, 50, 12, 30, 40]]])
    results = []
    for masks in (polygons, BitMasks.from_polygon_masks(polygons, 64, 96)):
        batch[0]["instances"].gt_masks = masks
        batch[1]["instances"].gt_masks = PolygonMasks([])
        results.append(training_step(model, batch).truth.vectors)
    assert torch.equal(*results) and results[0].any()


@pytest.mark.parametrize("paste", ["binary", "soft"])
def test_detections(make_model: MakeModel, make_batch: MakeBatch, paste: str) -> None:
    """The best pairs of query and class, scaled to the given size; masks through SciPy and Detectron2."""
    model = make_model(VECTOR_PASTE=paste).eval()
    with torch.no_grad():
        # Large boxes, and masks that are neither empty nor full: three quarters on average
        model.detector.bbox_embed[-1].layers[-1].bias[2:] = 1
        model.mask_branch.vector_embed.layers[-1].bias[0] = 24
        model.mask_branch.vector_embed.layers[-1].weight.mul_(3)
    batch = make_batch([0, 0], [(64, 96), (60, 70)])
    batch[0].update(height=50, width=120)  # the second image keeps its size
    with torch.no_grad():
        found = [result["instances"].to("cpu") for result in model(batch)]
        outputs, _ = model.predict(model.preprocess(batch))
        vectors = model.mask_branch.vector_embed(outputs.hidden[-1]).cpu().numpy()
    for b, (height, width) in enumerate([(50, 120), (60, 70)]):
        instances = found[b]
        assert instances.image_size == (height, width) and len(instances) == 9
        scores = expit(outputs.logits[-1, b].cpu().numpy())
        ranking = sorted(np.ndindex(scores.shape), key=lambda pair: -scores[pair])[:9]
        for i, (query, label) in enumerate(ranking):
            assert (instances.pred_queries[i].item(), instances.pred_classes[i].item()) == (query, label)
            assert instances.scores[i].item() == pytest.approx(scores[query, label])
            cx, cy, w, h = outputs.boxes[-1, b, query].tolist()
            expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            assert instances.pred_boxes.tensor[i].tolist() == pytest.approx(expected, abs=1e-3)
            coefficients = np.zeros((32, 32))
            for cell, value in zip(ZIGZAG, vectors[b, query], strict=True):
                coefficients[cell] = value
            mask = idctn(coefficients, norm="ortho")
            if paste == "binary":
                mask = mask > (mask.min() + mask.max()) / 2
            pasted = paste_masks_in_image(
                torch.from_numpy(mask).float()[None], instances.pred_boxes.tensor[i : i + 1], (height, width), 0.5
            )
            assert (pasted[0] != instances.pred_masks[i]).sum() <= 1, "but for a pixel at the threshold"
        assert instances.pred_masks.dtype == torch.bool and instances.pred_masks.shape == (9, height, width)
        assert 0.05 < instances.pred_masks.float().mean() < 0.9
    assert found[0].pred_queries.unique().numel() < 9, "a query must be able to appear with several classes"


@pytest.mark.parametrize("form", ["pca", "flatten", "sparse"])
def test_detections_of_other_codings(make_model: MakeModel, make_batch: MakeBatch, form: str) -> None:
    """The decoded map pasted into the box; the vector is of the query of the detection."""
    model = make_model(**{**FORMS[form], "VECTOR_PASTE": "soft"}).eval()
    with torch.no_grad():
        model.detector.bbox_embed[-1].layers[-1].bias[2:] = 1  # large boxes
        model.mask_branch.vector_embed.layers[-1].weight.mul_(10)
        model.mask_branch.vector_embed.layers[-1].bias.fill_(0.4)
        batch = make_batch([0])
        (result,) = model(batch)
        outputs, _ = model.predict(model.preprocess(batch))
        vectors = model.mask_branch.vector_embed(outputs.hidden[-1, 0]).cpu().numpy()
    instances = result["instances"]
    for i, query in enumerate(instances.pred_queries.tolist()):
        code, size = vectors[query], model.mask_branch.coding.mask_size
        if form == "pca":
            state = {key: value.cpu().numpy() for key, value in model.mask_branch.coding.state_dict().items()}
            code = expit((code * state["explained_variances"] ** 0.5) @ state["components"] + state["means"])
        elif form == "sparse":
            code = code @ model.mask_branch.coding.dictionary.cpu().numpy()
        box = instances.pred_boxes.tensor[i : i + 1]
        pasted = paste_masks_in_image(torch.from_numpy(code).view(1, size, size).to(box.device), box, (64, 96), 0.5)
        assert (pasted[0] != instances.pred_masks[i]).sum() <= 1, "but for a pixel at the threshold"
    assert 0.02 < instances.pred_masks.float().mean() < 0.98


def test_label_noise(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """Drawn anew in every call and for every layer; without it the targets are encoded once."""
    batch = make_batch([2, 1])
    model = make_model(**FORMS["pca, L1"])
    truth = training_step(model, batch).truth
    assert truth.vectors is None
    twice = model.mask_branch.target_vectors(truth, torch.tensor([0, 0, 2]))
    assert twice.shape == (3, 10) and not torch.equal(twice[0], twice[1])
    assert model(batch)["loss_vector"] != model(batch)["loss_vector"]
    quiet = make_model(**FORMS["pca, L1"], CODING_LABEL_NOISE=False)
    assert training_step(quiet, batch).truth.vectors.shape == (3, 10)
    assert quiet(batch)["loss_vector"] == quiet(batch)["loss_vector"]


def test_statistics_now_and_then(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch([2, 0])
    for iteration, logged in ((0, True), (7, False), (40, True)):
        with EventStorage(start_iter=iteration) as storage:
            model(batch)
            storage.iter += 1
            model(batch)  # on a GPU, they are written by the next call
            assert set(storage.latest()) == ({"class_error", "cardinality_error"} if logged else set())
    model(batch)  # outside of a training loop


@pytest.mark.parametrize("form", ["one stage", "two stages", "no refinement"])
def test_initialisation(make_cfg: MakeCfg, make_batch: MakeBatch, form: str) -> None:
    torch.manual_seed(0)
    model = build_model(make_cfg(**FORMS[form]))
    for head in model.detector.class_embed:
        assert head.bias.tolist() == pytest.approx([-math.log(99)] * 5)
        assert 0.8 / 64**0.5 < head.weight.abs().max() <= 1 / 64**0.5
        assert torch.equal(head.weight, model.detector.class_embed[0].weight), "copies start equal"
    for index, head in enumerate(model.detector.bbox_embed):
        assert [layer.weight.shape[0] for layer in head.layers] == [64, 64, 4]
        assert not head.layers[-1].weight.any()
        assert head.layers[-1].bias.tolist() == [0, 0, *([-2, -2] if index == 0 and form != "two stages" else [0, 0])]
        for layer, first in zip(head.layers[:-1], model.detector.bbox_embed[0].layers, strict=False):
            assert torch.equal(layer.weight, first.weight) and torch.equal(layer.bias, first.bias)
    assert len({id(p) for p in model.detector.bbox_embed.parameters()}) == len(model.detector.bbox_embed) * 6, (
        "copies share nothing"
    )
    vector = model.mask_branch.vector_embed.layers
    assert [tuple(layer.weight.shape) for layer in vector] == [(48, 64), (48, 48), (40, 48)]
    assert not vector[-1].weight.any() and vector[-1].bias.tolist() == [0, 0] + [-2] * 38
    if form != "two stages":
        assert model.detector.query_embed.weight.shape == (6, 128)
        assert model.detector.query_embed.weight.std().item() == pytest.approx(1, abs=0.1)
        with torch.no_grad():
            found, _ = model.eval().predict(model.preprocess(make_batch([0])))
        assert torch.allclose(found.boxes[0, ..., 2:], torch.tensor(-2.0).sigmoid()), "boxes start small"
        assert torch.allclose(found.boxes[0, ..., :2], found.references[0][..., :2])


class PatchBackbone(Backbone):
    """Each cell is a function of its own pixels, and zero where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 8, stride=8, bias=False)])
        self.convs.extend(nn.Conv2d(8, 8, 2, stride=2, bias=False) for _ in range(2))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name, conv in zip(self.output_shape(), self.convs, strict=True):
            image = features[name] = conv(image)
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=8, stride=s) for name, s in (("res3", 8), ("res4", 16), ("res5", 32))}


@pytest.mark.parametrize(
    ("patches", "norm", "exact"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_padding(make_model: MakeModel, make_batch: MakeBatch, patches: bool, norm: bool, exact: bool) -> None:
    """What an image's predictions owe to the size of its batch.

    Projections, positions, transformer and heads add nothing. GroupNorm of the projections does, as its statistics are
    those of the padded map; so does a backbone of several convolutions, as what spills over to the padding comes back.
    """
    model = make_model().eval()
    if patches:
        torch.manual_seed(0)
        model.backbone = PatchBackbone()
        for level, projection in enumerate(model.detector.input_proj):
            projection[0] = nn.Conv2d(8, 64, 1) if level < 3 else nn.Conv2d(8, 64, 3, stride=2, padding=1)
    if not norm:
        for projection in model.detector.input_proj:
            projection[1] = nn.Identity()
    model.to(model.device, torch.float64)
    batch = make_batch([0, 0], [(64, 96), (128, 160)])
    with torch.no_grad():
        alone, _ = model.predict(model.preprocess(batch[:1]))
        padded, _ = model.predict(model.preprocess(batch))
    for name in ("hidden", "logits", "boxes"):
        a, b = getattr(alone, name), getattr(padded, name)[:, :1]
        difference = ((a - b).abs().max() / a.abs().max()).item()
        assert difference < 1e-12 if exact else difference > 1e-5, f"{name}: {difference}"


def test_masks_of_padding_only_where_needed(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    seen = []
    model.detector.transformer.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["padded"]), with_kwargs=True
    )
    for sizes in ([(64, 96)] * 2, [(64, 96), (64, 64)], [(64, 96), (32, 96)]):
        model(make_batch([0, 0], sizes))
    assert seen == [False, True, True]


ERRORS = {
    "MODEL.MASK_CODING.NAME is 'wavelet': choose one of pca, dct": {"CODING_NAME": "wavelet"},
    "VectorBranch does not train the autoencoder": {"CODING_NAME": "autoencoder"},
    "MODEL.MASK_CODING.BASIS is 'x.npz', but MODEL.MASK_CODING.NAME 'dct' needs none": {"CODING_BASIS": "x.npz"},
    "x.npz is not a PCA basis": {"CODING_NAME": "pca", "CODING_BASIS": "x.npz"},
    "entries: set LENGTH to that, not 40": {"CODING_NAME": "flatten"},
    "MODEL.MASK_BRANCH.NAME is 'roi': choose one of": {"BRANCH": "roi"},
    "MODEL.MASK_BRANCH.FREEZE_DETECTOR leaves nothing to train": {"FREEZE_DETECTOR": True, "BRANCH": "none"},
    "MODEL.MASK_BRANCH.VECTOR.LOSS is 'cosine': choose one of": {"VECTOR_LOSS": "cosine"},
    "VECTOR.LOSS_REDUCTION is 'sum', but LOSS 'l2_dice' has one": {
        "VECTOR_LOSS": "l2_dice",
        "VECTOR_LOSS_REDUCTION": "sum",
    },
    "needs a width that is a multiple of 128, not 64, and a number of heads that is a multiple of 8, not 4": {
        "BRANCH": "SQRBranch"
    },
    "reads 3 backbone maps, not 1: name as many in IN_FEATURES": {"BRANCH": "SQRBranch", "IN_FEATURES": ["res5"]},
    "MODEL.MASK_BRANCH.VECTOR.PASTE is 'hard': choose 'binary' or 'soft'": {"VECTOR_PASTE": "hard"},
    "MODEL.MASK_BRANCH.VECTOR.LOSS_REDUCTION is 'max': choose one of": {"VECTOR_LOSS_REDUCTION": "max"},
    "IN_FEATURES names ['stage1', 'res6'], but the backbone gives ['res3', 'res4', 'res5']": {
        "IN_FEATURES": ["res3", "stage1", "res6"]
    },
    "2 feature levels for 3 backbone maps: name fewer maps in IN_FEATURES or raise NUM": {"NUM_FEATURE_LEVELS": 2},
    "width 64 must be a multiple of the number of heads, 6": {"NUM_HEADS": 6},
    "the width of the transformer, 48, must be a multiple of 32 (GroupNorm)": {"HIDDEN_DIM": 48},
    "a 4x4 mask has 16 DCT coefficients, not 40": {"CODING_SIZE": 4},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_the_config(make_cfg: MakeCfg, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(make_cfg(**ERRORS[message]))


def test_mask_keys_do_not_matter_without_masks(make_cfg: MakeCfg) -> None:
    assert build_model(make_cfg(BRANCH="none", CODING_SIZE=4, CODING_NAME="none")).mask_branch is None


@pytest.mark.parametrize("form", ["one stage", "two stages", "pca", "sqr"])
def test_checkpoints_without_parts_load(make_model: MakeModel, form: str) -> None:
    """Names from before there was a detector and a mask branch."""
    model, other = make_model(**FORMS[form]), make_model(**FORMS[form])
    state = model.state_dict()
    prefix = "mask_branch." if form != "sqr" else "-"
    old = {name.removeprefix("detector.").removeprefix(prefix): value + 1 for name, value in state.items()}
    assert any(name.startswith("transformer.") for name in old)
    other.load_state_dict(old, strict=True)
    assert all(torch.equal(value, state[name] + 1) for name, value in other.state_dict().items())
