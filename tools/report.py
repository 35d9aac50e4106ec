"""One self-contained HTML page about a training run: config, curves, AP, kinds of errors, worst and best images.

    python tools/report.py OUTPUT_DIR [--compare OTHER_OUTPUT_DIR] [--output FILE.html]

It reads what the run has written: config.yaml, metrics.json and the results of its last evaluation (inference/), and
the images and annotations of DATASETS.TEST for the pictures. Errors are told apart as TIDE does it (Bolya et al. 2020;
querymask/common/evaluation/errors.py). --compare adds the numbers of another run, the keys of the config in which both
differ, and the images on which they differ most. What cannot be made is named on the page and in the terminal; the exit
status is 1 then. The page needs no network: pictures are in it.
"""

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image

from querymask.command_line import add_data, file_ending, load_config, make_parser, run_config
from querymask.common.data.annotations import is_panoptic, read_dataset
from querymask.common.data.image_files import ImageReader
from querymask.common.evaluation.build import results_folder
from querymask.common.evaluation.coco import Scores
from querymask.common.evaluation.errors import ERRORS, IGNORED, RIGHT, ImageErrors, find_errors, summarize_errors
from querymask.common.evaluation.panoptic import RESULTS_FILE
from querymask.common.evaluation.report import TASK_NAMES
from querymask.common.evaluation.result_pictures import Results, class_indices, draw_results, results_by_image
from querymask.common.evaluation.results import evaluate_results
from querymask.common.evaluation.truth import dataset_truth, index
from querymask.common.fonts import set_font
from querymask.common.visualization import draw_curves

SIZES = {"APs": "small, below 32 x 32 pixels", "APm": "medium", "APl": "large, from 96 x 96 pixels"}
"""COCO's ranges of areas."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { max-width: 100% } figure { margin: 1.5em 0 } figcaption { color: #555 } pre { overflow-x: auto }
.bar { display: inline-block; height: .8em; background: #c44e52 } .problem { color: #a00 }
"""


@dataclass(frozen=True)
class Evaluation:
    """What a run has found on a data set; ``images`` is empty where there is no ground truth of COCO's kind."""

    scores: Scores
    results: Results
    images: dict[Any, ImageErrors]


