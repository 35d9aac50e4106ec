"""Draw AP against what models cost, a plot for every cost (EffSeg's Figure 4, for any models).

    python tools/plot_costs.py [RESULTS.json ...] [--paper NAME ...] --output FOLDER [--ap NAME=VALUE ...]

Result files are those of compare_costs.py --json, with AP in the file or on the command line. --paper adds what tables
of papers say: "EffSeg Table 3" alone gives its Figure 4.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from querymask.command_line import make_parser  # noqa: E402
from querymask.model_zoo import leaves_of  # noqa: E402
from querymask.paper_numbers import costs, find_tables, table_choices  # noqa: E402

COSTS = {
    "parameters": ("parameters (million)", 1e6),
    "trainable": ("trained parameters (million)", 1e6),
    "gflops": ("GFLOPs", 1.0),
    "head_gflops": ("GFLOPs of the segmentation head", 1.0),
    "fps": ("images per second", 1.0),
    "memory": ("peak memory (MiB)", 1.0),
}
"""Fields of a result: label and unit."""
MARKERS = "osD^vP*X"


def read_points(paths: Sequence[str], ap: Mapping[str, float]) -> list[dict[str, Any]]:
    """The results of all files, with the AP of the command line where it names a measured one.

    Raises:
        ValueError: the command line names a model that no file measured, or a file holds no results.
    """
    points = []
    for path in paths:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, list) or not all(
            isinstance(p, dict) and {"name", "source"} <= set(p) for p in content
        ):
            raise ValueError(f"{path} has no results: write it with tools/compare_costs.py --json")
        points += content
    measured = {point["name"] for point in points if point["source"] == "measured"}
    if unknown := sorted(set(ap) - measured):
        raise ValueError(f"--ap names {unknown}, but the files measured {sorted(measured)}")
    return [{**p, "ap": ap[p["name"]]} if p["source"] == "measured" and p["name"] in ap else p for p in points]


def paper_points(name: str) -> list[dict[str, Any]]:
    """What a table says, or all of a source: models by their config, or by their row where there is none."""
    tables = find_tables(name)
    leaves = leaves_of(tables)
    points = [{"name": stem, **costs(leaf.rows)} for stem, leaf in leaves.items()]
    known = {row.reference for leaf in leaves.values() for row in leaf.rows}
    rest = (row for table in tables for row in table.rows if row.reference not in known)
    points += [{"name": ", ".join(row.names), **costs([row])} for row in rest]
    return [{**point, "source": tables[0].mark} for point in points]


def draw(points: Sequence[Mapping[str, Any]], cost: str) -> Figure | None:
    """AP against a cost, with a marker for each source; None if no point has both."""
    points = [point for point in points if point.get("ap") is not None and point.get(cost) is not None]
    if not points:
        return None
    label, unit = COSTS[cost]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    ranked = sorted(point[cost] for point in points)
    middle = (ranked[0] + ranked[-1]) / 2 / unit
    for marker, source in zip(MARKERS, dict.fromkeys(point["source"] for point in points)):
        members = [point for point in points if point["source"] == source]
        x, y = [point[cost] / unit for point in members], [point["ap"] for point in members]
        axes.scatter(x, y, marker=marker, label=source)
        for left, bottom, point in zip(x, y, members):
            side, dx = ("left", 4) if left <= middle else ("right", -4)  # names stay within the plot
            edge, dy = ("top", -4) if ranked.index(point[cost]) % 2 else ("bottom", 4)  # and apart
            place = {"xytext": (dx, dy), "textcoords": "offset points", "ha": side, "va": edge}
            axes.annotate(point["name"], (left, bottom), fontsize=8, **place)
    axes.margins(0.2)
    axes.set_xlabel(label)
    axes.set_ylabel("mask AP")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, draw, write; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of compare_costs.py --json")
    papers = table_choices()
    text = f"papers, releases or single tables of them: {', '.join(papers)}"
    parser.add_argument("--paper", nargs="+", default=[], choices=papers, metavar="NAME", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where plots are written")
    parser.add_argument("--ap", nargs="+", default=[], metavar="NAME=VALUE", help="mask AP of measured models")
    args = parser.parse_args(arguments)
    if not args.files and not args.paper:
        parser.error("name result files, or a paper with --paper")
    try:
        points = read_points(args.files, {name: float(value) for name, _, value in (a.partition("=") for a in args.ap)})
    except ValueError as error:
        parser.error(str(error))
    points = [point for name in args.paper for point in paper_points(name)] + points
    points = list({(point["name"], point["source"]): point for point in points}.values())  # files may have them, too
    figures = {cost: figure for cost in COSTS if (figure := draw(points, cost)) is not None}
    if not figures:
        parser.error('no result has an AP: give it with --ap NAME=VALUE, or as "ap" in the file')
    args.output.mkdir(parents=True, exist_ok=True)
    for cost, figure in figures.items():
        path = args.output / f"ap_against_{cost}.png"
        figure.savefig(path, dpi=150)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
