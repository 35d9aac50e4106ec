"""The analysis tool, on the project's own configs."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from devices import DEVICE
from tool_loader import load_tool

from querymask.command_line import load_config
from querymask.common.data import annotations, mapper
from querymask.common.flops import measure

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "projects" / "solq" / "configs"


tool = load_tool("analyze_model")


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """The printed tables: first header -> first cell -> the other cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"]
        if rows:
            name = " ".join(rows[0][:2])
            found[name] = {row[0]: row[1:] for row in rows[2:]}
    return found


@pytest.mark.parametrize(
    ("name", "overrides", "total", "trainable"),
    [
        ("solq_r50.yaml", [], 54_193_660, 53_971_260),
        ("solq_r50_width256.yaml", [], 42_424_828, 42_202_428),
        ("solq_r101.yaml", [], 73_133_564, 72_911_164),
        ("solq_swin_l.yaml", [], 223_622_992, 223_622_992),
        ("ablations/coding_dct.yaml", [], 45_190_780, 44_968_380),
        ("deformable_detr_r50_refine.yaml", [], 52_487_420, 52_265_020),
    ],
)
def test_parameters_of_published_models(
    name: str, overrides: list[str], total: int, trainable: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on the official models, whose class head has 91 rows."""
    arguments = ["--config-file", str(CONFIGS / name), "--parameters-only", "MODEL.SOLQ.NUM_CLASSES", "91", *overrides]
    assert tool.main(arguments) == 0
    rows = tables(capsys.readouterr().out)["module parameters"]
    assert rows["(model)"] == [f"{total:,}", f"{trainable:,}"]


def test_parameters_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", str(CONFIGS / "solq_r50.yaml"), "--parameters-only", "--depth", "3"]
    assert tool.main([*arguments, "MODEL.SOLQ.NUM_CLASSES", "91"]) == 0
    rows = tables(capsys.readouterr().out)["module parameters"]
    parts = {name: int(cells[0].replace(",", "")) for name, cells in rows.items()}
    assert parts["backbone"] == 23_454_912
    assert parts["detector.input_proj"] == 8_458_752
    assert parts["detector.transformer.encoder"] == 7_397_376
    assert parts["detector.transformer.decoder"] + parts["detector.bbox_embed"] == 12_733_464
    assert parts["detector.class_embed"] == 210_210
    assert parts["mask_branch.vector_embed"] == 1_706_240
    assert parts["detector.query_embed"] == 230_400
    assert parts["detector.transformer.reference_points"] == 770


TINY = """
_BASE_: {base}
MODEL:
  DEVICE: {device}
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}
  SOLQ: {{NUM_QUERIES: 5, NUM_CLASSES: 6, HIDDEN_DIM: 64, NUM_HEADS: 2, ENC_LAYERS: 1, DEC_LAYERS: 2,
          DIM_FEEDFORWARD: 16}}
  MASK_CODING: {{SIZE: 16, LENGTH: 20}}
  MASK_BRANCH: {{VECTOR: {{HIDDEN_DIM: 24}}}}
TEST: {{DETECTIONS_PER_IMAGE: 7}}
INPUT: {{MIN_SIZE_TEST: 60}}
DATASETS: {{TEST: [{dataset}]}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(device=DEVICE, base=CONFIGS / "Base-SOLQ.yaml", dataset="shapes_val"))
    return path


def test_cost_of_solq(tiny: Path) -> None:
    """Multiply-adds of the parts whose inputs are known."""
    pixels = torch.zeros(3, 64, 96)
    model = build_model(load_config(tiny))
    flops = measure(model, {"image": pixels, "height": 64, "width": 96}).flops_by_module
    tokens = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert flops["detector.transformer.encoder.layers.0.linear1"] == tokens * 64 * 16
    assert flops["detector.transformer.encoder.layers.0.self_attn.value_proj"] == tokens * 64 * 64
    assert flops["detector.transformer.encoder.layers.0.self_attn.sampling_offsets"] == tokens * 64 * (2 * 4 * 4 * 2)
    # Queries: projections of query, key, value and output, then scores and weighted sums
    assert flops["detector.transformer.decoder.layers.1.self_attn"] == 5 * 64 * 64 * 4 + 2 * 5 * 5 * 64
    assert flops["detector.class_embed"] == 2 * 5 * 64 * 6
    assert flops["mask_branch.vector_embed"] == 7 * (64 * 24 + 24 * 24 + 24 * 20)  # only for what is detected


def test_cost_of_an_image_of_a_given_size(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config-file", str(tiny), "--height", "64", "--width", "96", "--depth", "4"]) == 0
    output = capsys.readouterr().out
    assert "image 1: 64 x 96" in output
    found = tables(output)
    operators, modules = found["operator GFLOP"], found["module GFLOP"]
    assert float(modules["backbone.res4"][0]) > 0
    assert not [name for name in modules if name.count(".") > 3]
    counted = sum(float(cells[0]) for name, cells in operators.items() if name != "(all)")
    assert float(operators["(all)"][0]) == pytest.approx(counted, abs=0.001 * len(operators))
    assert modules["(model)"][0] == operators["(all)"][0]
    missed = found["operator calls per image"]
    assert "aten::sigmoid" in missed and "aten::mul" in missed
    assert not [name for name in missed if name.startswith("querymask::") or "attention" in name]


def test_default_size_follows_the_config(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config-file", str(tiny)]) == 0
    assert "image 1: 60 x 80" in capsys.readouterr().out


def test_means_over_images_of_a_data_set(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        {"file_name": f"{i}.jpg", "image_id": i, "height": 40 + i, "width": 50, "annotations": []} for i in range(3)
    ]
    monkeypatch.setattr(annotations, "read_dataset", lambda name: {"shapes_val": items}[name])
    mapped = []

    class Mapper:
        def __init__(self, cfg: object, is_train: bool) -> None:
            assert not is_train

        def __call__(self, item: dict) -> dict:
            mapped.append(item["image_id"])
            return {"image": torch.zeros(3, 64, 64 + 32 * item["image_id"]), "height": 40, "width": 50}

    monkeypatch.setattr(mapper, "InstanceMapper", Mapper)
    assert tool.main(["--config-file", str(tiny), "--num-images", "2", "--depth", "1"]) == 0
    output = capsys.readouterr().out
    assert mapped == [0, 1]
    assert "Means over 2 image(s)" in output
    images = [float(line.split(",")[1].split()[0]) for line in output.splitlines() if line.startswith("image ")]
    mean, std = tables(output)["operator GFLOP"]["(all)"]
    assert float(mean) == pytest.approx(sum(images) / 2, abs=0.006)
    assert float(std) == pytest.approx((images[1] - images[0]) / 2, abs=0.006)


@pytest.mark.parametrize(
    "arguments", [["--height", "64"], ["--num-images", "0"], ["--num-images", "2", "--height", "9"]]
)
def test_contradicting_options_are_refused(tiny: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--config-file", str(tiny), *arguments])
