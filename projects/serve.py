"""A page in the browser to try models on (demo.py --serve): an image in; masks, the method's own views and files out.

The networks see an image once. What they find is kept in the visitor's session; score, classes and files choose from
it, so that several visitors do not disturb each other. Needs gradio, the extra ``serve``.
"""

import argparse
import base64
import io
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from querymask.common.data.image_files import ImageFileError
from querymask.common.detection_files import DetectionWriter, model_categories
from querymask.common.detections import Detections
from querymask.common.packages import import_package
from querymask.common.predictor import Predictor, explain
from querymask.common.run_length_masks import RunLengthMasks
from querymask.common.views import choose_view, find_views
from querymask.common.visualization import LONGER_SIDE_RANGE, class_colour, draw_instances, write_image

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:7860"
MOST_MEGABYTES = 50
"""Of an uploaded file."""
MOST_PIXELS = 50_000_000
"""Of an uploaded image where INPUT.MAX_PIXELS says nothing: as many as RGB take 150 MB."""
VISITORS = 100
"""Sessions that are kept; another one ends the oldest."""
KEPT = 3600
"""Seconds that files and what was found in them stay."""
DETECTIONS = "detections"

CSS = """
.found svg, .found img {width: 100%; height: auto; display: block}
.found .object path {fill-opacity: .4; stroke-opacity: .9; stroke-width: 1}
.found .object:hover path {fill-opacity: .75; stroke-width: 2}
.found .object text {visibility: hidden; pointer-events: none; fill: #000; stroke: #fff; paint-order: stroke}
.found .object:hover text {visibility: visible}
.found [role=alert] {padding: 1em; border-left: 4px solid #c00}
"""


