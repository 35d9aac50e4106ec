"""Exported models: the forms that take the place of operators, the programs, the files, and what reads them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from mask_bases import give_basis
from onnx_packages import skip_without_onnx
from tiny_configs import tiny_config
from tiny_models import spread_weights
from torch import Tensor, nn

from querymask import get_cfg
from querymask.common.detections import PanopticDetections
from querymask.common.detector import descending_order
from querymask.common.export import ENDINGS, Description, ExportedModel, ExportNetwork, export_program, write
from querymask.common.export.comparison import Differences, compare, detections_of
from querymask.common.masks import paste_masks, pasted_bands, resize_masks
from querymask.common.ops import multi_scale_deformable_attention, sparse_conv2d
from querymask.common.ops.exporting import exporting
from querymask.common.predictor import Predictor
from querymask.common.pyramid import ADAPTIVE, FeaturePyramid
from querymask.effseg.fqdet.suppression import detect, suppress_queries
from querymask.effseg.pasting import paste_and_resize
from querymask.isda.mask_features import coordinate_channels
from querymask.isda.masks import enlarged_bands, resize_probabilities

MODELS = (
    "solq/solq_r50",
    "solq/solq_r50_two_stage",
    "solq/deformable_detr_r50",
    "solq/sqr_r50",
    "isda/isda_r50",
    "istr/istr_r50",
    "istr/istr_v2_smt_r50",
    "effseg/effseg_r50",
    "effseg/effseg_v2_r50",
    "effseg/fqdet_r50",
    "effseg/mask_rcnn_r50",
    "effseg/pointrend_r50",
    "effseg/refine_mask_r50",
)
PAIRS = (
    "solq/pairs/solq_kernel_shapes",
    "solq/pairs/solq_effseg_shapes",
    "effseg/pairs/fqdet_vector_shapes",
    "istr/pairs/istr_kernel_shapes",
)
PANOPTIC_MODELS = ("solq/solq_r50", "isda/isda_r50", "istr/istr_r50", "effseg/panoptic/effseg_v2_r50_panoptic")
# Files take a minute each: those of all models are written where this is set
EVERYTHING = bool(os.environ.get("QUERYMASK_ALL_EXPORTS"))
FILES = (*MODELS, *PAIRS) if EVERYTHING else ("solq/solq_r50", "isda/isda_r50", "istr/istr_r50", "effseg/effseg_r50")
PANOPTIC_FILES = PANOPTIC_MODELS if EVERYTHING else ("isda/isda_r50", "effseg/panoptic/effseg_v2_r50_panoptic")


# Random weights make segments, too
PANOPTIC = {
    "ENABLED": True,
    "NUM_THINGS": 2,
    "SCORE_THRESHOLD": 0.0,
    "NMS_THRESHOLD": 0.95,
    "AGREEMENT_THRESHOLD": 0.05,
    "AREA_THRESHOLD": 20,
}


# Of random weights by which no mask hangs on the rounding of float32 more than files may differ
SEEDS = {"istr/istr_v2_smt_r50": 1, "effseg/effseg_v2_r50": 2, "effseg/refine_mask_r50": 9}


def make_model(name: str, panoptic: Mapping[str, Any] = {}) -> tuple[CfgNode, nn.Module]:
    torch.manual_seed(SEEDS.get(name, 0))
    cfg = tiny_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PANOPTIC.update(panoptic)
    cfg.TEST.DETECTIONS_PER_IMAGE = 9
    model = build_model(cfg).eval()
    give_basis(getattr(model.mask_branch, "coding", None))
    spread_weights(model.parameters())
    if name == "effseg/effseg_r50":
        model.mask_branch.head.refinements = 250  # the next cell's score differs by more than rounding
    if name == "effseg/effseg_v2_r50":
        model.detector.class_head.weight.data *= 0.02  # many scores of 1, within rounding, would be no order
    return cfg, model


def make_panoptic_model(name: str) -> tuple[CfgNode, nn.Module]:
    cfg, model = make_model(name, PANOPTIC)
    if name.startswith("effseg"):  # scores and probabilities of 1, within rounding, would be no order
        model.detector.class_head.weight.data *= 0.02
        model.mask_branch.head.segmentation[0][-1].weight.data *= 0.02
    return cfg, model


def items() -> list[dict[str, Any]]:
    """Images whose sides are multiples of nothing, and what they are scaled to: as they are, smaller and larger."""
    generator = torch.Generator().manual_seed(1)
    sizes = [((100, 150), (100, 150)), ((97, 230), (61, 180)), ((203, 131), (300, 200))]
    return [
        {
            "image": torch.randint(0, 256, (3, *own), dtype=torch.uint8, generator=generator),
            "height": height,
            "width": width,
        }
        for own, (height, width) in sizes
    ]


def check(model: nn.Module, exported: nn.Module) -> None:
    """Both find the same in images of several sizes."""
    total = Differences()
    with torch.no_grad():
        for item in items():
            expected, found = (detections_of(detect([item])[0]) for detect in (model, exported))
            assert expected.image_size == found.image_size
            assert expected.has("pred_boxes") == found.has("pred_boxes")
            assert expected.has("pred_masks") == found.has("pred_masks")
            total |= compare(expected, found)
    assert total.count > 5 and total.small and total.boxes < 0.1, total


class Unwritten(nn.Module):
    """What a file would compute, step by step."""

    def __init__(self, network: ExportNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        description = Description("SOLQ", network.outputs, [], network.num_things)
        monkeypatch.setattr("querymask.common.export.model.read", lambda *given: (self.run, description))
        self.network = network
        self.model = ExportedModel("none.pt2")

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with exporting():
            return self.network(*inputs)

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return self.model(batch)


@pytest.mark.parametrize("name", MODELS)
def test_forms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forms for export, with rows filled up, a model finds what it finds.

    In float64: the masks of random weights may hang on rounding.
    """
    _, model = make_model(name)
    model.double()
    check(model, Unwritten(ExportNetwork(model), monkeypatch))


