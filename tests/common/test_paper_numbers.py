"""The papers' numbers: tables agree with each other, rows with the configs that stand for them, heads with the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

from querymask import paper_numbers
from querymask.common.meta_arch import mask_branch_name
from querymask.model_zoo import Leaf, find_leaves, read_head, write_numbers
from querymask.paper_numbers import find_row, read_rows, read_tables

LEAVES = find_leaves()
BY_ROW = {row.reference: leaf for leaf in LEAVES for row in leaf.rows}
IMAGES = 118_287  # of train2017, some 1,000 of them without annotations
# Of other authors, as the papers call them, without a config here
OTHERS = {
    "SOLO", "SOLOv2", "CondInst", "BlendMask", "Cascade Mask R-CNN", "HTC", "MEInst", "QueryInst", "DCT-Mask", "DETR",
    "Sparse R-CNN",
}  # fmt: skip
# The same model in two tables of a paper, or of two papers
SAME = [
    ("ISDA Table 1, 1/4", "ISDA Table 2, MP+KP"),
    ("SOLQ Table 3a, DCT", "SOLQ Table 3c, 6"),
    ("SOLQ Table 3d, 128", "SOLQ Table 3c, 6"),
    ("SOLQ Table 3e, 256", "SOLQ Table 3c, 6"),
    ("ISTR Table 1a, l=60", "ISTR Table 1b, cosine"),
    ("ISTR Table 1d, dynamic", "ISTR Table 1e, both, avg"),
    ("ISTR Table 1c, both", "ISTR Table 1e, both, avg"),
    ("ISTR Table 1a, l=60", "ISTR Table 1e, both, avg"),
    ("ISTR Table 2, ISTR, R50-FPN, 36 epochs", "SOLQ Table 1, ISTR, R50-FPN, 36 epochs"),
    ("ISTR Table 2, ISTR, R101-FPN, 36 epochs", "SOLQ Table 1, ISTR, R101-FPN, 36 epochs"),
    ("ISTR Table 2, Mask R-CNN, R50-FPN, 36 epochs", "SOLQ Table 1, Mask R-CNN, R50-FPN, 36 epochs"),
    ("EffSeg Table 5, SFM", "EffSeg Table 3, EffSeg, R50+FPN, 12 epochs"),
    ("SOLQ release, R50", "SOLQ Table 1, SOLQ, R50, 50 epochs"),
    ("SOLQ release, R101", "SOLQ Table 1, SOLQ, R101, 50 epochs"),
    ("SOLQ release, Swin-L, longest side 1536", "SOLQ Table 1, SOLQ, Swin-L, 50 epochs"),
]


@pytest.mark.parametrize("pair", SAME, ids=" = ".join)
def test_tables_agree(pair: tuple[str, str]) -> None:
    """Where two tables have the same model they have the same numbers."""
    first, second = (find_row(reference).values for reference in pair)
    shared = set(first) & set(second)
    assert len(shared) > 1 and {key: first[key] for key in shared} == {key: second[key] for key in shared}


def test_what_heads_save_follows_from_what_they_cost() -> None:
    """EffSeg's Table 4 has percentages beside the numbers that they are of."""
    rows = read_tables()["EffSeg Table 4"].rows
    (reference,) = (row.values for row in rows if row.names == ("RefineMask++",))
    for row in rows:
        for cost, saved in (("head parameters (M)", "fewer parameters (%)"), ("head GFLOPs", "fewer GFLOPs (%)")):
            assert 100 * (1 - row.values[cost] / reference[cost]) == pytest.approx(row.values[saved], abs=0.6), row
        assert 100 * (row.values["head FPS"] / reference["head FPS"] - 1) == pytest.approx(
            row.values["more FPS (%)"], abs=0.6
        )


def test_time_follows_from_speed() -> None:
    for row in read_tables()["ISTR Table 2"].rows:
        if "FPS" in row.values:
            assert 1000 / row.values["FPS"] == pytest.approx(row.values["ms per image"], rel=0.01), row.reference


def test_ap_of_sizes_surrounds_their_mean() -> None:
    """A digit that is out of place is found where AP is not between that of small and of large objects."""
    for row in read_rows().values():
        for task in ("mask", "box"):
            values = row.values
            if f"{task} APl" in values:
                assert values[f"{task} APs"] < values[f"{task} APm"] < values[f"{task} APl"], row.reference
                assert values[f"{task} APs"] < values[f"{task} AP"] < values[f"{task} APl"], row.reference
            if f"{task} AP50" in values:
                assert values[f"{task} AP"] < values[f"{task} AP50"], row.reference


def test_every_row_has_its_config_or_is_of_others() -> None:
    for table in read_tables().values():
        if not table.name.endswith("release") and table.names[0] == "method":
            without = {row.names[0] for row in table.rows if row.reference not in BY_ROW}
            own = {"ISTR"} if table.source != "istr" else set()  # as cited by the other papers
            own |= {"Mask R-CNN"} if table.source == "isda" else set()  # trained otherwise than Detectron2's
            assert without <= OTHERS | own, table.name
        elif not table.name.endswith("release"):
            assert not [row.reference for row in table.rows if row.reference not in BY_ROW], table.name


def test_a_row_has_one_config() -> None:
    references = [row.reference for leaf in LEAVES for row in leaf.rows]
    assert len(references) == len(set(references)) > 90


def depth(cfg: CfgNode) -> str:
    return "Swin-L" if "swin" in cfg.MODEL.BACKBONE.NAME else f"R{cfg.MODEL.RESNETS.DEPTH}"


