"""The export tool, on a small model with random weights and the built-in data set."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from onnx_packages import skip_without_onnx
from tiny_models import spread_weights
from tool_loader import ROOT, load_tool

from querymask.command_line import load_config
from querymask.common.data import register_shapes
from querymask.common.data.datasets import register_shapes_panoptic
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

PANOPTIC: dict[str, Any] = {
    "DATASETS.TRAIN": f"('{DATASET}_panoptic',)",
    "DATASETS.TEST": f"('{DATASET}_panoptic',)",
    "MODEL.SOLQ.NUM_CLASSES": "11",
    "MODEL.PANOPTIC.ENABLED": "True",
    "MODEL.PANOPTIC.NUM_THINGS": "6",
    "MODEL.PANOPTIC.SCORE_THRESHOLD": "0.0",  # random weights make segments, too
    "MODEL.PANOPTIC.NMS_THRESHOLD": "0.95",
    "MODEL.PANOPTIC.AGREEMENT_THRESHOLD": "0.05",
    "MODEL.PANOPTIC.AREA_THRESHOLD": "5",
}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[list[str]]:
    """Overrides of the config, with a data set of three images."""
    names = DATASET, f"{DATASET}_panoptic"
    for name, register in zip(names, (register_shapes, register_shapes_panoptic), strict=True):
        register(name, tmp_path / "data", "val", num_images=3)
    yield flat({**SETTINGS, "OUTPUT_DIR": str(tmp_path / "out")})
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def flat(settings: dict[str, str]) -> list[str]:
    return [text for pair in settings.items() for text in pair]


def test_program(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is written, compared with the model, and evaluated in place of a checkpoint."""
    file = str(tmp_path / "model.pt2")
    assert tool.main(["--config-file", CONFIG, "--output", file, "--num-images", "3", *settings]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 27 detections: scores differ by at most" in printed and "; 0 without a partner" in printed
    assert "| ms an image" in printed and "| segm" in printed and "| bbox" in printed
    results = Trainer.evaluate(load_config(CONFIG, [*settings, "MODEL.WEIGHTS", file]))
    assert {"bbox", "segm"} <= set(results)


def test_panoptic_onnx(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same of panoptic maps, with PQ, as an ONNX file, which is read sooner than a program."""
    skip_without_onnx()
    settings = [*settings, *flat(PANOPTIC)]
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, settings))
    spread_weights(model.parameters())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    settings += ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    file = str(tmp_path / "model.onnx")
    assert tool.main(["--config-file", CONFIG, "--output", file, "--num-images", "3", *settings]) == 0
    printed = capsys.readouterr().out
    number = int(re.search(r"3 images, (\d+) segments: scores differ by at most", printed)[1])
    assert number > 3 and "; 0 without a partner" in printed and "| panoptic_seg" in printed
    settings += ["MODEL.WEIGHTS", file]
    assert set(Trainer.evaluate(load_config(CONFIG, settings))) == {"panoptic_seg"}


def test_refusals(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config-file", CONFIG, "--output", str(tmp_path / "model.bin"), *settings]) == 1
    assert "ends in .onnx or .pt2" in capsys.readouterr().err
    missing = [*settings, "MODEL.WEIGHTS", str(tmp_path / "missing.pth")]
    assert tool.main(["--config-file", CONFIG, "--output", str(tmp_path / "model.pt2"), *missing]) == 1
    assert "missing.pth" in capsys.readouterr().err