@pytest.mark.parametrize("name", PANOPTIC_MODELS)
def test_panoptic_forms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same map, of things and stuff."""
    _, model = make_panoptic_model(name)
    model.double()
    exported, kinds = Unwritten(ExportNetwork(model), monkeypatch), set()
    for item in items():
        with torch.no_grad():
            (ids, segments), (found, described) = (detect([item])[0]["panoptic_seg"] for detect in (model, exported))
        assert torch.equal(found, ids) and found.dtype == ids.dtype
        assert [{**segment, "score": pytest.approx(segment["score"], abs=1e-6)} for segment in segments] == described
        kinds |= {segment["isthing"] for segment in segments}
    assert kinds == {True, False}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    """A program, and the ONNX file in ONNX Runtime, for images of other sizes than that of the example."""
    cfg, model = make_model(name)
    network = ExportNetwork(model)
    program = export_program(network)
    assert not [node for node in program.graph.nodes if "querymask" in str(node.target)]
    description = Description(cfg.MODEL.META_ARCHITECTURE, network.outputs, ["a", "b", "c", "d", "e"])
    write(program, description, tmp_path / "model.pt2")
    check(model, ExportedModel(tmp_path / "model.pt2").eval())
    skip_without_onnx()
    file = tmp_path / "model.onnx"
    write(program, description, file)
    exported = ExportedModel(file).eval()
    assert exported.description.class_names == ["a", "b", "c", "d", "e"]
    check(model, exported)
    if name == "solq/solq_r50":
        cfg.MODEL.WEIGHTS, cfg.MODEL.SWIN = str(file), get_cfg().MODEL.SWIN  # of which the model has nothing
        found = Predictor(cfg)(items()[0]["image"].permute(1, 2, 0).numpy())
        assert len(found) and set(found.names) <= {"a", "b", "c", "d", "e"}


@pytest.mark.parametrize("name", PANOPTIC_FILES)
def test_panoptic_files(name: str, tmp_path: Path) -> None:
    """Maps of a program and of an ONNX file, for images of other sizes than that of the example."""
    skip_without_onnx()
    cfg, model = make_panoptic_model(name)
    cfg.MODEL.SWIN = get_cfg().MODEL.SWIN  # of which the model has nothing
    network = ExportNetwork(model)
    program = export_program(network)
    description = Description(cfg.MODEL.META_ARCHITECTURE, network.outputs, ["a", "b", "c", "d", "e"], 2)
    for file in (tmp_path / f"model{ending}" for ending in ENDINGS):
        write(program, description, file)
        check(model, ExportedModel(file).eval())
        cfg.MODEL.WEIGHTS = str(file)
        found = Predictor(cfg)(items()[0]["image"].permute(1, 2, 0).numpy())
        assert isinstance(found, PanopticDetections) and len(found) and found.ids.max() == len(found)
        assert [name in "ab" for name in found.names] == found.things.tolist()


# ---- Forms, each against the function that it replaces -------------------------------------------------------------


def exported_and_not(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    with exporting():
        exported = function(*args, **kwargs)
    return exported, function(*args, **kwargs)


def test_deformable_attention() -> None:
    """Samples within, beside and far outside of the maps, and such as are no numbers."""
    torch.manual_seed(0)
    shapes = [(5, 7), (1, 3)]
    value = torch.randn(2, 38, 3, 4, dtype=torch.float64)
    locations = torch.rand(2, 6, 3, 2, 5, 2, dtype=torch.float64) * 1.6 - 0.3
    locations[0, 0] = torch.tensor([float("nan"), 0.5])
    locations[0, 1] = torch.tensor([float("inf"), -7.0])
    locations[0, 2] = torch.tensor([0.0, 1.0])
    weights = torch.rand(2, 6, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(*exported_and_not(multi_scale_deformable_attention, value, shapes, locations, weights))


def test_sparse_convolution() -> None:
    torch.manual_seed(0)
    index_map = torch.randint(0, 6, (2, 4, 5), dtype=torch.int32)
    cells = torch.tensor([[0, 0, 0], [1, 3, 4], [1, 2, 2]], dtype=torch.int32)
    args = torch.randn(6, 3), index_map, cells, torch.randn(4, 3, 3, 3), torch.randn(4)
    torch.testing.assert_close(*exported_and_not(sparse_conv2d, *args, (1, 1, 2, 2)))


BOXES = torch.tensor(
    [
        [3.0, 2.0, 30.5, 17.25],
        [-20.0, -5.0, 80.0, 60.0],
        [10.0, 10.0, 10.0, 20.0],
        [100.0, 3.0, 120.0, 9.0],
        [float("nan"), 0.0, 4.0, 4.0],
    ]
)


def test_pasted_masks() -> None:
    torch.manual_seed(0)
    maps = torch.rand(5, 14, 14)
    assert torch.equal(*exported_and_not(paste_masks, maps, BOXES, 23, 41, 0.5))
    assert torch.equal(*exported_and_not(paste_masks, maps > 0.5, BOXES, 23, 41, 0.5))


def test_bands() -> None:
    """Of pasted and of enlarged masks: any rows of any masks."""
    torch.manual_seed(0)
    maps = torch.rand(5, 6, 8)
    numbers = torch.tensor([3, 1, 4])
    for make, args in ((pasted_bands, (maps[..., :6], BOXES, 41)), (enlarged_bands, (maps, 4))):
        exported, expected = exported_and_not(make, *args)
        for top, bottom in ((0, 24), (5, 18)):
            torch.testing.assert_close(exported(numbers, top, bottom), expected(numbers, top, bottom))


@pytest.mark.parametrize("size", [(20, 38), (33, 50), (11, 7)])
@pytest.mark.parametrize("export", ["any", "paste"])
def test_pasted_regions(size: tuple[int, int], export: str) -> None:
    torch.manual_seed(0)
    args = torch.rand(4, 14, 14), BOXES[:4], (24, 40), (20, 38), size, export
    (masks, certainty), (expected, expected_certainty) = exported_and_not(paste_and_resize, *args)
    assert torch.equal(masks, expected) and expected.any() and not expected.all()
    torch.testing.assert_close(certainty, expected_certainty)


@pytest.mark.parametrize("size", [(20, 30), (37, 61), (9, 13)])
def test_resized_probabilities(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(4, 6, 8)
    exported, expected = exported_and_not(resize_probabilities, probabilities, 4, (20, 30), size, 0.5)
    assert (exported != expected).float().mean() < 1e-3 and expected.any() and not expected.all()


def test_resized_masks() -> None:
    masks = torch.rand(3, 7, 9) > 0.7
    for size in ((7, 9), (7, 20), (3, 5)):
        assert torch.equal(*exported_and_not(resize_masks, masks, *size))


def test_coordinates() -> None:
    for size in ((1, 1), (3, 8)):
        torch.testing.assert_close(*exported_and_not(coordinate_channels, torch.zeros(2, 1, *size)))


@pytest.mark.parametrize("samples", [2, ADAPTIVE])
def test_pooling(samples: int) -> None:
    """Boxes of all levels, small, large, empty and outside."""
    torch.manual_seed(0)
    pyramid = FeaturePyramid([torch.randn(2, 3, 64 // s, 96 // s) for s in (4, 8, 16)], (4, 8, 16))
    boxes = torch.rand(20, 4) * 60
    boxes = torch.cat((torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:] * 8), dim=1), BOXES[:4]))
    images = torch.arange(24) % 2
    torch.testing.assert_close(*exported_and_not(pyramid.pool, boxes, images, 7, samples), atol=1e-5, rtol=1e-5)


def test_descending_order() -> None:
    scores = torch.tensor([0.5, 0.25, 0.5, -1.0, 0.75, 0.25, -1.0, 0.5])
    exported, expected = exported_and_not(descending_order, scores)
    assert exported.tolist() == expected.tolist() == [4, 0, 2, 7, 1, 5, 3, 6]


@pytest.mark.parametrize("drop_empty", [True, False])
def test_suppression(drop_empty: bool) -> None:
    """Crowds, also chains in which each box suppresses the next one, if it is left itself."""
    torch.manual_seed(0)
    for spread in (1.0, 10.0, 60.0):
        low = torch.rand(60, 2) * spread
        boxes = torch.cat((low, low + 20), dim=1)
        boxes[:30, 0] = torch.arange(30) * 5.0
        boxes[:30, 1:] = torch.stack((torch.zeros(30), boxes[:30, 0] + 20, torch.full((30,), 20.0)), dim=1)
        boxes[50:55, 2] = boxes[50:55, 0]
        logits = torch.randn(60, 3)
        exported, expected = exported_and_not(detect, logits, boxes, 0.5, 40, drop_empty)
        kept = exported.scores >= 0
        assert kept.sum() == len(expected.scores) and len(kept) == 40
        for name in ("queries", "labels", "scores", "boxes"):
            assert torch.equal(getattr(exported, name)[kept], getattr(expected, name))
        assert kept[: kept.sum()].all()


def test_suppression_of_queries() -> None:
    """Those that stay, then rows of -1."""
    torch.manual_seed(0)
    low = torch.rand(60, 2) * 30
    scores, labels = torch.rand(60).sort(descending=True).values, torch.randint(3, (60,))
    args = torch.randperm(60), labels, scores, torch.cat((low, low + 20), dim=1), 0.5
    exported, expected = exported_and_not(suppress_queries, *args)
    number = len(expected[0])
    assert 3 < number < 50
    for ours, theirs in zip(exported, expected, strict=True):
        assert len(ours) == 60 and torch.equal(ours[:number], theirs)
    assert (exported[1][number:] == -1).all() and (exported[2][number:] == -1).all()


# ---- What does not fit ---------------------------------------------------------------------------------------------


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"write it with tools/export_model\.py"):
        ExportedModel(tmp_path / "missing.onnx")
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), file)
    with pytest.raises(ValueError, match="does not say what it computes"):
        ExportedModel(file)
    with pytest.raises(ValueError, match="runs on the CPU"):
        ExportedModel(file, "cuda")
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        write(torch.export.load(file), Description("SOLQ", (), ()), tmp_path / "model.bin")
    description = Description("SOLQ", ("scores", "classes"), ())
    write(torch.export.load(file), description, file)
    cfg = tiny_config("isda/isda_r50")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = str(file), "cpu"
    with pytest.raises(ValueError, match="was exported with SOLQ: give the config"):
        ExportedModel.from_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PANOPTIC.ENABLED = "SOLQ", True
    with pytest.raises(ValueError, match=r"MODEL\.PANOPTIC\.ENABLED is True, but .* was exported with False"):
        ExportedModel.from_config(cfg)
    with pytest.raises(ValueError, match="of uint8, not torch.float32"):
        ExportedModel(file)([{"image": torch.zeros(3, 8, 8)}])
    with pytest.raises(ValueError, match="is a model of Detectron2"):
        ExportNetwork(build_model(tiny_config("baselines/mask_rcnn_r50_fpn_3x")))


def test_more_candidates_than_rows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a file leaves out, it tells."""
    _, model = make_model("isda/isda_r50", PANOPTIC)
    monkeypatch.setattr("querymask.common.export.network.SEGMENT_CANDIDATES", 3)
    output = Unwritten(ExportNetwork(model), monkeypatch)(items()[:1])[0]
    assert "an image has 12 queries" in caplog.text and "merges 3" in caplog.text
    assert len(output["panoptic_seg"][1]) <= 3


def test_differences() -> None:
    """Detections in another order are the same; another score, class, mask or number is not."""
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, :5], masks[1, 5:], masks[2, :, :5] = True, True, True
    first = Instances(
        (10, 10),
        scores=torch.tensor([0.9, 0.9, 0.3]),
        pred_classes=torch.tensor([1, 1, 0]),
        pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 5.0, 10.0, 10.0], [0.0, 0.0, 5.0, 10.0]])),
        pred_masks=masks,
    )
    assert compare(first, first[torch.tensor([1, 0, 2])]) == Differences(count=3)
    other = Instances((10, 10), **first.get_fields())
    other.scores = torch.tensor([0.9, 0.9, 0.25])
    assert compare(first, other).scores == pytest.approx(0.05) and not compare(first, other).small
    other = Instances((10, 10), **first.get_fields())
    other.pred_masks = masks.clone()
    other.pred_masks[2, 0] = True
    assert compare(first, other).masks == pytest.approx(0.05)
    assert compare(first, first[:2]).unpaired == 2