@dataclass(frozen=True)
class ServedModel:
    """A model of the page.

    Attributes:
        title: above what it finds.
        architecture: MODEL.META_ARCHITECTURE.
        categories: of its classes, for COCO's files.
        views: names of those that it has.
    """

    title: str
    predictor: Predictor
    architecture: str
    categories: Sequence[dict[str, Any]]
    views: Sequence[str]

    @classmethod
    def from_config(cls, cfg: CfgNode, title: str) -> "ServedModel":
        """With its weights. Larger images than MOST_PIXELS are refused where INPUT.MAX_PIXELS says nothing."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MAX_PIXELS = cfg.INPUT.MAX_PIXELS or MOST_PIXELS
        predictor = Predictor(cfg, LONGER_SIDE_RANGE[1])
        architecture = cfg.MODEL.META_ARCHITECTURE
        views = [] if cfg.TEST.SLICE.SIZE else [n for n, (a, _) in sorted(find_views().items()) if a == architecture]
        return cls(title, predictor, architecture, model_categories(cfg, predictor.class_names), views)


@dataclass(frozen=True)
class Found:
    """What one model finds in an image.

    Attributes:
        item, image: the model's input, and uint8 [H, W, 3] RGB at the size of the detections.
        detections: of any score, with masks as run lengths.
        outlines: the ``d`` of an SVG path around each.
        seconds: that the network took, with its place in the queue.
    """

    item: dict[str, Any]
    image: np.ndarray
    detections: Detections
    outlines: list[str]
    seconds: float


@dataclass(frozen=True)
class Seen:
    """An image that was uploaded.

    Attributes:
        name: of the file.
        size: its height and width in pixels.
        found: by each of the models.
    """

    name: str
    size: tuple[int, int]
    found: list[Found]


@dataclass(frozen=True)
class Choice:
    """What of the detections is shown: from a score on, of these classes (none: of all)."""

    score: float
    classes: Sequence[str]

    def rows(self, detections: Detections) -> list[int]:
        """Of the detections that are shown, ascending."""
        return [
            row
            for row, (score, name) in enumerate(zip(detections.scores, detections.names))
            if score >= self.score and (not self.classes or name in self.classes)
        ]


def look(models: Sequence[ServedModel], path: str) -> Seen:
    """Run all models on an image file.

    Raises:
        Exception: whatever the file or a network leads to; ``explain`` has words for it.
    """
    found = []
    for model in models:
        pixels = model.predictor.reader(path)
        item, image = model.predictor.prepare(pixels)
        start = time.perf_counter()
        (detections,) = model.predictor.detect([item])
        seconds = time.perf_counter() - start
        if isinstance(detections.masks, np.ndarray):
            masks = RunLengthMasks.place(torch.from_numpy(detections.masks), 0, 0, detections.size)
            detections = replace(detections, masks=masks)
        outlines = [outline(detections, row) for row in range(len(detections))]
        found.append(Found(item, image, detections, outlines, seconds))
    return Seen(Path(path).name, pixels.shape[:2], found)


def outline(detections: Detections, row: int) -> str:
    """The ``d`` of an SVG path around a detection's mask, through the centres of its outermost pixels; else its box."""
    if detections.masks is None:
        x0, y0, x1, y1 = detections.boxes[row].tolist()
        return f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}Z"
    contours, _ = cv2.findContours(detections.masks.decode(row), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return "".join("M" + "L".join(f"{x + 0.5} {y + 0.5}" for x, y in contour[:, 0]) + "Z" for contour in contours)


def draw_svg(found: Found, choice: Choice, model: ServedModel) -> str:
    """The image with an outline of each detection, which shows its class and score under the pointer."""
    height, width = found.detections.size
    rows = choice.rows(found.detections)
    chosen = found.detections.chosen(rows)
    boxes = chosen.boxes if chosen.masks is None else chosen.masks.boxes()
    text = max(height, width) / 36
    shapes = []
    # Large ones first, so that small ones stay in reach; numbers as in draw_instances
    for i in np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable"):
        number = int(i if len(model.predictor.class_names) == 1 else chosen.labels[i])
        colour = f"rgb{class_colour(number)}"
        label = escape(f"{chosen.names[i]} {chosen.scores[i]:.2f}")
        x, y = min(boxes[i, 0], 0.7 * width), max(boxes[i, 1], text)
        shapes.append(
            f'<g class="object" fill="{colour}" stroke="{colour}" data-label="{label}">'
            f'<path fill-rule="evenodd" d="{found.outlines[rows[i]]}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{text:.1f}" stroke-width="{text / 5:.1f}">{label}</text></g>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{len(rows)} objects">'
        f'<image href="{_data_uri(found.image)}" width="{width}" height="{height}"/>{"".join(shapes)}</svg>'
        f"<p>{len(rows)} of {len(found.detections)} detections, {found.seconds:.2f} s</p>"
    )


def draw_picture(found: Found, choice: Choice, shown: str, model: ServedModel) -> np.ndarray:
    """Detections or a view as a picture, uint8 [H', W', 3] RGB."""
    if shown != DETECTIONS:
        view = choose_view(shown, model.architecture)
        return model.predictor.draw_view(view, found.item, found.image, choice.score)
    chosen = found.detections.chosen(choice.rows(found.detections))
    return draw_instances(found.image, chosen.to_instances(), model.predictor.class_names)


def write_files(
    folder: str, seen: Seen, number: int, choice: Choice, shown: str, models: Sequence[ServedModel]
) -> list[str]:
    """Write the picture and COCO's files of what is shown of a model; returns their paths."""
    model, found = models[number], seen.found[number]
    prefix = f"{folder}/{Path(seen.name).stem}." + (f"{number + 1}." if len(models) > 1 else "")
    write_image(f"{prefix}png", draw_picture(found, choice, shown, model))
    with DetectionWriter(prefix, model.categories) as writer:
        writer.add(found.detections.chosen(choice.rows(found.detections)), seen.size, 1, seen.name)
    return sorted(map(str, Path(folder).iterdir()))


def build_page(models: Sequence[ServedModel], score_threshold: float) -> "gradio.Blocks":
    """The page of one model, or of several side by side."""
    gr = import_gradio()
    names = dict.fromkeys(str(category["name"]) for model in models for category in model.categories)
    with gr.Blocks(analytics_enabled=False, title="QueryMask", delete_cache=(KEPT, KEPT)) as page:
        seen = gr.State(time_to_live=KEPT)
        with gr.Row():
            file = gr.File(label=f"image, up to {MOST_MEGABYTES} MB", height=140)
            with gr.Column():
                score = gr.Slider(0, 1, score_threshold, step=0.01, label="least score")
                classes = gr.Dropdown(list(names), value=[], multiselect=True, label="classes (none: all)")
        problem = gr.HTML(elem_classes="found")
        columns = []
        with gr.Row():
            for number, model in enumerate(models):
                with gr.Column(elem_id=f"model-{number}"):
                    gr.Markdown(f"**{model.title}**")
                    shown = gr.Radio([DETECTIONS, *model.views], value=DETECTIONS, label="shown")
                    picture = gr.HTML(elem_classes="found")
                    button = gr.Button("make files of what is shown: PNG, COCO JSON")
                    files = gr.File(label="files", file_count="multiple", interactive=False)
                    columns.append((shown, picture, button, files))

        def upload(path: str | None) -> tuple[Any, ...]:
            result, message = None, ""
            if path is not None:
                try:
                    result = look(models, path)
                except Exception as error:  # whatever it is, the page goes on
                    message = _alert(Path(path).name, error)
            return result, message, *[None] * len(columns)

        looked = file.change(upload, file, [seen, problem, *(files for *_, files in columns)])
        for number, (shown, picture, button, files) in enumerate(columns):

            def show(seen: Seen | None, score: float, classes: list[str], shown: str, number: int = number) -> str:
                if seen is None:
                    return ""
                found, choice, model = seen.found[number], Choice(score, classes), models[number]
                try:
                    if shown == DETECTIONS:
                        return draw_svg(found, choice, model)
                    return f'<img alt="{shown}" src="{_data_uri(draw_picture(found, choice, shown, model))}">'
                except Exception as error:  # views may refuse a model
                    return _alert(seen.name, error)

            def make(
                seen: Seen | None, score: float, classes: list[str], shown: str, number: int = number
            ) -> Iterator[list[str]]:
                if seen is None:
                    raise gr.Error("There is no image yet: give one first.", print_exception=False)
                with tempfile.TemporaryDirectory() as folder:  # gradio takes copies of what it is given
                    yield write_files(folder, seen, number, Choice(score, classes), shown, models)

            inputs = [seen, score, classes, shown]
            looked.then(show, inputs, picture)
            for control in (score, classes, shown):
                control.change(show, inputs, picture, trigger_mode="always_last")
            button.click(make, inputs, files)
    return page.queue(default_concurrency_limit=4)


LAUNCH = {
    "css": CSS,
    "share": False,
    "max_file_size": MOST_MEGABYTES * 2**20,
    "state_session_capacity": VISITORS,
    "footer_links": [],
}
"""How the page is launched, in tests too."""


def serve(models: Sequence[ServedModel], host: str, port: int, score_threshold: float) -> None:
    """Serve the page until it is interrupted.

    Args:
        score_threshold: least score at first.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is taken.
    """
    build_page(models, score_threshold).launch(server_name=host, server_port=port, **LAUNCH)


def import_gradio() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed.
    """
    return import_package("gradio", "the page needs", "querymask[serve]")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``HOST`` or ``:PORT``, by default those of DEFAULT_ADDRESS.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    default = urlsplit(f"//{DEFAULT_ADDRESS}")
    try:
        given = urlsplit(f"//{text}")
        if given.netloc != text or "@" in text:
            raise ValueError
        return given.hostname or default.hostname, default.port if given.port is None else given.port
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT, such as {DEFAULT_ADDRESS}") from None


def _alert(name: str, error: Exception) -> str:
    """A message for the page; what is no fault of the file goes to the log with its trace."""
    if not isinstance(error, (ImageFileError, ValueError)):
        logger.error("the page met an error", exc_info=error)
    return f'<div role="alert">{escape(explain(name, error))}</div>'


def _data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] RGB as the address of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
