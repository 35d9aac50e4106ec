"""Pictures of instances, predictions beside ground truth, and curves of a training run.

Instances come as Detectron2's ``Instances`` (predictions: fields ``pred_*``, ground truth: fields ``gt_*``) or as
the annotations of a data set entry. Colours are those of the classes, so that the same thing has the same colour in
every picture; where there is but one class, instances have colours of their own.
"""

import colorsys
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import BitMasks, BoxMode, Instances, PolygonMasks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from querymask.common import fonts
from querymask.common.data.image_files import ImageReader
from querymask.common.data.segment_maps import annotations_with_masks
from querymask.common.data.segmentation import decode_segmentation
from querymask.common.run_length_masks import RunLengthMasks

# Images are enlarged or reduced for drawing until their longer side is in this range of pixels
LONGER_SIDE_RANGE = (512, 1280)

# Lists of (iteration, value) by name
Metrics = dict[str, list[tuple[int, float]]]

# How metrics are drawn in curves
_METRIC_LINES = {"AP": "-", "AP50": "--", "PQ": "-", "PQ_th": "--", "PQ_st": ":"}

_MASK_OPACITY = 0.45
_CROWD_COLOUR = (150, 150, 150)
_MARGIN = 12
_LABEL_SIZE = 14
# Images with fewer objects have a label at each of them
_CROWD = 15


@dataclass
class _Item:
    """One thing to draw; ``box`` is XYXY in pixels of the image, ``mask`` gives zeros and ones [H, W] of the image."""

    name: str  # of its class
    label: str
    colour: tuple[int, int, int]
    box: np.ndarray | None
    mask: Callable[[], np.ndarray] | None

    @cached_property
    def extent(self) -> np.ndarray | None:
        """XYXY of the box, of the mask where there is no box; None for an empty mask."""
        if self.box is not None or self.mask is None:
            return self.box
        x, y, w, h = cv2.boundingRect(self.mask().astype(np.uint8))
        return np.array([x, y, x + w, y + h]) if w else None


