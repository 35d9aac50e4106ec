"""Costs of models side by side, and AP plotted against them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from devices import DEVICE
from tool_loader import load_tool

from querymask.command_line import load_config
from querymask.common.flops import count_parameters
from querymask.common.measured_models import build_on_meta
from querymask.model_zoo import leaves_of
from querymask.paper_numbers import costs, find_tables, read_tables

tool = load_tool("compare_costs")
plots = load_tool("plot_costs")
ROOT = Path(__file__).parents[2]
TINY = """
_BASE_: {base}
MODEL:
  DEVICE: {device}
  WEIGHTS: ""
  BACKBONE: {{NAME: build_basic_resnet_backbone}}
  RESNETS: {{DEPTH: 18, STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 16}}
  EFFSEG: {{LEVELS: [2, 3, 4, 5], NUM_QUERIES: 30, NUM_CLASSES: 6, HIDDEN_DIM: 32, NUM_HEADS: 2,
            DEC_LAYERS: 1, DIM_FEEDFORWARD: 16}}
  MASK_BRANCH: {{NAME: {branch}, EFFSEG: {{REFINEMENTS: 500}}}}
INPUT: {{MIN_SIZE_TEST: 60}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """Function (name of a mask branch, name of the file) that writes the config of a tiny EffSeg."""

    def write(branch: str, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            TINY.format(device=DEVICE, base=ROOT / "projects/effseg/configs/Base-EffSeg.yaml", branch=branch)
        )
        return path

    return write


def measured(path: Path, *options: str) -> Any:
    return tool.measure_config(path, tool.parse_arguments([str(path), "--repeat", "0", *options]))


def linear_layers_at(detections: int, regions: int) -> int:
    """Multiply-adds of what is linear in the number of regions: fusion of queries, convolutions, classifiers."""
    width, cells = 32, 196 * regions
    dense = 2 * width * width + width * width + 4 * 9 * width * width + 2 * (width * width + width)
    return cells * dense + regions * width * width


def test_parameters_and_flops(tiny: Any) -> None:
    path = tiny("EffSegBranch")
    result = measured(path, "--detections", "20", "--regions", "7", "--height", "64", "--width", "96")
    model = build_model(load_config(path))
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < result.parameters
    assert (result.name, result.source, result.head) == ("tiny", "measured", "EffSegBranch")
    assert (result.detections, result.regions) == (20, 7)
    assert 0 < result.head_gflops < result.gflops
    assert (result.fps, result.memory, result.ap) == (None, None, None)


@pytest.mark.parametrize("regions", [2, 12, 20])
def test_flops_of_effsegs_head(tiny: Any, regions: int) -> None:
    """The formula of docs/analysis.md, written out for the tiny width and 500 refinements."""
    width, limit, total = 32, 500, 0
    active, passive = 196 * regions, 0
    for number in range(3):
        features = width >> number
        kept = min(active, limit)
        passive += active - kept
        active, half = 4 * kept, features // 2
        total += kept * 4 * features**2  # what tells the children apart
        total += active * (features**2 + (features + width) * features + features**2 + 4 * width)  # fusion, sampling
        total += (active + passive) * features * half  # transition
        total += active * (3 + 27) * half**2  # processing
        total += 2 * active * (half**2 + half)  # classifiers
    result = measured(tiny("EffSegBranch"), "--detections", "20", "--regions", str(regions))
    assert result.head_gflops * 1e9 == pytest.approx(total + linear_layers_at(20, regions), rel=0.06)


def test_masks_by_class_are_made_for_every_detection(tiny: Any) -> None:
    path = tiny("MaskRCNNBranch")
    few, many = (measured(path, "--detections", "20", "--regions", regions) for regions in ("5", "20"))
    assert (few.regions, many.regions) == (20, 20) and few.head_gflops == pytest.approx(many.head_gflops, rel=0.01)


def test_model_without_masks(tiny: Any) -> None:
    result = measured(tiny("none"), "--detections", "20")
    assert (result.head, result.head_gflops, result.regions) == (None, None, None) and result.gflops > 0
    cells = dict(zip(tool.COLUMNS, [c.strip() for c in tool.table([result]).splitlines()[-1].strip("|").split("|")]))
    assert cells["head GFLOPs"] == cells["regions"] == cells["mask AP"] == "–"


def test_mean_over_images(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of what single images cost."""
    path = tiny("EffSegBranch")
    sizes = [(64, 64), (64, 128)]
    items = [{"image": torch.zeros(3, *size), "height": size[0], "width": size[1]} for size in sizes]
    monkeypatch.setattr(tool, "read_images", lambda args, cfg: items[: args.num_images])
    mean = measured(path, "--num-images", "2", "--detections", "5")
    singles = []
    for item in items:
        monkeypatch.setattr(tool, "read_images", lambda args, cfg, item=item: [item])
        singles.append(measured(path, "--num-images", "1", "--detections", "5"))
    assert singles[0].gflops < singles[1].gflops
    for field in ("gflops", "head_gflops"):
        values = [getattr(single, field) for single in singles]
        assert getattr(mean, field) == pytest.approx(sum(values) / 2)


def test_speed_over_images(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images per second of all images, of which each is timed; memory of the first."""
    sizes = [(64, 64), (64, 128), (96, 128)]
    items = [{"image": torch.zeros(3, *size), "height": size[0], "width": size[1]} for size in sizes]
    monkeypatch.setattr(tool, "read_images", lambda args, cfg: items)
    seen = []
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda model, inputs: seen.append(inputs[0]["image"].shape[1:]))
    cfg = load_config(tiny("EffSegBranch"))

    def median_time(run: Any, device: str, repeat: int, warmup: int) -> float:
        run()
        return 10.0 * seen[-1].numel() / (64 * 64)

    monkeypatch.setattr(tool, "median_time", median_time)
    monkeypatch.setattr(tool, "peak_memory", lambda run, device: run() or 12.0)
    assert tool.speed(torch.nn.Identity(), items, cfg, 3) == (pytest.approx(3e3 / (10 + 20 + 30)), 12.0)
    assert [tuple(size) for size in seen] == [*sizes, sizes[0]]


def test_each_of_several_models_is_measured_alone(tiny: Any, tmp_path: Path) -> None:
    paths, rows = [str(tiny("MaskRCNNBranch", "first")), str(tiny("EffSegBranch", "second"))], tmp_path / "rows.json"
    options = ["--detections", "20", "--regions", "7", "--repeat", "1", "--height", "64", "--width", "64"]
    settings = [
        "--opts",
        "MODEL.EFFSEG.NUM_QUERIES",
        "25",
        "MODEL.DEVICE",
        "cpu",
    ]  # other processes find no pretended GPU
    assert tool.main([*paths, *options, "--json", str(rows), *settings]) == 0
    first, second = json.loads(rows.read_text())
    expected = measured(Path(paths[1]), *options[:4], *options[6:], *settings)
    for field in ("name", "parameters", "gflops", "head_gflops", "detections", "regions"):
        assert second[field] == getattr(expected, field), field
    assert first["name"] == "first" and all(row["fps"] > 0 and row["memory"] > 0 for row in (first, second))
    with pytest.raises(SystemExit, match=r"first\.yaml could not be measured"):
        tool.main([*paths, *options, "--opts", "MODEL.EFFSEG.NUM_QUERIES", "3"])


def test_paper_beside_measured(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are marked; the files can be read again, and plotted."""
    path = tiny("EffSegBranch", "effseg_r50")  # the name decides whose numbers are put beside
    monkeypatch.setattr(tool, "peak_memory", lambda run, device: 12.0)  # the real one changes the process for good
    saved, rows = tmp_path / "table.md", tmp_path / "rows.json"
    options = ["--detections", "20", "--repeat", "1", "--height", "64", "--width", "64"]
    assert tool.main([str(path), "--paper", "effseg", "--save", str(saved), "--json", str(rows), *options]) == 0
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in saved.read_text().splitlines()
        if line.startswith("| effseg_r50 ")
    ]
    assert [line[1] for line in lines] == ["paper", "measured"]
    assert lines[0] == ["effseg_r50", "paper", "40.1", "–", "38.8", "245.4", "80.3", "–", "–", "–", "11.30", "–"]
    assert float(lines[1][10]) > 0 and (lines[1][2], lines[1][11]) == ("–", "12")
    said, found = json.loads(rows.read_text())
    assert (said["source"], found["source"]) == ("paper", "measured") and found["fps"] > 0

    output = tmp_path / "plots"
    assert plots.main([str(rows), "--output", str(output), "--ap", "effseg_r50=39.5"]) == 0
    drawn = {"trainable", "gflops", "head_gflops", "parameters", "fps", "memory"}
    assert {p.stem for p in output.iterdir()} == {f"ap_against_{cost}" for cost in drawn}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in output.iterdir())


@pytest.mark.parametrize("table", ["EffSeg Table 3", "EffSeg release"])
def test_models_of_papers_are_configs_of_that_size(table: str) -> None:
    """Trained parameters as published, to a digit; every row has a config."""
    leaves = leaves_of(find_tables(table))
    assert len(leaves) == len(read_tables()[table].rows)
    for leaf in leaves.values():
        trainable = count_parameters(build_on_meta(leaf.config()))[""].trainable
        assert trainable == pytest.approx(costs(leaf.rows)["trainable"], abs=0.06e6), leaf.name


def test_costs_of_a_model_in_several_tables() -> None:
    """Those of the whole model and those of its head; AP of val2017, where test-dev stands beside it."""
    leaf = leaves_of(find_tables("effseg"))["effseg_r50"]
    assert costs(leaf.rows) == {"ap": 40.1, "trainable": 38.8e6, "gflops": 245.4, "fps": 11.3, "head_gflops": 80.3}
    assert costs(leaves_of(find_tables("solq"))["mask_rcnn_r50_fpn_3x"].rows)["ap"] == 37.0
    assert costs(leaves_of(find_tables("SOLQ Table 1"))["mask_rcnn_r50_fpn_3x"].rows)["ap"] == 37.5


def test_figure_of_the_paper_with_measured_models(tmp_path: Path) -> None:
    """EffSeg's Figure 4 from its Table 3, every row a point, and a measured model among them."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"name": "effseg_r50", "source": "measured", "gflops": 250.0, "ap": 39.8}]))
    points = plots.paper_points("EffSeg Table 3")
    assert len(points) == 12 and {point["source"] for point in points} == {"paper"}
    assert {"name": "effseg_r50", "ap": 40.1, "gflops": 245.4, "fps": 11.3, "trainable": 38.8e6}.items() <= {
        key: value for point in points if point["name"] == "effseg_r50" for key, value in point.items()
    }.items()
    axes = plots.draw([*points, *plots.read_points([str(rows)], {})], "gflops").axes[0]
    said, measured = (collection.get_offsets().tolist() for collection in axes.collections)
    assert [245.4, 40.1] in said and [446.3, 40.0] in said and len(said) == 12 and measured == [[250.0, 39.8]]
    output = tmp_path / "plots"
    assert plots.main(["--paper", "EffSeg Table 3", "--output", str(output)]) == 0
    assert {path.stem for path in output.iterdir()} == {f"ap_against_{cost}" for cost in ("trainable", "gflops", "fps")}
    with pytest.raises(SystemExit):
        plots.main(["--output", str(output)])


def test_rows_without_config_are_points() -> None:
    points = {point["name"]: point for point in plots.paper_points("ISTR Table 2")}
    assert points["CondInst, R50-FPN, 36 epochs"] == {
        "name": "CondInst, R50-FPN, 36 epochs", "source": "paper", "ap": 37.8, "fps": 15.4
    }  # fmt: skip
    assert len(points) == 16 and "istr_r50" in points


@pytest.mark.parametrize(
    "arguments",
    [[], ["a.yaml", "--height", "9"], ["a.yaml", "--regions", "101"], ["a.yaml", "--load-weights", "--regions", "5"]],
)
def test_contradicting_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_arguments(arguments)


def test_more_regions_than_queries(tiny: Any) -> None:
    with pytest.raises(ValueError, match="31 regions are asked for, but the model has 30 queries"):
        measured(tiny("EffSegBranch"), "--detections", "31")


def test_plot(tmp_path: Path) -> None:
    points = [
        {"name": "a", "source": "paper", "ap": 40.0, "gflops": 100.0},
        {"name": "a", "source": "measured", "ap": None, "gflops": 120.0, "trainable": 5e6},
        {"name": "b", "source": "measured", "ap": 41.0, "gflops": 150.0, "trainable": None},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(points))
    points = plots.read_points([str(path)], {"a": 39.0})
    axes = plots.draw(points, "gflops").axes[0]
    offsets = [collection.get_offsets().tolist() for collection in axes.collections]
    assert offsets == [[[100, 40]], [[120, 39], [150, 41]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["paper", "measured"]
    assert [text.get_text() for text in axes.texts] == ["a", "a", "b"]
    assert plots.draw(points, "trainable").axes[0].collections[0].get_offsets().tolist() == [[5, 39]]
    assert plots.draw(points, "fps") is None
    with pytest.raises(ValueError, match=r"--ap names \['c'\], but the files measured \['a', 'b'\]"):
        plots.read_points([str(path)], {"c": 1.0})
