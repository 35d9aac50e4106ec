"""What a run has found so far: ``results.json``, written anew after every row, and ``report.md`` made from it."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Cell = str | int | float | None
Record = dict[str, Any]


class Results:
    """The results of all parts, kept in a folder.

    Args:
        folder: made where it does not exist.
        resume: keep what an earlier run has left there.
    """

    def __init__(self, folder: Path, resume: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.json"
        self.parts: dict[str, Record] = {}
        if resume:
            self.read()

    def read(self) -> None:
        """Take over what another process has written."""
        if self.file.exists():
            self.parts = json.loads(self.file.read_text())

    def put(self, name: str, **fields: Any) -> None:
        """Set fields of a part, and write."""
        self.parts.setdefault(name, {}).update(fields)
        self.write()

    def write(self) -> None:
        """Write both files; each is whole at any time."""
        for path, text in ((self.file, json.dumps(self.parts, indent=1)), (self.folder / "report.md", render(self))):
            new = path.with_name(f".{path.name}.new")
            new.write_text(text)
            os.replace(new, path)

    @property
    def failed(self) -> list[str]:
        """The parts that a failure was noted in."""
        return [name for name, part in self.parts.items() if part.get("failures")]


class Part:
    """What a part writes its findings to.

    Args:
        seconds: after how many the part should come to its end.
    """

    def __init__(self, results: Results, name: str, seconds: float) -> None:
        self.results, self.name = results, name
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.record: Record = {"state": "running", "seconds": 0.0, "notes": [], "tables": [], "failures": []}
        results.parts[name] = self.record
        results.write()

    def time_left(self) -> float:
        """Seconds; negative when the time is up."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Write what was found so far."""
        self.record["seconds"] = round(time.monotonic() - self.start, 1)
        self.results.write()

    def note(self, text: str) -> None:
        """A paragraph above the part's tables."""
        print(text, flush=True)
        self.record["notes"].append(text)
        self.save()

    def table(self, title: str, *columns: str) -> Callable[..., None]:
        """Start a table; returns the function that adds a row to it; cells that are not given stay empty."""
        rows: list[tuple[Cell, ...]] = []
        self.record["tables"].append({"title": title, "columns": columns, "rows": rows})

        def add(*cells: Cell) -> None:
            if len(cells) > len(columns):
                raise ValueError(f"{len(cells)} cells for the {len(columns)} columns of {title!r}")
            rows.append((*cells, *[None] * (len(columns) - len(cells))))
            print(f"{title}: " + " | ".join(map(show, cells)), flush=True)
            self.save()

        return add

    def fail(self, what: str, text: str) -> None:
        """Note a failure; the part goes on, the run ends with an exit status of 1."""
        print(f"FAILED: {what}\n{text}", flush=True)
        self.record["failures"].append({"what": what, "text": text})
        self.save()

    def is_over(self, row: Callable[..., None], *labels: Cell) -> bool:
        """Whether the time is up; if so, a row says so."""
        over = self.time_left() <= 0
        if over:
            row(*labels, "skipped: the time is up")
        return over

    @contextmanager
    def attempt(self, what: str, row: Callable[..., None] | None = None, *labels: Cell) -> Iterator[None]:
        """An error inside is noted as a failure and goes no further; a row tells its first line."""
        try:
            yield
        except Exception as error:
            self.fail(what, traceback.format_exc())
            if row is not None:
                row(*labels, f"failed: {first_line(error)}")

    def finish(self) -> None:
        """The last thing that a part does: say whether it has done all."""
        if self.record["failures"]:
            self.record["state"] = "failed"
        else:
            self.record["state"] = "incomplete" if self.time_left() <= 0 else "done"
        self.save()


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text, for a cell of a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def show(cell: Cell) -> str:
    """A cell as text."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def render(results: Results) -> str:
    """The report in Markdown: a summary, then all parts."""
    device = next((part["device"] for part in results.parts.values() if part.get("device")), "no device")
    lines = [f"# {device}", "", "Written by `benchmarks/gpu.py`.", "", "| part | state | seconds |", "|---|---|---:|"]
    for name, part in results.parts.items():
        state = part.get("state", "")
        if part.get("failures"):
            state += f", {len(part['failures'])} failure(s)"
        if part.get("reason"):
            state += f": {part['reason']}"
        lines.append(f"| {name} | {show(state)} | {show(part.get('seconds'))} |")
    for name, part in results.parts.items():
        lines += ["", f"## {name}"]
        for note in part.get("notes", []):
            lines += ["", note]
        for table in part.get("tables", []):
            lines += ["", f"### {table['title']}", "", *render_table(table)]
        for failure in part.get("failures", []):
            lines += ["", f"### Failure: {failure['what']}", "", "```", failure["text"].rstrip(), "```"]
    return "\n".join([*lines, ""])


def render_table(table: Mapping[str, Any]) -> list[str]:
    """Its lines; columns of numbers are aligned at the right. Without tabulate, which may not be installed yet."""
    rows, columns = table["rows"], table["columns"]
    numbers = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if n else "---" for n in numbers) + "|"]
    return lines + ["| " + " | ".join(map(show, row)) + " |" for row in rows]
