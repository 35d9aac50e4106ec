"""Write docs/model_zoo.md, one row per config, and the methods' tables of ablations, from the configs.

    python tools/make_model_zoo.py [--keep-gflops]

What a config is and where its numbers come from stands in the comments at its head:

    # One line whose first sentence says what the model is
    # Paper: row of the paper | numbers of its authors
    # Measured: numbers of this project
    # Weights: whose published file fits, a name of RELEASES, and which it is
    # Any other line is a remark for readers of the config

All but the first line may be missing. Parameters and FLOPs are measured. A file named Base... is no model of its own.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import querymask  # before Detectron2, which it makes importable on current libraries

# isort: split
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn

from querymask.common.engine.unused_keys import leaves as keys_of
from querymask.common.flops import count_parameters, measure
from querymask.common.mask_coding import fill_missing_bases
from querymask.effseg.effseg import EffSeg
from querymask.effseg.fqdet.predictions import FQDetPredictions

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "model_zoo.md"
MISSING = "–"
NOT_PUBLISHED = "none were published"
COLUMNS = ("Config", "Model", "Paper", "Measured here", "Parameters", "Trainable", "GFLOPs", "Weights")
# FLOPs are those of one image of this size, COCO's usual 480x640 at a shorter side of 800
HEIGHT, WIDTH = 800, 1066


@dataclass(frozen=True)
class Release:
    """Published files: the page that links them, where they lie, and their format."""

    page: str
    host: str
    format: str


INTRODUCTION = f"""# Model zoo

Written by `tools/make_model_zoo.py` from the configs; change those and run it again.

