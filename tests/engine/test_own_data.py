"""A folder of data that the command line names: training, evaluation, what the config takes over, and a run's demo."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from data_folders import save_photo, write_folder
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from panoptic_files import write_panoptic
from tiny_configs import LEAVES, REDUCED
from tool_loader import load_tool

from querymask import get_cfg
from querymask.command_line import load_config, load_run
from querymask.common.engine import Trainer, register_configured
from querymask.common.engine.own_data import follow_batch

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net, demo = load("train_net"), load("demo")

pytestmark = pytest.mark.usefixtures("catalog")


@pytest.fixture
def config(cfg: CfgNode, tmp_path: Path) -> str:
    """A file of the tiny config, made for other data of five classes and for batches of four."""
    cfg.MODEL.SOLQ.NUM_CLASSES = 5
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, 2e-3, 3, (2,)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)


@pytest.fixture
def fruit(tmp_path: Path) -> str:
    return str(write_folder(tmp_path / "data" / "fruit", "roboflow"))


def run(*arguments: str) -> dict:
    args = train_net.parse_arguments(arguments)
    return train_net.main(args, train_net.setup(args))


def test_from_a_folder_to_pictures(config: str, fruit: str, tmp_path: Path, cfg: CfgNode) -> None:
    """Train, evaluate the result again, draw with nothing but the folder of the run, also where the data are gone."""
    output = Path(cfg.OUTPUT_DIR)
    command = ["--config-file", config, "--data", fruit]
    trained = run(*command, "SOLVER.IMS_PER_BATCH", "2")
    written = load_config(output / "config.yaml")
    assert written.DATASETS.TRAIN == ("fruit_train",) and written.DATASETS.TEST == ("fruit_val",)
    assert written.MODEL.SOLQ.NUM_CLASSES == 2 and list(written.MODEL.CLASS_NAMES) == ["apple", "pear"]
    solver = written.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (1e-3, 6, (4,))
    log = (output / "log.txt").read_text()
    for line in (
        "data/fruit (Roboflow): 4 images in fruit_train, 2 images in fruit_val; 2 classes: apple, pear",
        "the config is made for 3 batches of 4 images, this run has 6 of 2. By the linear rule SOLVER.BASE_LR 0.002 "
        "becomes 0.001, SOLVER.MAX_ITER 3 becomes 6, SOLVER.STEPS (2,) becomes (4,)",
        "each of the 4 images to train on comes 3 times",
        "results on fruit_val",
    ):
        assert log.count(line) == 1, line
    assert [json.loads(line)["iteration"] for line in (output / "metrics.json").read_text().splitlines()][-1] == 6

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "again")]
    evaluated = run(*command, "--eval-only", *weights)
    again = run("--config-file", str(output / "config.yaml"), "--eval-only", *weights)
    assert evaluated["segm"]["AP"] == again["segm"]["AP"] == pytest.approx(trained["segm"]["AP"], nan_ok=True)
    results = str(tmp_path / "again" / "inference" / "coco_instances_results.json")
    assert load_tool("evaluate_results").main([results, "--data", fruit]) == 0

    picture = save_photo(tmp_path / "holiday" / "a.png")
    arguments = ["--run", str(output), "--output", str(tmp_path / "drawn"), "--confidence-threshold", "0"]
    assert demo.main([*arguments, "--test-images", "1"]) == 0
    os.rename(fruit, tmp_path / "moved")
    for name in ("fruit_train", "fruit_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert demo.main([*arguments, "--input", str(picture)]) == 0
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["a.jpg", "detections.json", "images.json", "val0.jpg"]


def test_panoptic_folder(tmp_path: Path) -> None:
    """Train and evaluate; the result files give the same in every way, and a page."""
    own, output = tmp_path / "own", tmp_path / "output"
    write_panoptic(own, "train", ("a", "b"))
    write_panoptic(own, "val", ("c", "d"))
    cfg = LEAVES["effseg/panoptic/effseg_shapes_panoptic"].config()
    widths = {"MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "MODEL.RESNETS.RES2_OUT_CHANNELS": 16}
    for key, value in (REDUCED["effseg"] | widths).items():
        cfg.merge_from_list([key, value])
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 2])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "VIS_NUM_IMAGES", 1, "TEST.BOUNDARY_AP", True, "TEST.EVAL_PERIOD", 0])
    # Queries of random weights become segments
    cfg.merge_from_list(["MODEL.PANOPTIC.SCORE_THRESHOLD", 0.0, "MODEL.PANOPTIC.AREA_THRESHOLD", 0])
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    command = ["--config-file", str(config), "--data", str(own)]
    trained = run(*command)
    assert list(trained) == ["panoptic_seg", "panoptic_boundary"]
    written = load_config(output / "config.yaml")
    assert (written.MODEL.EFFSEG.NUM_CLASSES, written.MODEL.PANOPTIC.NUM_THINGS) == (4, 2)
    assert list(written.MODEL.CLASS_NAMES) == ["dog", "cat", "sky", "grass"]
    assert "boundary PQ" in (output / "log.txt").read_text()
    assert [path.name for path in (output / "predictions").iterdir()] == ["c.png"]

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "again")]
    results = str(output / "inference" / "predictions.json")
    same = {task: pytest.approx(scores, nan_ok=True) for task, scores in trained.items()}
    assert run(*command, "--eval-only", *weights) == same
    assert run(*command, "--eval-only", "--results", results, *weights) == same
    saved = tmp_path / "scores.json"
    assert load_tool("evaluate_results").main([results, "--data", str(own), "--save", str(saved)]) == 0
    assert json.loads(saved.read_text()) == same
    assert load_tool("report").main([str(output)]) == 0
    page = (output / "report.html").read_text()
    assert "<th>boundaries of segments</th>" in page and "PQ-sky" in page and "they are of instances" in page


def test_what_the_command_line_says_counts(config: str, fruit: str) -> None:
    overrides = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.5", "SOLVER.MAX_ITER", "30"]
    overrides += ["DATASETS.TEST", "('fruit_train', 'fruit_val')", "MODEL.CLASS_NAMES", "['a', 'b']"]
    cfg = load_config(config, overrides, data=fruit)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (0.5, 30, (20,))
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (40, 100, 0)
    assert cfg.DATASETS.TEST == ("fruit_train", "fruit_val") and list(cfg.MODEL.CLASS_NAMES) == ["a", "b"]


@pytest.mark.parametrize("factor", [0.25, 1, 3])
def test_linear_rule(factor: float) -> None:
    """Detectron2's function for another number of processes does the same."""
    reference = get_cfg()
    reference.SOLVER.IMS_PER_BATCH, reference.SOLVER.REFERENCE_WORLD_SIZE = 24, 12
    reference.SOLVER.STEPS, reference.TEST.EVAL_PERIOD = (30000, 36000), 1200
    expected = DefaultTrainer.auto_scale_workers(reference, int(12 * factor))
    cfg = reference.clone()
    cfg.SOLVER.IMS_PER_BATCH = int(24 * factor)
    follow_batch(cfg, reference, ())
    for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        assert cfg.SOLVER[key] == pytest.approx(expected.SOLVER[key]), key
    assert cfg.TEST.EVAL_PERIOD == expected.TEST.EVAL_PERIOD


