"""Write docs/model_zoo.md, one row per config, the methods' tables of ablations and of other methods, and config heads.

    python tools/make_model_zoo.py [--keep-gflops]

What a config is stands at its head: see querymask.model_zoo. The head names rows of the papers, whose numbers, from
querymask.paper_numbers, are written behind them. Parameters and FLOPs are measured.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from querymask.command_line import load_config, make_parser
from querymask.common.engine.unused_keys import leaves as keys_of
from querymask.common.flops import count_parameters, measure
from querymask.common.measured_models import build_on_meta, random_image, random_model
from querymask.effseg.effseg import EffSeg
from querymask.effseg.measuring import force_detections
from querymask.model_zoo import RELEASES, Leaf, find_leaves, read_config, read_head, write_numbers
from querymask.paper_numbers import MISSING, Table, read_tables

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "model_zoo.md"
COLUMNS = ("Config", "Model", "Paper", "Measured here", "Parameters", "Trainable", "GFLOPs", "Weights")
# FLOPs are those of one image of this size, COCO's usual 480x640 at a shorter side of 800
HEIGHT, WIDTH = 800, 1066

INTRODUCTION = f"""# Model zoo

Written by `tools/make_model_zoo.py` from the configs; change those and run it again.

A row is a config, with the rows of the papers that it stands for. **Numbers in the column "Paper" are the authors',
with their own code; they were not measured here.** "Measured here" holds what this project reached itself. Parameters,
with the data set's own number of classes and without frozen batch norms, are measured, and so are GFLOPs: multiply-adds
of inference on one image of {HEIGHT}x{WIDTH}, those of EffSeg with as many different queries as detections, also for
panoptic maps, which are made of more or fewer. Time and memory on a GPU: [gpu.md](gpu.md).
"""

ABLATIONS, COMPARISONS = "ablations", "comparisons"
"""What is written into a method's page, each between two comments."""

USAGE = """## Training and evaluation

For any row, with the data in place ([data.md](data.md)):

```
CONFIG=projects/solq/configs/solq_r50.yaml
uv run train_net.py --num-gpus 8 --config-file $CONFIG OUTPUT_DIR output/solq_r50
uv run train_net.py --config-file $CONFIG --eval-only MODEL.WEIGHTS output/solq_r50/model_final.pth
```

A published file is converted once ([checkpoints.md](checkpoints.md)):

```
uv run tools/convert_checkpoint.py --config-file $CONFIG solq_r50_final.pth weights/solq_r50.pth
uv run train_net.py --config-file $CONFIG --eval-only MODEL.WEIGHTS weights/solq_r50.pth
```

## Published weights

Names in the column "Weights" link to the page from which their authors link the files.

{releases}

Training starts from a backbone:

- ResNet: torchvision's weights in Detectron2's format, `detectron2://ImageNetPretrained/torchvision/R-50.pkl` and
  `R-101.pkl`, which Detectron2 fetches by itself. torchvision's own files do as well after conversion.
- Swin-L: `swin_large_patch4_window7_224_22k.pth`, linked from the read-me of
  [microsoft/Swin-Transformer](https://github.com/microsoft/Swin-Transformer), converted to the path in the config:

```
uv run tools/convert_checkpoint.py --config-file projects/solq/configs/solq_swin_l.yaml \\
    swin_large_patch4_window7_224_22k.pth weights/swin_large_patch4_window7_224_22k.pth
```

  ISTR's Swin-L starts from the file for 384 pixels and window 12, `swin_large_patch4_window12_384_22k.pth`, in the same
  way.
- ISTR's PCA and autoencoder, SOLQ's PCA and sparse coding need a basis to be trained from a backbone,
  `MODEL.MASK_CODING.BASIS`: see [ISTR's page](../projects/istr/README.md) and [SOLQ's](../projects/solq/README.md).
"""


def measure_gflops(leaves: Sequence[Leaf]) -> Iterator[tuple[str, str]]:
    """Names of configs with their cells of the GFLOPs column; equal networks are measured once."""
    by_network: dict[str, str] = {}
    for leaf in leaves:
        network = repr(build_on_meta(leaf.config()))
        if network not in by_network:
            cfg = load_config(leaf.path, device="cpu")
            model = random_model(cfg)
            if isinstance(model, EffSeg):
                force_detections(model, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.DETECTIONS_PER_IMAGE)
            cost = measure(model, random_image(HEIGHT, WIDTH))
            by_network[network] = f"{cost.flops_by_module[''] / 1e9:.1f}"
        yield leaf.name, by_network[network]


def row(leaf: Leaf, gflops: str) -> tuple[str, ...]:
    """The cells of a config's row, in the order of ``COLUMNS``."""
    parameters = count_parameters(build_on_meta(leaf.config()))[""]
    weights = link_release(leaf.facts["Weights"]) if "Weights" in leaf.facts else MISSING
    link = f"[{leaf.name}](../projects/{leaf.method}/configs/{leaf.name}.yaml)"
    measured = leaf.facts.get("Measured", MISSING).replace(" | ", "<br>")
    return (
        link,
        leaf.title,
        paper_cell(leaf),
        measured,
        f"{parameters.total:,}",
        f"{parameters.trainable:,}",
        gflops,
        weights,
    )


def paper_cell(leaf: Leaf) -> str:
    """The rows that a config stands for, with their numbers."""
    return "<br>".join(f"{row.reference}<br>{row.text}" for row in leaf.rows) or MISSING


def link_release(weights: str) -> str:
    """The cell of the fact ``Weights``."""
    name, _, which = weights.partition(", ")
    return f"[{name}]({RELEASES[name].page}), {which}" if name in RELEASES else weights