def class_colour(index: int) -> tuple[int, int, int]:
    """A vivid RGB colour for a class; neighbours differ clearly."""
    hue = (0.02 + index * 0.6180339887) % 1.0  # the golden ratio spreads any number of hues evenly
    value = 1.0 - 0.2 * (index // 8 % 2)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, value))


def drawing_scale(height: int, width: int) -> float:
    """By how much an image is enlarged for drawing, so that its longer side is in LONGER_SIDE_RANGE."""
    low, high = LONGER_SIDE_RANGE
    return min(max(1.0, low / max(height, width)), high / max(height, width))


def draw_instances(
    image: np.ndarray,
    instances: Instances | Sequence[dict[str, Any]],
    class_names: Sequence[str] = (),
    score_threshold: float = 0.0,
) -> np.ndarray:
    """Draw masks, boxes and labels over an image.

    Args:
        image: uint8 [H, W, 3] RGB.
        instances: of this image at this size: Instances with ``pred_*`` or ``gt_*`` fields (any of boxes, classes,
            scores, masks may lack), or annotations of a data set entry.
        class_names: by contiguous class index; where too short, the index is shown.
        score_threshold: predictions of a lower score are left out.

    Returns:
        uint8 [H', W', 3] RGB, enlarged or reduced such that the longer side is in LONGER_SIDE_RANGE.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"draw_instances needs a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    items = _items(instances, class_names, score_threshold, height, width)
    scale = drawing_scale(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    shrinking = scale < 1
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)

    # Large ones first, so that small ones stay visible
    items.sort(key=lambda item: 0.0 if item.extent is None else -float(np.prod(item.extent[2:] - item.extent[:2])))
    for item in items:
        if item.mask is not None:
            _draw_mask(canvas, item)
    for item in items:
        if item.box is not None:
            x0, y0, x1, y1 = (int(round(float(v) * scale)) for v in item.box)
            cv2.rectangle(canvas, (x0, y0), (min(x1, size[0]) - 1, min(y1, size[1]) - 1), item.colour, 1, cv2.LINE_AA)
    return _draw_labels(canvas, items, scale)


def save_comparison(
    dataset_dict: dict[str, Any],
    instances: Instances,
    metadata: Any,
    path: str | Path,
    score_threshold: float = 0.3,
    reader: ImageReader = ImageReader(),  # noqa: B008 (it is immutable)
) -> None:
    """Write a picture of an image's ground truth (if known) with the predictions to its right.

    Args:
        dataset_dict: entry of the data set, with ``file_name`` and, for the ground truth, ``annotations``.
        instances: predictions at the size of the image file.
        metadata: of the data set, for ``thing_classes``.
        path: PNG or JPEG file to write.
        score_threshold: predictions of a lower score are left out.
        reader: of the image file, for RGB.
    """
    write_image(path, comparison(dataset_dict, instances, metadata, score_threshold, reader))


def comparison(
    dataset_dict: dict[str, Any],
    instances: Instances,
    metadata: Any,
    score_threshold: float = 0.3,
    reader: ImageReader = ImageReader(),  # noqa: B008
) -> np.ndarray:
    """The picture of ``save_comparison`` as uint8 [H, W, 3] RGB."""
    image = reader(dataset_dict["file_name"])
    class_names = metadata.get("thing_classes", None) or ()
    shown = len(_items(instances, class_names, score_threshold, *image.shape[:2]))
    panels = [draw_instances(image, instances, class_names, score_threshold)]
    titles = [f"{shown} predictions" + (f", score ≥ {score_threshold:g}" if score_threshold > 0 else "")]
    if "annotations" in dataset_dict:
        annotations = annotations_with_masks(dataset_dict)
        panels.insert(0, draw_instances(image, annotations, class_names))
        what = "segments" if "pan_seg_file_name" in dataset_dict else "instances"
        titles.insert(0, f"ground truth, {len(annotations)} {what}")
    return contact_sheet(panels, columns=2, titles=titles)


def contact_sheet(images: Sequence[np.ndarray], columns: int, titles: Sequence[str] | None = None) -> np.ndarray:
    """Arrange images row by row on white, centred in cells of equal size.

    Args:
        images: uint8 [H_i, W_i, 3] RGB of any sizes, at least one.
        columns: images in a row.
        titles: one above each image.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    if not images:
        raise ValueError("A contact sheet needs at least one image.")
    title_height = 0 if titles is None else 30
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width = max(image.shape[1] for image in images) + _MARGIN
    cell_height = max(image.shape[0] for image in images) + _MARGIN + title_height
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x = _MARGIN + column * cell_width + (cell_width - _MARGIN - image.shape[1]) // 2
        y = _MARGIN + row * cell_height + title_height + (cell_height - _MARGIN - title_height - image.shape[0]) // 2
        sheet.paste(Image.fromarray(image), (x, y))
        if titles is not None:
            fonts.write(draw, (x, y - title_height + 3), titles[number], 18, (40, 40, 40))
    return np.asarray(sheet)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB as PNG or JPEG, by the name's ending; the folder is made where it lacks."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=92)  # of JPEG, up to 95


def plot_curves(metrics_file: str | Path, path: str | Path) -> None:
    """Write the picture of ``draw_curves`` as a PNG file; the folder is made where it lacks."""
    figure = draw_curves(metrics_file)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_curves(metrics_file: str | Path) -> Figure:
    """Losses and AP, or PQ, over iterations from a run's ``metrics.json`` (as Detectron2 writes it).

    Losses of inner decoder layers (those with a numbered ending) are left out; they are in the total.
    """
    series = read_metrics(metrics_file)
    losses = {
        name: points
        for name, points in series.items()
        if name.rpartition("/")[2] == "total_loss"
        or ("loss" in name and "/" not in name and not name.rsplit("_", 1)[-1].isdigit())
    }
    precisions = {
        name: points
        for name, points in series.items()
        if name.rsplit("/", 1)[-1] in _METRIC_LINES and any(np.isfinite(value) for _, value in points)
    }
    if not losses and not precisions:
        raise ValueError(f"{metrics_file} has neither losses nor AP. Is it the metrics.json of a training run?")
    panels = [(_plot_losses, losses), (_plot_precisions, precisions)]
    panels = [(plot, lines) for plot, lines in panels if lines]
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    for axes, (plot, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        plot(axes, lines)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(framealpha=0.8, edgecolor="none")
    return figure


def read_metrics(metrics_file: str | Path) -> Metrics:
    """Numbers of a ``metrics.json`` as lists of (iteration, value) by name.

    Where iterations were run twice (a run was resumed), the later value counts. A last line that was cut off by an
    interruption is left out.
    """
    lines = Path(metrics_file).read_text().splitlines()
    series: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{metrics_file}, line {number + 1}: not JSON. Is it the metrics.json of a run?") from None
        for name, value in record.items():
            if name != "iteration" and isinstance(value, (int, float)):
                series.setdefault(name, {})[record["iteration"]] = float(value)
    return {name: sorted(points.items()) for name, points in series.items()}


def _items(
    instances: Instances | Sequence[dict[str, Any]],
    class_names: Sequence[str],
    score_threshold: float,
    height: int,
    width: int,
) -> list[_Item]:
    """What to draw on an image of ``height`` x ``width``."""
    if not isinstance(instances, Instances):
        return [_annotation_item(a, i, class_names, height, width) for i, a in enumerate(instances)]
    if tuple(instances.image_size) != (height, width):
        raise ValueError(
            f"The instances are for an image of {tuple(instances.image_size)}, not {(height, width)} (height, width). "
            "Rescale them first (detectron2.modeling.postprocessing.detector_postprocess)."
        )
    if not instances.get_fields():
        return []
    fields = {
        name: instances.get(f"{prefix}_{name}")
        for name in ("boxes", "classes", "masks")
        for prefix in ("pred", "gt")
        if instances.has(f"{prefix}_{name}")
    }
    scores = instances.scores.tolist() if instances.has("scores") else None
    boxes = fields["boxes"].tensor.detach().cpu().numpy() if "boxes" in fields else None
    classes = fields["classes"].tolist() if "classes" in fields else None
    masks = fields.get("masks")
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    items = []
    for i in range(len(instances)):
        if scores is not None and scores[i] < score_threshold:
            continue
        words = [] if classes is None else [_class_name(classes[i], class_names)]
        name = " ".join(words)
        if scores is not None:
            words.append(f"{scores[i]:.2f}")
        colour = class_colour(i if classes is None or len(class_names) == 1 else classes[i])
        mask = None if masks is None else partial(_decode, masks, i)
        items.append(_Item(name, " ".join(words), colour, None if boxes is None else boxes[i], mask))
    return items


def _annotation_item(
    annotation: dict[str, Any], number: int, class_names: Sequence[str], height: int, width: int
) -> _Item:
    name = _class_name(annotation["category_id"], class_names)
    crowd = bool(annotation.get("iscrowd", 0))
    box = mask = None
    if "bbox" in annotation:
        box = np.array(BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS))
    if "segmentation" in annotation:
        mask = partial(decode_segmentation, annotation["segmentation"], height, width)
    colour = _CROWD_COLOUR if crowd else class_colour(number if len(class_names) == 1 else annotation["category_id"])
    return _Item(name, f"{name} crowd" if crowd else name, colour, box, mask)


def _decode(masks: torch.Tensor | RunLengthMasks, number: int) -> np.ndarray:
    if isinstance(masks, RunLengthMasks):
        return masks.decode(number)
    return masks[number].detach().cpu().numpy().astype(bool)


def _class_name(index: int, class_names: Sequence[str]) -> str:
    return str(class_names[index]) if 0 <= index < len(class_names) else f"class {index}"


def _draw_mask(canvas: np.ndarray, item: _Item) -> None:
    """Tint the pixels of a mask and draw its outline, in place; the mask is brought to the canvas' size."""
    height, width = canvas.shape[:2]
    pixels = item.mask().astype(np.uint8)
    enlarging = width > pixels.shape[1]
    method = cv2.INTER_LINEAR if enlarging else cv2.INTER_AREA
    coverage = cv2.resize(pixels * 255, (width, height), interpolation=method)
    if enlarging:  # round off the steps of the pixels
        coverage = cv2.GaussianBlur(coverage, (0, 0), 0.5 * width / pixels.shape[1])
    mask = (coverage >= 128).astype(np.uint8)
    x, y, w, h = cv2.boundingRect(mask)
    if w == 0:
        return
    window = canvas[y : y + h, x : x + w]
    inside = mask[y : y + h, x : x + w].astype(bool)
    tinted = (1 - _MASK_OPACITY) * window[inside] + _MASK_OPACITY * np.array(item.colour)
    window[inside] = tinted.astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, (255, 255, 255), 3, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, item.colour, 2, cv2.LINE_AA)


