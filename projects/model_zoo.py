"""The configs of the package, and what their heads say of the models.

What a config is and where its numbers come from stands in the comments at its head:

    # One line whose first sentence says what the model is
    # Paper: row of a table, as querymask.paper_numbers calls it | its numbers, which tools/make_model_zoo.py writes
    # Measured: numbers of this project
    # Weights: whose published file fits, a name of RELEASES, and which it is
    # Any other line is a remark for readers of the config

All but the first line may be missing, and a model may stand for several rows. A file named Base... is no model of its
own.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from querymask.common.engine.checks import get_key
from querymask.common.meta_arch import mask_branch_name
from querymask.config import get_cfg
from querymask.paper_numbers import Row, Table, find_row, read_rows

PACKAGE = Path(__file__).resolve().parent
NOT_PUBLISHED = "none were published"
PAPER_LINE = re.compile(r"^# Paper: (.*?)(?: \|.*)?$", re.MULTILINE)
"""A row at the head of a config, whose reference is the group."""


@dataclass(frozen=True)
class Release:
    """Published files: the page that links them, where they lie, and their format."""

    page: str
    host: str
    format: str


RELEASES = {
    "SOLQ's release": Release(
        "https://github.com/megvii-research/SOLQ",
        "Google Drive",
        "`.pth`, weights under `model`; class heads of 91 rows, indexed by COCO's raw category ids: conversion picks "
        "80",
    ),
    "Deformable DETR's release": Release(
        "https://github.com/fundamentalvision/Deformable-DETR", "Google Drive", "as SOLQ's"
    ),
    "ISTR's release of May 2021": Release(
        "https://github.com/hujiecpp/ISTR",
        "no longer linked: the second release took its place",
        "`.pth` of Detectron2; class heads of 80 rows, COCO's categories in order",
    ),
    "ISTR's release of March 2022": Release(
        "https://github.com/hujiecpp/ISTR", "Baidu, some on Google Drive", "as the first; another network"
    ),
    "EffSeg's release": Release(
        "https://github.com/CedricPicron/DetSeg",
        "a file-sharing drive",
        "`.pth`, weights under `model` beside the optimiser's state; class heads of 81 rows, COCO's 80 in order and "
        '"no object"; of panoptic models 134 rows',
    ),
    "Detectron2's model zoo": Release(
        "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md",
        "fetched by `MODEL.WEIGHTS detectron2://...`",
        "`.pkl` of Detectron2, as they are",
    ),
}
"""What the fact ``Weights`` of a config can begin with; the rest says which file it is."""


@dataclass(frozen=True)
class Leaf:
    """A config and what its head says.

    Attributes:
        method: the folder of the package.
        name: path below the method's configs, without suffix: ``solq_r50``, ``ablations/stages_1``.
        path: the file.
        title: what the model is.
        rows: of the papers, for which it stands.
        facts: the values of ``Measured`` and ``Weights`` where they are given.
    """

    method: str
    name: str
    path: Path
    title: str
    rows: tuple[Row, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    def config(self) -> CfgNode:
        """The config, to be changed freely."""
        return read_config(self.path)


def read_config(path: Path) -> CfgNode:
    """The config of a file, as it is on any machine."""
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def find_configs(package: Path = PACKAGE) -> Iterator[Path]:
    """Every config that is a model: a file named Base... is none."""
    return (path for path in package.glob("*/configs/**/*.yaml") if not path.name.startswith("Base"))


def find_leaves(package: Path = PACKAGE) -> list[Leaf]:
    """Every config that is a model, those with published weights first, then those of the papers, then by name."""
    return sorted((read_leaf(path, package) for path in find_configs(package)), key=_order)


def read_head(path: Path) -> str:
    """The comments at the head of a config."""
    return re.match(r"(?:#.*\n)*", path.read_text())[0]


def write_numbers(head: str) -> str:
    """The head of a config with the numbers of its rows.

    Raises:
        ValueError: there is no such row.
    """
    return PAPER_LINE.sub(lambda line: f"# Paper: {line[1]} | {find_row(line[1]).text}", head)


def read_leaf(path: Path, package: Path) -> Leaf:
    """Read the head of a config.

    Raises:
        ValueError: there is none, or a row that no paper has, or weights of an unknown release.
    """
    head = read_head(path)
    lines = [line.lstrip("# ") for line in head.splitlines()]
    if not lines:
        raise ValueError(f"{path}: its first line must be a comment that says what the model is")
    facts = dict(match.groups() for line in lines if (match := re.match(r"(Measured|Weights): (.*)", line)))
    release = facts.get("Weights", NOT_PUBLISHED).partition(", ")[0]
    if release not in {*RELEASES, NOT_PUBLISHED}:
        raise ValueError(f"{path}: weights of {release}, which is none of {', '.join(RELEASES)}")
    try:
        rows = tuple(map(find_row, PAPER_LINE.findall(head)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    method, _, name = path.relative_to(package).with_suffix("").as_posix().partition("/configs/")
    title = lines[0].partition(". ")[0].rstrip(".")
    return Leaf(method, name, path, title, rows, facts)


def _order(leaf: Leaf) -> tuple[object, ...]:
    folder, _, name = leaf.name.rpartition("/")
    place = list(read_rows()).index(leaf.rows[0].reference) if leaf.rows else 0
    by_value = [part.zfill(6) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return leaf.method, folder, not leaf.rows, "Weights" not in leaf.facts, place, by_value


def leaves_of(tables: Iterable[Table]) -> dict[str, Leaf]:
    """The configs that stand for rows of these tables, by the names of their files, each with these rows alone."""
    names = {table.name for table in tables}
    leaves = {
        leaf.path.stem: replace(leaf, rows=tuple(r for r in leaf.rows if r.table in names)) for leaf in find_leaves()
    }
    return {name: leaf for name, leaf in leaves.items() if leaf.rows}


def fitting_configs(settings: Mapping[str, Any]) -> list[str]:
    """The configs that have these settings, those with the shortest names first, relative to the working folder."""

    def fits(path: Path) -> bool:
        cfg = read_config(path)
        return all(get_value(cfg, key) == value for key, value in settings.items())

    return sorted((os.path.relpath(path) for path in find_configs() if fits(path)), key=lambda path: (len(path), path))


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted config key, with tuples as lists; a method's own mask branch has its name, too."""
    if key == "MODEL.MASK_BRANCH.NAME":
        return mask_branch_name(cfg)
    value = get_key(cfg, key)
    return list(value) if isinstance(value, tuple) else value