def render_releases() -> str:
    """The table of ``RELEASES``."""
    rows = [[f"[{name}]({release.page})", release.host, release.format] for name, release in RELEASES.items()]
    return tabulate(rows, headers=("Name", "Files", "Format"), tablefmt="github")


def render(leaves: Sequence[Leaf], gflops: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        leaves: in the order of the rows.
        gflops: cells of that column by name of the config.
    """
    sections: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        folder = leaf.name.rpartition("/")[0]
        sections.setdefault(f"{_heading(leaf.method)}{folder and ': '}{folder}", []).append(leaf)
    parts = [INTRODUCTION]
    for title, members in sections.items():
        rows = [row(leaf, gflops.get(leaf.name, MISSING)) for leaf in members]
        parts.append(f"## {title}\n\n{table_of(rows, COLUMNS)}\n")
    return "\n".join([*parts, USAGE.replace("{releases}", render_releases())])


def table_of(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """A table without alignment, and so without the width of the widest cell in every row."""
    return tabulate(rows, columns, tablefmt="github", stralign=None, numalign=None, disable_numparse=True)


def render_ablations(page: str, leaves: Sequence[Leaf]) -> str:
    """A method's page with the table of its ablations: what they change of the base that they share.

    Args:
        page: its text, with the comments between which the table stands.
        leaves: of the method, in the order of the rows.
    """
    ablations = [leaf for leaf in leaves if leaf.name.startswith("ablations/")]
    (base,) = {first_base(leaf.path) for leaf in ablations}
    folder = ROOT / "projects" / leaves[0].method
    shared = dict(keys_of(read_config(base)))
    link = f"[{base.stem}]({base.relative_to(folder).as_posix()})"
    rows = []
    for leaf in ablations:
        own = {key: value for key, value in keys_of(leaf.config()) if value != shared[key] and key != "OUTPUT_DIR"}
        changes = ", ".join(f"`{key.removeprefix('MODEL.')} {value}`" for key, value in own.items())
        name = f"[{leaf.path.stem}]({leaf.path.relative_to(folder).as_posix()})"
        rows.append((name, changes or "nothing", paper_cell(leaf)))
    return replace_part(page, ABLATIONS, table_of(rows, ("Config", f"Instead of what {link} has", "Paper")))


def render_comparisons(page: str, method: str, leaves: Sequence[Leaf]) -> str:
    """A method's page with the tables in which its paper compares it with methods of others.

    Args:
        page: its text, with the comments between which the tables stand.
        method: folder of the method.
        leaves: of all methods: rows that one stands for are linked to it.
    """
    folder = ROOT / "projects" / method
    links = {row.reference: os.path.relpath(leaf.path, folder) for leaf in leaves for row in leaf.rows}

    def render_table(table: Table) -> str:
        rows = []
        for row in table.rows:
            name, *rest = row.names
            link = f"[{name}]({links[row.reference]})" if row.reference in links else name
            rows.append((link, *rest, *(str(row.values.get(column, MISSING)) for column in table.numbers)))
        headers = [word[:1].upper() + word[1:] for word in (*table.names, *table.numbers)]
        return f"**{table.name}**, {table.split}. {table.about}.\n\n{table_of(rows, headers)}"

    tables = [table for table in read_tables().values() if table.source == method and table.names[0] == "method"]
    return replace_part(page, COMPARISONS, "\n\n".join(map(render_table, tables)))


def replace_part(page: str, part: str, text: str) -> str:
    """A page with another text between the two comments of a part.

    Raises:
        ValueError: the page does not have the comments, once.
    """
    begin, end = (f"<!-- {word} of {part}, written by tools/make_model_zoo.py -->" for word in ("Begin", "End"))
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page {page.partition(chr(10))[0]!r} must have the lines {begin!r} and {end!r} once")
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def first_base(path: Path) -> Path:
    """The first file named Base... from which a config inherits."""
    while not path.name.startswith("Base"):
        bases = yaml.safe_load(path.read_text())["_BASE_"]
        path = (path.parent / (bases if isinstance(bases, str) else bases[0])).resolve()
    return path


def _heading(method: str) -> str:
    """The name of a method as its own page has it."""
    return (ROOT / "projects" / method / "README.md").read_text().partition("\n")[0].lstrip("# ")


def read_gflops(page: str) -> dict[str, str]:
    """The cells of the GFLOPs column by name of the config, from a page that was written before."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \[.*/configs/", line)]
    column = COLUMNS.index("GFLOPs")
    return {cells[0][1:].partition("]")[0]: cells[column] for cells in rows if cells[column] != MISSING}


def write_heads(leaves: Sequence[Leaf]) -> None:
    """Write the numbers of the papers at the heads of configs."""
    for leaf in leaves:
        head, text = read_head(leaf.path), leaf.path.read_text()
        if (written := write_numbers(head)) != head:
            leaf.path.write_text(written + text.removeprefix(head))


def main() -> None:
    """Measure and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--keep-gflops", action="store_true", help="measure only what the page has no GFLOPs of")
    args = parser.parse_args()
    leaves = find_leaves()
    write_heads(leaves)
    gflops = read_gflops(OUTPUT.read_text()) if args.keep_gflops else {}
    for name, cell in measure_gflops([leaf for leaf in leaves if leaf.name not in gflops]):
        print(f"{name}: {cell} GFLOPs", flush=True)
        gflops[name] = cell
    OUTPUT.write_text(render(leaves, gflops))
    for method in dict.fromkeys(leaf.method for leaf in leaves if leaf.name.startswith("ablations/")):
        page = ROOT / "projects" / method / "README.md"
        text = render_ablations(page.read_text(), [leaf for leaf in leaves if leaf.method == method])
        page.write_text(render_comparisons(text, method, leaves))
    print(f"{OUTPUT}: {len(leaves)} configs")


if __name__ == "__main__":
    main()