@pytest.mark.parametrize("reference", [reference for reference in BY_ROW if reference.endswith("epochs")])
def test_schedule_and_backbone_are_the_rows(reference: str) -> None:
    row, cfg = find_row(reference), BY_ROW[reference].config()
    name, backbone, epochs = row.names
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / IMAGES == pytest.approx(float(epochs.split()[0]), rel=0.03)
    assert depth(cfg) == backbone.partition("+")[0].removesuffix("-FPN")
    if row.table == "EffSeg Table 3":
        assert cfg.MODEL.EFFSEG.NECK == {"FPN": "fpn", "DefEnc": "deform_encoder"}[backbone.partition("+")[2]]
        branches = {
            "EffSeg": "EffSegBranch",
            "Mask R-CNN++": "MaskRCNNBranch",
            "PointRend++": "PointRendBranch",
            "RefineMask++": "RefineMaskBranch",
        }
        assert (mask_branch_name(cfg), cfg.MODEL.EFFSEG.VERSION) == (branches[name], 1)
    if row.table.startswith("SOLQ") and cfg.MODEL.META_ARCHITECTURE == "SOLQ":
        parts = {"SOLQ": "VectorBranch", "UQR": "VectorBranch", "SQR": "SQRBranch"}
        assert mask_branch_name(cfg) == parts.get(name.rpartition("+")[2], "none")
        # D-DETR without the asterisk is as its own authors trained it
        assert cfg.SOLVER.IMS_PER_BATCH == (16 if row.table == "SOLQ Table 2" and name != "D-DETR" else 32)


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "ISDA Table 1": lambda model: f"1/{model.MASK_BRANCH.KERNEL.MASK_STRIDE}",
    "SOLQ Table 3b": lambda model: f"{model.MASK_BRANCH.VECTOR.WEIGHT:g}",
    "SOLQ Table 3c": lambda model: str(model.SOLQ.DEC_LAYERS - model.MASK_BRANCH.VECTOR.START_LAYER),
    "SOLQ Table 3d": lambda model: str(model.MASK_CODING.SIZE),
    "SOLQ Table 3e": lambda model: str(model.MASK_CODING.LENGTH),
    "ISTR Table 1a": lambda m: "mask" if m.MASK_BRANCH.NAME == "PixelBranch" else f"l={m.MASK_CODING.LENGTH}",
    "ISTR Table 1b": lambda model: model.MASK_BRANCH.CODE.COST.replace("l1", "L1"),
    "ISTR Table 1d": lambda model: model.ISTR.ATTENTION.replace("_", "-"),
    "EffSeg Table 5": lambda model: {
        "mlp": "MLP", "conv": "Conv", "deform_conv": "DeformConv", "sfm": "SFM", "dense_sfm": "Dense SFM"
    }[model.MASK_BRANCH.EFFSEG.PROCESSING],
}  # fmt: skip


@pytest.mark.parametrize("table", SETTINGS)
def test_setting_is_the_rows(table: str) -> None:
    for row in read_tables()[table].rows:
        assert (SETTINGS[table](BY_ROW[row.reference].config().MODEL),) == row.names


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: f"{leaf.method}/{leaf.name}")
def test_heads_have_the_papers_numbers(leaf: Leaf) -> None:
    assert read_head(leaf.path) == write_numbers(read_head(leaf.path)), "run tools/make_model_zoo.py --keep-gflops"


def test_heads_are_written() -> None:
    """The numbers behind a reference are put right, and nothing else is touched."""
    row = "# Paper: SOLQ Table 3b, 0.3 | val2017 mask AP 25.2, AP50 51.0, AP75 22.2, box AP 39.3, AP50 59.9, AP75 41.8"
    for line in (row, "# Paper: SOLQ Table 3b, 0.3", "# Paper: SOLQ Table 3b, 0.3 | val2017 mask AP 99.9"):
        assert write_numbers(f"# A model\n{line}\n# Measured: a | b\n") == f"# A model\n{row}\n# Measured: a | b\n"


def test_a_row_that_no_paper_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "solq" / "configs" / "other.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# A model\n# Paper: SOLQ Table 3b, 0.5 | mask 99\nMODEL: {}\n")
    with pytest.raises(ValueError, match=r"other\.yaml: .* no row 'SOLQ Table 3b, 0\.5'; near it are \['SOLQ Table 3b"):
        find_leaves(tmp_path)


def test_text_of_a_row() -> None:
    row = find_row("EffSeg Table 3, PointRend++, R50+DefEnc, 12 epochs")
    assert row.text == (
        "val2017 mask AP 41.5, AP50 62.0, AP75 45.0, APs 22.3, APm 44.2, APl 60.9, test-dev2017 mask AP 42.5, "
        "mask AP* 44.3, APB* 33.7, trained parameters (M) 45.3, GFLOPs 387.4, FPS 8.7"
    )
    assert find_row("ISTR release, SMT, R50").text == "split not stated: box AP 47.4, mask AP 41.7"


def test_a_row_of_another_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"about": "x", "split": "val2017", "names": ["method"], "numbers": ["mask AP"], "rows": [["a", 1.0, 2.0]]}
    path = tmp_path / "numbers.yaml"
    path.write_text(json.dumps({"Some Table 1": table}))  # JSON is YAML
    monkeypatch.setattr(paper_numbers, "FILE", path)
    with pytest.raises(ValueError, match=r"Some Table 1 has 2 columns, and a row \['a', 1\.0, 2\.0\]"):
        read_tables.__wrapped__()
