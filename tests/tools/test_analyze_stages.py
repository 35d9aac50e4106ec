"""The stage analysis: which stage's detections are evaluated and drawn."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from devices import DEVICE
from PIL import Image
from tool_loader import load_tool

from querymask.common.data import register_shapes
from querymask.common.data.segmentation import decode_segmentation
from querymask.istr import ISTR
from querymask.istr.figures import draw_stages

ROOT = Path(__file__).parents[2]
NAME = "shapes_of_stages"
CONFIG = """
_BASE_: {base}
MODEL:
  WEIGHTS: ""
  DEVICE: {device}
  RESNETS: {{STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16}}
  FPN: {{OUT_CHANNELS: 16}}
  ISTR: {{NUM_QUERIES: 4, NUM_STAGES: 2, HIDDEN_DIM: 16, NUM_HEADS: 2, DIM_FEEDFORWARD: 8, DIM_DYNAMIC: 4}}
DATASETS: {{TEST: [shapes_of_stages]}}
"""


tool = load_tool("analyze_stages")


@pytest.fixture(autouse=True)
def registered(tmp_path: Path) -> Iterator[None]:
    register_shapes(NAME, tmp_path / "data", "val", num_images=6)
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(device=DEVICE, base=ROOT / "projects" / "istr" / "configs" / "istr_shapes.yaml"))
    return str(path)


def truth_of(entry: dict[str, Any], size: tuple[int, int]) -> Instances:
    annotations = [a for a in entry["annotations"] if not a["iscrowd"]]
    instances = Instances(size)
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.full((len(annotations),), 0.9)
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    masks = [decode_segmentation(a["segmentation"], *size).astype(bool) for a in annotations]
    instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *size))
    return instances


@pytest.mark.parametrize("images", [0, 3])
def test_each_stage_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """The first stage finds nothing and the second everything."""
    entries = iter(DatasetCatalog.get(NAME))

    def detect(self: ISTR, found: Any, made: Any, sizes: list[tuple[int, int]], stage: int) -> list[Instances]:
        if stage == 0:
            found = truth_of({"annotations": []}, sizes[0])
        else:
            found = truth_of(next(entries), sizes[0])
        return [found]

    monkeypatch.setattr(ISTR, "detect", detect)
    output = tmp_path / "output"
    arguments = ["--config-file", config(tmp_path), "--output", str(output), "--pictures", "2"]
    results = tool.main([*arguments, "--images", str(images)])
    assert results == [{"bbox": 0, "segm": 0}, {"bbox": pytest.approx(100), "segm": pytest.approx(100)}]
    assert json.loads((output / "stages.json").read_text()) == results
    lines = (output / "stages.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["stage", "box AP", "mask AP"] and rows[2:] == [["1", "0.00", "0.00"], ["2", "100.00", "100.00"]]
    pictures = [path for path in output.glob("*.png") if path.name != "stages.png"]
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert picture.width > 3 * picture.height / 1.7, "three panels beside each other"


@pytest.mark.parametrize(("stages", "columns", "rows"), [(1, 2, 1), (4, 5, 1), (6, 4, 2)])
def test_rows_are_filled_evenly(stages: int, columns: int, rows: int) -> None:
    """With the ground truth: 2, 5 and 7 panels."""
    image = np.zeros((512, 512, 3), np.uint8)
    found = truth_of({"annotations": []}, (512, 512))
    height, width, _ = draw_stages(image, [found] * stages, (), 0.3, []).shape
    assert (width // 512, height // 512) == (columns, rows)


def test_real_model_and_other_methods(tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["--config-file", config(tmp_path), "--output", str(output), "--images", "2", "--pictures", "1"]
    results = tool.main(arguments)
    assert len(results) == 2 and all(np.isfinite(list(scores.values())).all() for scores in results)
    solq = ROOT / "projects" / "solq" / "configs" / "solq_shapes.yaml"
    with pytest.raises(SystemExit, match="is a SOLQ: only ISTR has refinement stages"):
        tool.main(["--config-file", str(solq), "--output", str(output)])
