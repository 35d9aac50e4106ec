"""Rules that turn the keys of one state dict into those of another, and the report of what they did."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from tabulate import tabulate
from torch import Tensor

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit; the message names the file or key and the remedy."""


@dataclass
class Entry:
    """One tensor on its way from the file to the model."""

    source: str  # its key in the file
    target: str  # its key so far
    value: Tensor
    notes: list[str] = field(default_factory=list)
    dropped: bool = False


@dataclass(frozen=True)
class Rename:
    """Replaces the part of a key that ``pattern`` matches, as ``re.sub`` does."""

    pattern: str
    replacement: str | Callable[[re.Match[str]], str]

    def apply(self, entry: Entry, match: re.Match[str], entries: Mapping[str, Entry]) -> None:
        entry.target = re.sub(self.pattern, self.replacement, entry.target)


@dataclass(frozen=True)
class Drop:
    """Leaves out the keys that ``pattern`` matches; ``reason`` goes into the report."""

    pattern: str
    reason: str

    def apply(self, entry: Entry, match: re.Match[str], entries: Mapping[str, Entry]) -> None:
        entry.dropped = True
        entry.notes.append(self.reason)


@dataclass(frozen=True)
class Copy:
    """Leaves out keys that repeat another one, because the file stores a shared module several times.

    ``original`` is a template in the syntax of ``re.Match.expand``. Tensors that are not equal are an error: the
    modules were not shared then.
    """

    pattern: str
    original: str

    def apply(self, entry: Entry, match: re.Match[str], entries: Mapping[str, Entry]) -> None:
        name = match.expand(self.original)
        if name not in entries:
            raise CheckpointError(
                f"'{entry.source}' should repeat '{name}', which the file does not have: the file is incomplete."
            )
        original = entries[name]
        if not torch.equal(entry.value, original.value):
            raise CheckpointError(
                f"'{entry.source}' differs from '{original.source}', but in this model both are the same module. "
                "The file is damaged, or it was made by a model that does not share them, which cannot be converted."
            )
        entry.dropped = True
        entry.notes.append(f"equal copy of {original.source}")


@dataclass(frozen=True)
class Change:
    """Replaces the value of the keys that ``pattern`` matches; ``note`` goes into the report."""

    pattern: str
    function: Callable[[Tensor], Tensor]
    note: str

    def apply(self, entry: Entry, match: re.Match[str], entries: Mapping[str, Entry]) -> None:
        entry.value = self.function(entry.value)
        entry.notes.append(self.note)


Rule = Rename | Drop | Copy | Change


@dataclass(frozen=True)
class Line:
    """What became of one key. ``source`` is empty for a missing or new one, ``target`` for a dropped one."""

    status: str
    source: str
    target: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What became of every key of a file and, after ``fit_to_model``, of every key of the model."""

    lines: tuple[Line, ...]

    # What each status means, in the order of the table
    STATUSES: ClassVar[dict[str, str]] = {
        "used": "kept under its name",
        "renamed": "kept under the model's name",
        "dropped": "left out, for the reason given",
        "new": "in the model only, as asked: keeps its initial value",
        "missing": "in the model, not in the file",
        "unexpected": "in the file, not in the model",
        "mismatch": "of another shape in the model",
    }
    MISFITS: ClassVar[tuple[str, ...]] = ("missing", "unexpected", "mismatch")

    def of(self, *statuses: str) -> list[Line]:
        """The lines with one of these statuses."""
        return [line for line in self.lines if line.status in statuses]

    @property
    def fits(self) -> bool:
        """Whether the model gets every key it has, and no other."""
        return not self.of(*self.MISFITS)

    def summary(self) -> str:
        """A table with one row a status: how many keys, and what it means."""
        counts = Counter(line.status for line in self.lines)
        rows = [(status, counts[status], meaning) for status, meaning in self.STATUSES.items()]
        return tabulate(rows, headers=["status", "keys", "meaning"], tablefmt="pipe")

    def details(self, *statuses: str, limit: int | None = None) -> str:
        """A table with one row a key: all of them or those of the given statuses, at most ``limit``."""
        lines = self.of(*(statuses or self.STATUSES))
        rows = [(line.status, line.source, line.target, line.note) for line in lines[:limit]]
        headers = ["status", "key in the file", "key in the model", "note"]
        more = f"\n... and {len(lines) - len(rows)} more" if len(rows) < len(lines) else ""
        return tabulate(rows, headers=headers, tablefmt="pipe") + more


def apply_rules(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> tuple[State, Report]:
    """Send every key through all rules, in their order; a rule sees the names that the rules before it made.

    Args:
        state: the tensors of a file by key.
        rules: a pattern of a rule is searched in the key, so it is anchored where it must be.

    Returns:
        the tensors by their new key, and a report with the statuses used, renamed and dropped.

    Raises:
        CheckpointError: two keys get the same name, or a ``Copy`` is none.
    """
    everything = [Entry(key, key, value) for key, value in state.items()]
    entries = {entry.target: entry for entry in everything}
    for rule in rules:
        for entry in entries.values():
            match = re.search(rule.pattern, entry.target)
            if match:
                rule.apply(entry, match, entries)
        entries = _by_target(entry for entry in everything if not entry.dropped)

    def line(entry: Entry) -> Line:
        note = ", ".join(entry.notes)
        if entry.dropped:
            return Line("dropped", entry.source, "", note)
        return Line("used" if entry.source == entry.target else "renamed", entry.source, entry.target, note)

    return {key: entry.value for key, entry in entries.items()}, Report(tuple(line(entry) for entry in everything))


def _by_target(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries by their present key, which must be unique."""
    result: dict[str, Entry] = {}
    for entry in entries:
        if entry.target in result:
            raise CheckpointError(
                f"'{result[entry.target].source}' and '{entry.source}' both become '{entry.target}': "
                "the file mixes two formats and cannot be converted."
            )
        result[entry.target] = entry
    return result


def fit_to_model(
    state: Mapping[str, Tensor], report: Report, shapes: Mapping[str, Sequence[int]], new: str | None = None
) -> tuple[State, Report]:
    """Compare converted tensors with what a model expects.

    Args:
        state, report: what ``apply_rules`` returned.
        shapes: the model's state dict as key -> shape.
        new: pattern of the model's keys that the file need not have.

    Returns:
        the tensors that the model can take, and the report completed by new, missing, unexpected and mismatch.
    """
    lines = []
    for line in report.lines:
        if line.target and line.target not in shapes:
            line = replace(line, status="unexpected")
        elif line.target and tuple(state[line.target].shape) != tuple(shapes[line.target]):
            note = f"{tuple(state[line.target].shape)} in the file, {tuple(shapes[line.target])} in the model"
            line = replace(line, status="mismatch", note=note)
        lines.append(line)
    for key, shape in shapes.items():
        if key not in state:
            lines.append(Line("new" if new and re.search(new, key) else "missing", "", key, str(tuple(shape))))
    report = Report(tuple(lines))
    return {line.target: state[line.target] for line in report.of("used", "renamed")}, report