def _draw_labels(canvas: np.ndarray, items: Sequence[_Item], scale: float) -> np.ndarray:
    """Write the labels at the boxes' upper corners, moved where they would leave the image or cover one another."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    for item, label in _labels(items, scale):
        width, height, top = _label_extent(label)
        x0, y0, x1 = (float(v) * scale for v in item.extent[:3])
        places = []
        for rows in (-1, 0, -2, 1, -3, 2, 3, 4):  # above the box is best
            for x in (x0, x1 - width):
                x, y = min(x, picture.width - width), min(y0 + rows * height, picture.height - height)
                places.append((max(x, 0), max(y, 0), max(x, 0) + width, max(y, 0) + height))
        place = min(places, key=lambda candidate: sum(_overlap(candidate, other) for other in taken))
        taken.append(place)
        draw.rounded_rectangle(place, radius=4, fill=item.colour)
        bright = 0.299 * item.colour[0] + 0.587 * item.colour[1] + 0.114 * item.colour[2] > 140
        fill = (0, 0, 0) if bright else (255, 255, 255)
        fonts.write(draw, (place[0] + 4, place[1] + 3 - top), label, _LABEL_SIZE, fill)
    return np.array(picture)


def _labels(items: Sequence[_Item], scale: float) -> list[tuple[_Item, str]]:
    """What to write at which objects.

    Where there are many of one class, nothing; where labels would cover what they are for, the name of each class once,
    at its largest object.

    Args:
        items: large ones first.
        scale: of the canvas.
    """
    shown = [item for item in items if item.extent is not None and item.label]
    if len(shown) < _CROWD:
        return [(item, item.label) for item in shown]
    names: dict[str, _Item] = {}
    for item in shown:
        names.setdefault(item.name, item)
    if len(names) == 1:
        return []
    covered = sum(width * height for width, height, _ in (_label_extent(item.label) for item in shown))
    objects = sum(float(np.prod(item.extent[2:] - item.extent[:2])) for item in shown) * scale**2
    if covered > objects / 2:
        return [(item, name) for name, item in names.items()]
    return [(item, item.label) for item in shown]


def _label_extent(label: str) -> tuple[float, float, float]:
    """Width and height of a label with its background, and where its text begins below the line of the font."""
    width, top, bottom = fonts.text_extent(label, _LABEL_SIZE)
    return width + 8, bottom - top + 6, top


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> float:
    """Area that two boxes have in common."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _plot_losses(axes: Axes, losses: Metrics) -> None:
    """Smoothed curves over the measured ones, on a logarithmic scale; the total first."""
    names = sorted(losses, key=lambda name: (name != "total_loss", name))
    for number, name in enumerate(names):
        iterations, values = zip(*losses[name])
        colour = _plot_colour(number)
        axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(iterations, _smooth(values), color=colour, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("loss")


def _plot_precisions(axes: Axes, precisions: Metrics) -> None:
    """One colour for each task (boxes, masks, segments), AP50 and PQ of things dashed, of stuff dotted."""
    tasks = sorted({name.rpartition("/")[0] for name in precisions})
    for name, points in sorted(precisions.items()):
        task, _, kind = name.rpartition("/")
        style = {"color": _plot_colour(tasks.index(task)), "linestyle": _METRIC_LINES[kind]}
        axes.plot(*zip(*points), marker="o", markersize=4, label=name.replace("/", " "), **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(" or ".join(sorted({name.rpartition("/")[2][:2] for name in precisions})))


def _plot_colour(number: int) -> tuple[float, ...]:
    return tuple(0.85 * channel / 255 for channel in class_colour(number))


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a twentieth of the run; values that are not finite are left out."""
    reach = len(values) // 40
    numbers = np.asarray(values, dtype=np.float64)
    windows = [numbers[max(i - reach, 0) : i + reach + 1] for i in range(len(numbers))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if len(window) else np.nan for window in finite])


class PictureNames:
    """Gives every image the name of its picture; images of one name, of different folders or endings, get numbers.

    Args:
        ending: of the pictures, ".png" or ".jpg".
    """

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self._taken: set[str] = set()

    def __call__(self, file: str | os.PathLike) -> str:
        """Name of the picture of an image file, without folder, another one at each call."""
        stem = PurePosixPath(os.fspath(file).replace("\\", "/")).stem or "image"
        name, number = stem, 2
        while name.casefold() in self._taken:  # files "A" and "a" are one on macOS and Windows
            name, number = f"{stem}_{number}", number + 1
        self._taken.add(name.casefold())
        return f"{name}{self.ending}"