@dataclass
class Page:
    """A page that is written section by section.

    Attributes:
        problems: what could not be made.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Cells are HTML: escape what is not made here."""
        head = "".join(f"<th>{escape(header)}</th>" for header in headers)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
        self.parts.append(f"<table>\n<tr>{head}</tr>\n{body}</table>")

    def picture(self, content: bytes, kind: str, caption: str) -> None:
        """An image file of a kind ("png", "jpeg")."""
        data = base64.b64encode(content).decode()
        text = escape(caption, quote=True)
        image = f'<img alt="{text}" src="data:image/{kind};base64,{data}">'
        self.parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Inside, a part of the page is made; where that fails, it says so, and the others are made all the same."""
        try:
            yield
        except Exception as error:  # of files that anything may be wrong with
            kind = "" if isinstance(error, (ValueError, KeyError, OSError)) else f"{type(error).__name__}: "
            self.problems.append(f"{what}: {kind}{message(error)}")
            self.parts.append(f'<p class="problem">{escape(self.problems[-1])}</p>')

    def html(self) -> str:
        """The whole page."""
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
        body = "\n".join([f"<h1>{escape(self.title)}</h1>", *self.parts])
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def message(error: Exception) -> str:
    """What an error says: that of a KeyError is in quotes otherwise."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def read_run(folder: Path, data: str | None) -> CfgNode:
    """The config of a run, with the folder that it is in now."""
    cfg = load_config(run_config(folder), data=data)
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def read_evaluation(cfg: CfgNode, dataset: str) -> Evaluation:
    """The results of a run on a data set.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = Path(results_folder(cfg, dataset))
    files = sorted(folder.glob(RESULTS_FILE if is_panoptic(dataset) else "*_instances_results.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no results of an evaluation; train_net.py --config-file {cfg.OUTPUT_DIR}/config.yaml "
            "--eval-only writes them"
        )
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    scores = evaluate_results(files[0], dataset, cfg.TEST.BOUNDARY_AP, limit)
    if is_panoptic(dataset):
        return Evaluation(scores, {}, {})
    results = results_by_image(files[0], dataset)
    if not scores or MetadataCatalog.get(dataset).get("evaluator_type", "coco") != "coco":
        return Evaluation(scores, results, {})
    flat = [result for of_image in results.values() for result in of_image]
    return Evaluation(scores, results, find_errors(index(dataset_truth(dataset)), flat, "segm" in scores, limit))


def show_config(page: Page, runs: Mapping[str, CfgNode]) -> None:
    """The config, and where it differs from that of the other run."""
    texts = {title: run_config(cfg.OUTPUT_DIR).read_text() for title, cfg in runs.items()}
    if len(runs) > 1:
        first, second = (flatten(yaml.safe_load(text)) for text in texts.values())
        keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        rows = ([escape(str(x)) for x in (key, first.get(key, "–"), second.get(key, "–"))] for key in keys)
        page.text("Keys of other values:" if keys else "Both configs are the same.")
        if keys:
            page.table(["key", *runs], rows)
    for title, text in texts.items():
        page.parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping by their dotted keys."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}


def show_curves(page: Page, title: str, cfg: CfgNode) -> None:
    """Losses and AP over the iterations."""
    file = io.BytesIO()
    draw_curves(Path(cfg.OUTPUT_DIR, "metrics.json")).savefig(file, format="png", dpi=120)
    page.picture(file.getvalue(), "png", title)


def show_scores(page: Page, evaluations: Mapping[str, Evaluation]) -> None:
    """AP of boxes, masks and boundaries, by size of the objects and by class; or panoptic quality."""
    every = [evaluation.scores for evaluation in evaluations.values()]
    tasks = list(dict.fromkeys(task for scores in every for task in scores))
    metrics = list(dict.fromkeys(m for scores in every for task in scores.values() for m in task))
    headers = [""]
    for task in tasks:
        headers += [f"{TASK_NAMES[task]}, {title}" if len(every) > 1 else TASK_NAMES[task] for title in evaluations]
        headers += ["difference"] if len(every) > 1 else []
    rows = []
    for metric in metrics:
        row = [escape(SIZES.get(metric, f"class {metric[3:]}" if metric.startswith("AP-") else metric))]
        for task in tasks:
            values = [scores.get(task, {}).get(metric, float("nan")) for scores in every]
            row += number_cells(values)
        rows.append(row)
    page.table(headers, rows)


def number_cells(values: Sequence[float], digits: int = 2) -> list[str]:
    """Numbers of one run, or of two with what the second has more."""
    cells = [f"{value:.{digits}f}" if np.isfinite(value) else "–" for value in values]
    if len(values) > 1:
        change = values[1] - values[0]
        cells.append(f"{change:+.{digits}f}" if np.isfinite(change) else "–")
    return cells


def show_errors(page: Page, evaluations: Mapping[str, Evaluation]) -> None:
    """How many errors of each kind there are, and what they cost."""
    summaries = [summarize_errors(list(evaluation.images.values())) for evaluation in evaluations.values()]
    kind = "masks" if "segm" in next(iter(evaluations.values())).scores else "boxes"
    page.text(
        f"By the IoU of {kind}. AP50 is {' and '.join(f'{s.ap:.2f}' for s in summaries)}; a column says by how much it "
        "would be higher without the errors of a kind, each kind for itself (TIDE, Bolya et al. 2020)."
    )
    several = len(summaries) > 1
    headers = ["error"]
    for what in ("number", "AP50 lost"):
        headers += [f"{what}, {title}" if several else what for title in evaluations]
        headers += ["difference"] if several else []
    rows = []
    for error in ERRORS:
        gains = [summary.gains[error] for summary in summaries]
        bar = f'<span class="bar" style="width: {4 * gains[0]:.0f}px"></span>'
        counts = number_cells([summary.counts[error] for summary in summaries], digits=0)
        rows.append([error, *counts, *number_cells(gains), bar])
    nothing = [""] * (len(rows[0]) - 2 - len(number_cells([s.ap for s in summaries])))
    rows.append(["all false positives", *nothing, *number_cells([s.false_positives for s in summaries]), ""])
    rows.append(["all false negatives", *nothing, *number_cells([s.false_negatives for s in summaries]), ""])
    page.table([*headers, ""], rows)


def show_images(page: Page, dataset: str, cfg: CfgNode, evaluations: Mapping[str, Evaluation], count: int) -> None:
    """The worst and the best images, and those on which the runs differ most."""
    threshold = cfg.VIS_SCORE_THRESHOLD
    entries = {entry["image_id"]: entry for entry in read_dataset(dataset)}
    names, classes, reader = (
        MetadataCatalog.get(dataset).thing_classes,
        class_indices(dataset),
        ImageReader.from_config(cfg),
    )
    results = {title: evaluation.results for title, evaluation in evaluations.items()}
    qualities = [{key: i.quality(threshold) for key, i in e.images.items()} for e in evaluations.values()]
    first = next(iter(evaluations.values())).images

    known = [key for key, quality in qualities[0].items() if np.isfinite(quality)]
    known.sort(key=lambda key: -len(first[key].object_classes))  # of equals, those with the most objects
    worst = sorted(known, key=lambda key: qualities[0][key])[:count]
    best = sorted((key for key in known if key not in worst), key=lambda key: -qualities[0][key])[:count]
    groups = {"Worst images": worst, "Best images": best}
    if len(qualities) > 1:
        changes = {key: abs(qualities[1][key] - qualities[0][key]) for key in known}
        changed = sorted((key for key in known if changes[key] > 0), key=lambda key: -changes[key])
        groups = {"Images that differ most": changed[:count], **groups}
    page.text(
        f"Of detections with a score of at least {threshold:g}. Images are ranked by their panoptic quality (Kirillov "
        "et al. 2019): the sum of the IoUs of right detections, over these and half of the wrong ones and of the "
        "objects that are not found."
    )
    for title, keys in groups.items():
        page.parts.append(f"<h3>{title}</h3>")
        for key in keys:
            entry = entries[key]
            with page.attempt(f"there is no picture of {entry['file_name']}"):
                sheet = draw_results(entry, reader(entry["file_name"]), results, names, classes, threshold)
                file = io.BytesIO()
                Image.fromarray(sheet).save(file, "jpeg", quality=85)
                found = " | ".join(describe(e.images[key], threshold) for e in evaluations.values())
                page.picture(file.getvalue(), "jpeg", f"{Path(entry['file_name']).name}: {found}")


def describe(image: ImageErrors, threshold: float) -> str:
    """What a run found in an image, in words."""
    kinds = image.kinds[image.scores >= threshold].tolist()
    counts = [f"{kind}: {kinds.count(kind)}" for kind in (RIGHT, *ERRORS, IGNORED) if kind in kinds]
    number = len(image.object_classes)
    return ", ".join([f"quality {image.quality(threshold):.2f}, objects: {number}", *(counts or ["nothing found"])])


def show_dataset(page: Page, dataset: str, runs: Mapping[str, CfgNode], count: int) -> None:
    """Scores, errors and images of a data set, of the first run and, where it has them, the other."""
    page.heading(f"Results on {dataset}")
    evaluations: dict[str, Evaluation] = {}
    for title, cfg in runs.items():
        with page.attempt(f"there are no results of {title} on {dataset}"):
            evaluations[title] = read_evaluation(cfg, dataset)
    title, cfg = next(iter(runs.items()))
    if title not in evaluations:
        return
    if not evaluations[title].scores:
        page.text("The data set has no ground truth.")
        return
    show_scores(page, evaluations)
    if not evaluations[title].images:
        page.text("Kinds of errors are not told apart: they are of instances, in images that are annotated in full.")
        return
    page.heading(f"Errors on {dataset}")
    show_errors(page, evaluations)
    page.heading(f"Images of {dataset}")
    show_images(page, dataset, cfg, evaluations, count)


def make_page(runs: Mapping[str, CfgNode], count: int) -> Page:
    """The page of one or two runs, by title."""
    cfg = next(iter(runs.values()))
    page = Page(" and ".join(runs))
    branch = cfg.MODEL.MASK_BRANCH.NAME
    page.text(
        f"{cfg.MODEL.META_ARCHITECTURE}{f' with {branch}' if branch else ''}, trained on "
        f"{', '.join(cfg.DATASETS.TRAIN)} for {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images."
    )
    page.heading("Curves")
    for title, of_run in runs.items():
        with page.attempt(f"there are no curves of {title}"):
            show_curves(page, title, of_run)
    for dataset in cfg.DATASETS.TEST:
        with page.attempt(f"there is no more on {dataset}"):
            show_dataset(page, dataset, runs, count)
    page.heading("Config")
    show_config(page, runs)
    return page


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="folder of a training run")
    parser.add_argument("--compare", type=Path, metavar="OUTPUT_DIR", help="folder of another run")
    parser.add_argument(
        "--output", type=file_ending(".html"), metavar="FILE.html", help="the page (OUTPUT_DIR/report.html)"
    )
    parser.add_argument("--num-images", type=int, default=8, metavar="N", help="of the worst and the best each (8)")
    add_data(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, evaluate, write; returns the exit status."""
    args = parse_arguments(arguments)
    folders = [args.run] if args.compare is None else [args.run, args.compare]
    titles = [folder.resolve().name for folder in folders]
    titles = titles if len(set(titles)) == len(titles) else [str(folder) for folder in folders]
    try:
        runs = {title: read_run(folder, args.data) for title, folder in zip(titles, folders, strict=True)}
        set_font(runs[titles[0]].VIS_FONT)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 1
    page = make_page(runs, args.num_images)
    output = args.output or args.run / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.html(), encoding="utf-8")
    for problem in page.problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")
    return int(bool(page.problems))


if __name__ == "__main__":
    sys.exit(main())
