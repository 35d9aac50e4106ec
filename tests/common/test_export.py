"""Exported models: the forms that take the place of operators, the programs, the files, and what reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from mask_bases import give_basis
from tiny_configs import tiny_config
from tiny_models import spread_weights
from torch import Tensor, nn

from querymask import get_cfg
from querymask.common.export import Description, ExportedModel, ExportNetwork, export_program, write
from querymask.common.export.comparison import Differences, compare
from querymask.common.masks import paste_masks, resize_masks
from querymask.common.ops import multi_scale_deformable_attention, sparse_conv2d
from querymask.common.ops.exporting import exporting
from querymask.common.predictor import Predictor
from querymask.common.pyramid import ADAPTIVE, FeaturePyramid
from querymask.effseg.fqdet.suppression import detect
from querymask.effseg.pasting import paste_and_resize
from querymask.isda.mask_features import coordinate_channels
from querymask.isda.masks import resize_probabilities

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
ONNX = ("solq/solq_r50", "isda/isda_r50", "istr/istr_r50")
"""Those that are written as ONNX files, too."""


def make_model(name: str) -> tuple[CfgNode, nn.Module]:
    torch.manual_seed(0)
    cfg = tiny_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.TEST.DETECTIONS_PER_IMAGE = 9
    model = build_model(cfg).eval()
    give_basis(getattr(model.mask_branch, "coding", None))
    spread_weights(model)
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
            expected, found = model([item])[0]["instances"], exported([item])[0]["instances"]
            assert expected.image_size == found.image_size
            assert expected.has("pred_boxes") == found.has("pred_boxes")
            assert expected.has("pred_masks") == found.has("pred_masks")
            total |= compare(expected, found)
    assert total.count > 5 and total.small and total.boxes < 0.1, total


class Unwritten(nn.Module):
    """What a file would compute, step by step."""

    def __init__(self, network: ExportNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        description = Description("SOLQ", network.outputs, [])
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


@pytest.mark.parametrize("name", [*ONNX, "effseg/effseg_r50"])
def test_files(name: str, tmp_path: Path) -> None:
    """A program, and the ONNX file in ONNX Runtime, for images of other sizes than that of the example."""
    cfg, model = make_model(name)
    network = ExportNetwork(model)
    program = export_program(network)
    assert not [node for node in program.graph.nodes if "querymask" in str(node.target)]
    description = Description(cfg.MODEL.META_ARCHITECTURE, network.outputs, ["a", "b", "c", "d", "e"])
    write(program, description, tmp_path / "model.pt2")
    check(model, ExportedModel(tmp_path / "model.pt2").eval())
    if name not in ONNX:
        return
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    file = tmp_path / "model.onnx"
    write(program, description, file)
    exported = ExportedModel(file).eval()
    assert exported.description.class_names == ["a", "b", "c", "d", "e"]
    check(model, exported)
    cfg.MODEL.WEIGHTS, cfg.MODEL.SWIN = str(file), get_cfg().MODEL.SWIN  # of which the model has nothing
    found = Predictor(cfg)(items()[0]["image"].permute(1, 2, 0).numpy())
    assert len(found) and set(found.names) <= {"a", "b", "c", "d", "e"}


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
    with pytest.raises(ValueError, match="was exported from SOLQ: give the config"):
        ExportedModel(file, method="ISDA")
    with pytest.raises(ValueError, match="of uint8, not torch.float32"):
        ExportedModel(file)([{"image": torch.zeros(3, 8, 8)}])
    with pytest.raises(ValueError, match="is a model of Detectron2"):
        ExportNetwork(build_model(tiny_config("baselines/mask_rcnn_r50_fpn_3x")))


def test_panoptic_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.PANOPTIC\.ENABLED False"):
        ExportNetwork(build_model(tiny_config("effseg/panoptic/effseg_v2_r50_panoptic")).eval())


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