def test_processes_know_the_data_of_the_config(
    config: str, fruit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that a run starts have the config alone; a data set of the package of the same name gives way."""
    os.rename(fruit, Path(fruit).with_name("balloon"))
    cfg = load_config(config, data=str(Path(fruit).with_name("balloon")))
    for name in ("balloon_train", "balloon_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register("balloon_train", list)
    register_configured(cfg)
    assert len(DatasetCatalog.get("balloon_train")) == 4 and len(DatasetCatalog.get("balloon_val")) == 2
    load = DatasetCatalog["balloon_val"]
    register_configured(cfg)
    assert DatasetCatalog["balloon_val"] is load  # what was read is kept
    monkeypatch.setattr(logging.getLogger("querymask"), "propagate", True)
    cfg.DATASETS.FOLDER = "/gone/fruit"
    register_configured(cfg)
    assert "DATASETS.FOLDER /gone/fruit is not there" in caplog.text


def test_starting_from_a_model_of_other_classes(config: str, fruit: str, tmp_path: Path, cfg: CfgNode) -> None:
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "five.pth")
    run("--config-file", config, "--data", fruit, "MODEL.WEIGHTS", str(tmp_path / "five.pth"))
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "five.pth is of other classes, the model of apple, pear: 2 tensors that depend on the classes are" in log


def test_overfit(config: str, fruit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("overfit")
    arguments = ["overfit.py", "--config-file", config, "--data", fruit, "--num-images", "2", "SOLVER.MAX_ITER", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    trained = []
    monkeypatch.setattr(tool, "Trainer", lambda cfg: trained.append(cfg) or Trainer(cfg))
    tool.main()
    (cfg,) = trained
    assert cfg.DATASETS.TEST == ("fruit_train_first_2",) and cfg.MODEL.SOLQ.NUM_CLASSES == 2


def test_mask_basis(fruit: str, tmp_path: Path) -> None:
    tool = load_tool("fit_mask_basis")
    arguments = ["--data", fruit, "--output", str(tmp_path / "basis.npz"), "--components", "2"]
    args = tool.parse_arguments(arguments)
    assert args.train == ["fruit_train"] and args.test == ["fruit_val"]
    assert "pixel_iou" in tool.main([*arguments, "--mask-size", "8"])


def test_run_that_cannot_be_used(tmp_path: Path, cfg: CfgNode) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml: give the OUTPUT_DIR of a training run"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint: neither model_best\.pth nor last_checkpoint"):
        load_run(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    assert load_run(tmp_path).MODEL.WEIGHTS == str(tmp_path / "model_0000009.pth")
    (tmp_path / "model_best.pth").touch()
    assert load_run(tmp_path).MODEL.WEIGHTS == str(tmp_path / "model_best.pth")