A row is a config, with the row of the paper that it stands for. **AP in the column "Paper" is the authors', with their
own code; it was not measured here.** "Measured here" holds what this project reached itself. Parameters, with the data
set's own number of classes and without frozen batch norms, are measured, and so are GFLOPs: multiply-adds of inference
on one image of {HEIGHT}x{WIDTH}, those of EffSeg with as many different queries as detections. Time and memory
on a GPU are not yet measured ([gpu.md](gpu.md)).
"""

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
        '"no object"',
    ),
}
"""What the fact ``Weights`` of a config can begin with; the rest says which file it is."""

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


@dataclass(frozen=True)
class Leaf:
    """A config and what its head says.

    Attributes:
        method: the folder below ``projects``.
        name: path below the method's configs, without suffix: ``solq_r50``, ``ablations/stages_1``.
        path: the file.
        title: what the model is.
        facts: the values of ``Paper``, ``Measured`` and ``Weights`` where they are given.
    """

    method: str
    name: str
    path: Path
    title: str
    facts: dict[str, str] = field(default_factory=dict)

    def config(self) -> CfgNode:
        """The config, to be changed freely."""
        return read_config(self.path)


def read_config(path: Path) -> CfgNode:
    """The config of a file."""
    cfg = querymask.get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def find_leaves(projects: Path = ROOT / "projects") -> list[Leaf]:
    """Every config that is a model, those with published weights first, then those of the papers, then by name."""
    paths = (path for path in projects.glob("*/configs/**/*.yaml") if not path.name.startswith("Base"))
    return sorted((read_leaf(path, projects) for path in paths), key=_order)


def read_leaf(path: Path, projects: Path) -> Leaf:
    """Read the head of a config.

    Raises:
        ValueError: there is none, or weights of an unknown release.
    """
    comments = re.match(r"(?:#.*\n)*", path.read_text())
    lines = [line.lstrip("# ") for line in comments[0].splitlines()] if comments else []
    if not lines:
        raise ValueError(f"{path}: its first line must be a comment that says what the model is")
    facts = dict(match.groups() for line in lines if (match := re.match(r"(Paper|Measured|Weights): (.*)", line)))
    release = facts.get("Weights", NOT_PUBLISHED).partition(", ")[0]
    if release not in {*RELEASES, NOT_PUBLISHED}:
        raise ValueError(f"{path}: weights of {release}, which is none of {', '.join(RELEASES)}")
    method, _, name = path.relative_to(projects).with_suffix("").as_posix().partition("/configs/")
    title = lines[0].partition(". ")[0].rstrip(".")
    return Leaf(method, name, path, title, facts)


def _order(leaf: Leaf) -> tuple[object, ...]:
    folder, _, name = leaf.name.rpartition("/")
    row = leaf.facts.get("Paper", "").partition(" |")[0]
    paper = row if row.startswith("Table") else "without a table"
    by_value = [part.zfill(6) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return leaf.method, folder, "Paper" not in leaf.facts, "Weights" not in leaf.facts, paper, by_value


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model without memory for its parameters."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def measure_gflops(leaves: Sequence[Leaf]) -> Iterator[tuple[str, str]]:
    """Names of configs with their cells of the GFLOPs column; equal networks are measured once."""
    pixels = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    by_network: dict[str, str] = {}
    for leaf in leaves:
        network = repr(build_on_meta(leaf.config()))
        if network not in by_network:
            cfg = leaf.config()
            cfg.MODEL.DEVICE = "cpu"
            torch.manual_seed(0)
            model = build_model(cfg)
            prepare_for_measurement(model)
            if isinstance(model, EffSeg):
                force_detections(model, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.DETECTIONS_PER_IMAGE)
            cost = measure(model, {"image": pixels, "height": HEIGHT, "width": WIDTH})
            by_network[network] = f"{cost.flops_by_module[''] / 1e9:.1f}"
        yield leaf.name, by_network[network]


def prepare_for_measurement(model: nn.Module) -> None:
    """Let a model with random weights do what a trained one does: have a mask basis, and find objects in the image.

    Boxes that stages of random weights move would soon leave the image, and no mask is made outside of it.
    """
    fill_missing_bases(model)
    for name, parameter in model.named_parameters():
        if "bboxes_delta" in name:
            nn.init.zeros_(parameter)


def force_detections(model: EffSeg, detections: int, queries: int) -> int | None:
    """Have EffSeg detect a fixed number of pairs of query and class, of as many queries as said.

    Random weights would otherwise decide how many queries the pairs are of, on which EffSeg's cost depends.

    Returns:
        how many masks are made for them: one a query, or one a pair where masks depend on the class; None without
        masks.

    Raises:
        ValueError: the model has fewer queries.
    """
    available = model.detector.num_queries
    if queries > available:
        raise ValueError(f"{queries} regions are asked for, but the model has {available} queries: lower --regions")

    def select(found: FQDetPredictions, image: int, size: tuple[int, int], layer: int | None = None) -> Instances:
        numbers = torch.arange(detections, device=found.boxes.device)
        instances = Instances(size)
        instances.pred_queries = numbers % queries
        instances.pred_classes = numbers // queries % (found.logits.shape[3] - 1)
        instances.scores = found.logits[0, image].sigmoid()[instances.pred_queries, instances.pred_classes]
        instances.pred_boxes = Boxes(found.boxes[image, instances.pred_queries])
        return instances

    model.detector.select = select  # type: ignore[method-assign]
    if model.mask_branch is None:
        return None
    return detections if model.mask_branch.head.per_class else queries


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
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(leaf, gflops.get(leaf.name, MISSING)) for leaf in members)]
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows))
    return "\n".join([*parts, USAGE.replace("{releases}", render_releases())])


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
    rows = [("Config", f"Instead of what {link} has", "Paper"), ("---",) * 3]
    for leaf in ablations:
        own = {key: value for key, value in keys_of(leaf.config()) if value != shared[key] and key != "OUTPUT_DIR"}
        changes = ", ".join(f"`{key.removeprefix('MODEL.')} {value}`" for key, value in own.items())
        paper = leaf.facts.get("Paper", MISSING).replace(" | ", "<br>")
        rows.append((f"[{leaf.path.stem}]({leaf.path.relative_to(folder).as_posix()})", changes or "nothing", paper))
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    before, after = page.split(ABLATIONS[0])[0], page.split(ABLATIONS[1])[1]
    return f"{before}{ABLATIONS[0]}\n{table}{ABLATIONS[1]}{after}"


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-gflops", action="store_true", help="measure only what the page has no GFLOPs of")
    args = parser.parse_args()
    leaves = find_leaves()
    gflops = read_gflops(OUTPUT.read_text()) if args.keep_gflops else {}
    for name, cell in measure_gflops([leaf for leaf in leaves if leaf.name not in gflops]):
        print(f"{name}: {cell} GFLOPs", flush=True)
        gflops[name] = cell
    OUTPUT.write_text(render(leaves, gflops))
    for method in dict.fromkeys(leaf.method for leaf in leaves):
        page = ROOT / "projects" / method / "README.md"
        page.write_text(render_ablations(page.read_text(), [leaf for leaf in leaves if leaf.method == method]))
    print(f"{OUTPUT}: {len(leaves)} configs")


if __name__ == "__main__":
    main()
