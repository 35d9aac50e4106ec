"""The export tool, on a small model with random weights and the built-in data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from tool_loader import ROOT, load_tool

from querymask.command_line import load_config
from querymask.common.data import register_shapes
from querymask.common.engine import Trainer

tool = load_tool("export_model")
DATASET = "shapes_to_export"
CONFIG = str(ROOT / "projects/solq/configs/solq_shapes.yaml")
SETTINGS: dict[str, Any] = {
    "DATASETS.TRAIN": f"('{DATASET}',)",
    "DATASETS.TEST": f"('{DATASET}',)",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "16",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
    "MODEL.SOLQ.NUM_QUERIES": "6",
    "MODEL.SOLQ.HIDDEN_DIM": "32",
    "MODEL.SOLQ.ENC_LAYERS": "1",
    "MODEL.SOLQ.DEC_LAYERS": "1",
    "TEST.DETECTIONS_PER_IMAGE": "9",
    "INPUT.MIN_SIZE_TEST": "64",
    "VIS_NUM_IMAGES": "0",
}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[list[str]]:
    """Overrides of the config, with a data set of three images."""
    register_shapes(DATASET, tmp_path / "data", "val", num_images=3)
    yield [text for pair in {**SETTINGS, "OUTPUT_DIR": str(tmp_path / "out")}.items() for text in pair]
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def test_program(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is written, compared with the model, and evaluated in place of a checkpoint."""
    file = str(tmp_path / "model.pt2")
    assert tool.main(["--config-file", CONFIG, "--output", file, "--num-images", "3", *settings]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 27 detections: scores differ by at most" in printed and "; 0 without a partner" in printed
    assert "| ms an image" in printed and "| segm" in printed and "| bbox" in printed
    results = Trainer.evaluate(load_config(CONFIG, [*settings, "MODEL.WEIGHTS", file]))
    assert {"bbox", "segm"} <= set(results)


def test_refusals(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config-file", CONFIG, "--output", str(tmp_path / "model.bin"), *settings]) == 1
    assert "ends in .onnx or .pt2" in capsys.readouterr().err
    missing = [*settings, "MODEL.WEIGHTS", str(tmp_path / "missing.pth")]
    assert tool.main(["--config-file", CONFIG, "--output", str(tmp_path / "model.pt2"), *missing]) == 1
    assert "missing.pth" in capsys.readouterr().err
