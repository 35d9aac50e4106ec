"""The numbers of the papers and their releases: tables, whose rows configs name at their heads.

They stand in ``paper_numbers.yaml``. A row is referred to by its table and its names: ``ISTR Table 2, ISTR, R50-FPN, 36
epochs``.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).resolve().parent / "paper_numbers.yaml"
MISSING = "–"

COSTS = {
    "mask AP": ("ap", 1.0),
    "trained parameters (M)": ("trainable", 1e6),
    "GFLOPs": ("gflops", 1.0),
    "head GFLOPs": ("head_gflops", 1.0),
    "FPS": ("fps", 1.0),
}
"""Columns that tools/compare_costs.py measures, too: what it calls them, and their unit."""


@dataclass(frozen=True)
class Table:
    """A table of a paper, or the list of models of a release.

    Attributes:
        name: ``ISTR Table 2``, ``ISTR release``.
        about: what it varies, and under which conditions.
        split: of COCO; None: not stated.
        names: columns that name a row.
        numbers: the other columns.
        rows: in the paper's order.
    """

    name: str
    about: str
    split: str | None
    names: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple["Row", ...]

    @property
    def source(self) -> str:
        """Whose numbers they are: ``istr``, ``istr_release``."""
        return re.sub(r" Table .*", "", self.name).lower().replace(" ", "_")

    @property
    def mark(self) -> str:
        """What marks its numbers beside measured ones: ``paper`` or ``release``."""
        return "release" if self.name.endswith(" release") else "paper"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: its table's name.
        names: a cell for each of the table's ``names``.
        values: by column; columns of which the paper has no number are missing.
        split: of the table.
    """

    table: str
    names: tuple[str, ...]
    values: Mapping[str, float]
    split: str | None

    @property
    def reference(self) -> str:
        """How configs name the row."""
        return ", ".join((self.table, *self.names))

    @property
    def text(self) -> str:
        """All its numbers in one line: ``val2017 mask AP 34.2, AP50 55.6, box AP 41.0``."""
        words, before = [], ""
        for column, value in self.values.items():
            task, _, metric = column.rpartition(" ")
            words.append(f"{column if task != before or not metric.startswith('AP') else metric} {value}")
            before = task
        return f"{self.split or 'split not stated:'} {', '.join(words)}"


@functools.cache
def read_tables() -> Mapping[str, Table]:
    """All tables by name."""
    tables = {}
    for name, content in yaml.safe_load(FILE.read_text()).items():
        names, numbers, split = tuple(content["names"]), tuple(content["numbers"]), content["split"]
        rows = []
        for cells in content["rows"]:
            if len(cells) != len(names) + len(numbers):
                raise ValueError(f"{FILE}: {name} has {len(names) + len(numbers)} columns, and a row {cells}")
            called = tuple(f"{cell} epochs" if key == "epochs" else str(cell) for key, cell in zip(names, cells))
            values = {key: value for key, value in zip(numbers, cells[len(names) :]) if value is not None}
            rows.append(Row(name, called, values, split))
        tables[name] = Table(name, content["about"], split, names, numbers, tuple(rows))
    return tables


@functools.cache
def read_rows() -> Mapping[str, Row]:
    """All rows by reference, in the order of the file."""
    return {row.reference: row for table in read_tables().values() for row in table.rows}


def find_row(reference: str) -> Row:
    """The row of this reference.

    Raises:
        ValueError: there is none; naming those that come near.
    """
    rows = read_rows()
    if reference not in rows:
        near = difflib.get_close_matches(reference, rows, n=3, cutoff=0.4)
        raise ValueError(f"{FILE.name} has no row {reference!r}; near it are {near}")
    return rows[reference]


def find_tables(name: str) -> list[Table]:
    """The table of this name, or all tables of this source."""
    return [table for table in read_tables().values() if name in (table.name, table.source)]


def table_choices() -> list[str]:
    """What ``find_tables`` knows: sources, then tables."""
    tables = read_tables()
    return [*sorted({table.source for table in tables.values()}), *tables]


def costs(rows: Iterable[Row]) -> dict[str, float]:
    """What rows of one model say of costs and of AP, on val2017 if they can, by the names of tools/compare_costs.py."""
    return {
        field: row.values[column] * unit
        for row in sorted(rows, key=lambda row: row.split == "val2017")
        for column, (field, unit) in COSTS.items()
        if column in row.values
    }
