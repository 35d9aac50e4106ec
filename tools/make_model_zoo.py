"""Write docs/model_zoo.md, one row per config, and the methods' tables of ablations, from the configs.

    python tools/make_model_zoo.py [--keep-gflops]

What the page says of a config stands at its head: see querymask.model_zoo. Parameters and FLOPs are measured.
"""

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
from querymask.model_zoo import RELEASES, Leaf, find_leaves, read_config

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "model_zoo.md"
MISSING = "–"
COLUMNS = ("Config", "Model", "Paper", "Measured here", "Parameters", "Trainable", "GFLOPs", "Weights")
# FLOPs are those of one image of this size, COCO's usual 480x640 at a shorter side of 800
HEIGHT, WIDTH = 800, 1066

INTRODUCTION = f"""# Model zoo

Written by `tools/make_model_zoo.py` from the configs; change those and run it again.

A row is a config, with the row of the paper that it stands for. **AP in the column "Paper" is the authors', with their
own code; it was not measured here.** "Measured here" holds what this project reached itself. Parameters, with the data
set's own number of classes and without frozen batch norms, are measured, and so are GFLOPs: multiply-adds of inference
on one image of {HEIGHT}x{WIDTH}, those of EffSeg with as many different queries as detections. Time and memory
on a GPU are not yet measured ([gpu.md](gpu.md)).
"""

ABLATIONS = ("<!-- Written by tools/make_model_zoo.py -->", "<!-- Until here -->")
"""What encloses the table of ablations in a method's page."""

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
    paper, measured = (leaf.facts.get(key, MISSING).replace(" | ", "<br>") for key in ("Paper", "Measured"))
    return (link, leaf.title, paper, measured, f"{parameters.total:,}", f"{parameters.trainable:,}", gflops, weights)


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
        paper = leaf.facts.get("Paper", MISSING).replace(" | ", "<br>")
        rows.append((f"[{leaf.path.stem}]({leaf.path.relative_to(folder).as_posix()})", changes or "nothing", paper))
    table = table_of(rows, ("Config", f"Instead of what {link} has", "Paper"))
    before, after = page.split(ABLATIONS[0])[0], page.split(ABLATIONS[1])[1]
    return f"{before}{ABLATIONS[0]}\n{table}\n{ABLATIONS[1]}{after}"


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


def main() -> None:
    """Measure and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--keep-gflops", action="store_true", help="measure only what the page has no GFLOPs of")
    args = parser.parse_args()
    leaves = find_leaves()
    gflops = read_gflops(OUTPUT.read_text()) if args.keep_gflops else {}
    for name, cell in measure_gflops([leaf for leaf in leaves if leaf.name not in gflops]):
        print(f"{name}: {cell} GFLOPs", flush=True)
        gflops[name] = cell
    OUTPUT.write_text(render(leaves, gflops))
    for method in dict.fromkeys(leaf.method for leaf in leaves if leaf.name.startswith("ablations/")):
        page = ROOT / "projects" / method / "README.md"
        page.write_text(render_ablations(page.read_text(), [leaf for leaf in leaves if leaf.method == method]))
    print(f"{OUTPUT}: {len(leaves)} configs")


if __name__ == "__main__":
    main()
