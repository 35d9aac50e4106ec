"""Every script of benchmarks/ and tools/ runs: benchmarks here on tiny sizes, tools where the table says."""

import json
import multiprocessing.dummy
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tool_loader import ROOT, load_tool

from querymask.common.data import register_shapes
from querymask.common.data.datasets import register_shapes_panoptic
from querymask.isda import masks

# Where each tool's main function is run
TOOLS = {
    "analyze_model": "tests/tools/test_analyze_model.py",
    "analyze_stages": "tests/tools/test_analyze_stages.py",
    "compare_costs": "tests/tools/test_compare_costs.py",
    "compare_results": "tests/tools/test_compare_results.py",
    "convert_checkpoint": "tests/tools/test_convert_checkpoint.py",
    "evaluate_results": "tests/tools/test_evaluate_results.py",
    "export_model": "tests/tools/test_export_model.py",
    "fit_mask_basis": "tests/tools/test_fit_mask_basis.py",
    "make_coco": "tests/tools/test_make_coco.py",
    "make_model_zoo": "tests/benchmarks/test_benchmarks.py",
    "overfit": "tests/benchmarks/test_benchmarks.py",
    "plot_costs": "tests/tools/test_compare_costs.py",
    "report": "tests/tools/test_report.py",
    "train_mask_autoencoder": "tests/tools/test_fit_mask_basis.py",
}
# Arguments of each benchmark, and a pattern that its table has
BENCHMARKS = {
    "boundary_ap": (["--images", "1", "--objects", "2"], r"boundary AP \| +\d+\.\d+ \|"),
    "compiled_models": (
        [
            *("--config", "projects/solq/configs/solq_shapes.yaml", "--height", "64", "--width", "64", "--repeat", "1"),
            *("--set", "MODEL.SOLQ.ENC_LAYERS", "1", "MODEL.SOLQ.DEC_LAYERS", "1"),
        ],
        r"solq_shapes +\| +\d+ \| +\d+ \| +\d+\.\d\d x \| +\d+ \|",
    ),
    "count_instructions": (
        ["--operators", "msda", "--listing", "tests/benchmarks/listing.txt"],
        r"forward, float32 +\| +10\.0 \|",
    ),
    "isda_memory": (["--height", "64", "--width", "64"], r"all masks at once +\| +100 \|"),
    "istr": (
        ["--height", "64", "--width", "64", "--batch", "1", "--instances", "2", "--repeats", "1"],
        r"ISTR +\| +[\d,]+ +\| +\d",
    ),
    "msda": (["--images", "64x96", "--queries", "5", "--repeat", "1"], r"this operator +\| +\d"),
    "refinement_structures": (
        ["--sides", "14", "28", "--regions", "2", "--count", "50", "--width", "4", "--repeat", "1"],
        r"SparseOnDense \| +\d",
    ),
    "segmentation_heads": (
        ["--height", "64", "--width", "64", "--regions", "2", "--repeat", "1"],
        r"RefineMask\+\+ +\| +[\d,]+ \|",
    ),
    "training_memory": (
        ["projects/solq/configs/solq_shapes.yaml", "--height", "64", "--width", "64", "--instances", "2"],
        r"solq_shapes +\| +yes +\| +\d",
    ),
    "sps": (["--active", "400", "--channels", "8", "--repeat", "1"], r"this operator +\| +\d"),
}


def scripts(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")}


def test_every_script_is_run_by_a_test() -> None:
    tested_elsewhere = {"gpu", "sps_instructions"}  # in files of their names
    assert scripts("benchmarks") == set(BENCHMARKS) | tested_elsewhere, "give a new benchmark tiny sizes in the table"
    assert scripts("tools") == set(TOOLS), "name the test that runs a new tool in the table above"
    for name, file in TOOLS.items():
        text = (ROOT / file).read_text()
        assert f'load_tool("{name}")' in text and re.search(r"\.main\(", text), f"{file} does not run tools/{name}.py"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Function (script, its arguments) that calls its main function and gives what it printed."""

    def run(script: str, folder: str, arguments: list[str]) -> str:
        module = load_tool(script, folder)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark(name: str, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It prints its table and, if it can, saves the same."""
    arguments, row = BENCHMARKS[name]
    module = load_tool(name, "benchmarks")
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    if name in ("isda_memory", "training_memory"):  # threads: processes take as long to start as all the rest
        monkeypatch.setattr(module.multiprocessing, "get_context", lambda kind: multiprocessing.dummy)
        monkeypatch.setattr(masks, "CHUNK_ELEMENTS", masks.CHUNK_ELEMENTS)  # put back afterwards
    if name != "isda_memory":
        arguments = [*arguments, "--save", str(tmp_path / "table.md")]
    if name == "count_instructions":
        monkeypatch.setattr(module, "OPERATORS", {"msda": (None, module.MSDA[:1])})  # of which there is a listing
    if name == "compiled_models":
        monkeypatch.setattr(module, "BACKEND", "eager")  # compilers take minutes
    if name == "segmentation_heads":
        monkeypatch.setattr(module, "WIDTH", 32)
    try:
        printed = call(name, "benchmarks", arguments)
    finally:
        torch.set_num_threads(threads)
    assert re.search(row, printed), printed
    if "--save" in arguments:
        assert re.search(row, (tmp_path / "table.md").read_text())
    if name == "refinement_structures":
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_training(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other table of the benchmark: of a training step."""
    arguments, row = BENCHMARKS["compiled_models"]
    monkeypatch.setattr(load_tool("compiled_models", "benchmarks"), "BACKEND", "eager")
    monkeypatch.chdir(ROOT)
    printed = call("compiled_models", "benchmarks", [*arguments, "--training"])
    assert re.search(row, printed) and "training step ms" in printed, printed


def test_overfit(call: Callable[..., str], tmp_path: Path) -> None:
    """Trains on the first images alone, and evaluates on them."""
    load_tool("overfit")
    register_shapes("shapes_to_overfit", tmp_path / "data", "train", num_images=6)
    settings = {
        "DATASETS.TRAIN": "('shapes_to_overfit',)",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "16",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
        "MODEL.SOLQ.NUM_QUERIES": "6",
        "MODEL.SOLQ.HIDDEN_DIM": "32",
        "MODEL.SOLQ.ENC_LAYERS": "1",
        "MODEL.SOLQ.DEC_LAYERS": "1",
        "SOLVER.MAX_ITER": "1",
        "SOLVER.STEPS": "()",
        "INPUT.MIN_SIZE_TEST": "64",
        "VIS_NUM_IMAGES": "0",
    }
    config = str(ROOT / "projects/solq/configs/solq_shapes.yaml")
    options = [text for pair in settings.items() for text in pair]
    call("overfit", "tools", ["--config-file", config, "--num-images", "2", *options])
    assert (tmp_path / "out" / "shapes_to_overfit_first_2.json").exists()
    assert '"segm/AP"' in (tmp_path / "out" / "metrics.json").read_text()


def test_overfit_panoptic(call: Callable[..., str], tmp_path: Path) -> None:
    load_tool("overfit")
    register_shapes_panoptic("panoptic_to_overfit", tmp_path / "data", "train", num_images=4)
    settings = {
        "DATASETS.TRAIN": "('panoptic_to_overfit',)",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.DEVICE": "cpu",
        "MODEL.EFFSEG.NUM_QUERIES": "20",
        "MODEL.EFFSEG.HIDDEN_DIM": "32",
        "MODEL.EFFSEG.DEC_LAYERS": "1",
        "MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS": "50",
        "SOLVER.MAX_ITER": "1",
        "SOLVER.STEPS": "()",
        "VIS_NUM_IMAGES": "0",
    }
    config = str(ROOT / "projects/effseg/configs/panoptic/effseg_shapes_panoptic.yaml")
    options = [text for pair in settings.items() for text in pair]
    call("overfit", "tools", ["--config-file", config, "--num-images", "2", *options])
    assert '"panoptic_seg/PQ"' in (tmp_path / "out" / "metrics.json").read_text()
    results = json.loads((tmp_path / "out" / "inference" / "predictions.json").read_text())
    assert len(results["annotations"]) == 2


def test_model_zoo(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page is written with a measured row for each config; a second run keeps its GFLOPs."""
    zoo = load_tool("make_model_zoo")
    leaves = [leaf for leaf in zoo.find_leaves() if leaf.name == "solq_shapes"]
    page = tmp_path / "page.md"
    monkeypatch.setattr(zoo, "find_leaves", lambda: leaves)
    monkeypatch.setattr(zoo, "OUTPUT", page)
    monkeypatch.setattr(zoo, "HEIGHT", 160)
    monkeypatch.setattr(zoo, "WIDTH", 160)
    assert "solq_shapes: " in call("make_model_zoo", "tools", [])
    gflops = zoo.read_gflops(page.read_text())
    assert set(gflops) == {"solq_shapes"} and float(gflops["solq_shapes"]) > 0
    text = page.read_text()
    assert " GFLOPs" not in call("make_model_zoo", "tools", ["--keep-gflops"])
    assert page.read_text() == text
