"""Random scenes of textured geometric shapes with exact instance masks.

Pure functions of a random generator: nothing here knows of files. A scene is painted back to front; a map of labels
(which object each pixel shows) is kept beside the picture, so visible masks are exact and occlusion can be limited
while objects are placed. Lengths are in pixels; pixel i covers [i, i + 1), as in COCO's polygons.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")

# Side lengths of an image, drawn uniformly and independently
SIDE_RANGE = (96, 160)
# (probability, least, greatest) diameter as a fraction of the geometric mean of the image's sides: small, medium, large
DIAMETERS = ((0.2, 0.11, 0.2), (0.6, 0.2, 0.5), (0.2, 0.5, 0.95))
# Probabilities of 1, 2, ..., 8 objects in an image that has any
COUNT_PROBABILITIES = (0.10, 0.16, 0.20, 0.18, 0.14, 0.10, 0.07, 0.05)
EMPTY_PROBABILITY = 0.03
CROWD_PROBABILITY = 0.05
# At least this share of an object's area lies inside the image's border
MIN_INSIDE = 0.45
# Least distance of an object's centre from the border, as a fraction of its diameter
CENTRE_MARGIN = 0.3
# At least this share of the area inside the border stays visible when others are painted over it
MIN_VISIBLE = 0.4
# Distance in RGB (0..1) between the colours of an object and those of the background
MIN_CONTRAST = 0.4

Background = Callable[[np.random.Generator, int, int], tuple[np.ndarray, list[np.ndarray]]]
"""Draws a background of (height, width): float32 [H, W, 3] in 0..1, and the colours in it."""

_SUPERSAMPLING = 4
_SHADOW_REACH = 4


@dataclass
class SceneObject:
    """One annotated thing of a scene.

    ``mask`` is bool [H, W], the visible pixels. ``outline`` is float [V, 2], the (x, y) corners of the polygon, given
    only where it says the same as the mask: no hole, not occluded, not cut by the border.
    """

    class_index: int
    mask: np.ndarray
    outline: np.ndarray | None
    is_crowd: bool


def _regular_polygon(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int = 5, inner_radius: float = 0.45) -> np.ndarray:
    corners = _regular_polygon(2 * points)
    corners[1::2] *= inner_radius
    return corners


def _cross(arm: float = 0.31) -> np.ndarray:
    quarter = np.array([[arm, arm], [arm, 0.95], [-arm, 0.95]])
    quarters = [quarter]
    for _ in range(3):
        quarters.append(quarters[-1] @ np.array([[0.0, 1.0], [-1.0, 0.0]]))  # a quarter turn, (x, y) -> (-y, x)
    return np.concatenate(quarters)


# Closed contours in the unit circle; pixels inside an odd number of them belong to the shape.
_CONTOURS: dict[str, list[np.ndarray]] = {
    "circle": [_regular_polygon(40)],
    "square": [_regular_polygon(4)],
    "triangle": [_regular_polygon(3)],
    "star": [_star()],
    "ring": [_regular_polygon(40), _regular_polygon(40, 0.55)],
    "cross": [_cross()],
}


def _random_colour(
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> np.ndarray:
    """RGB in 0..1, float32 [3], uniform in hue and in the given ranges."""
    return np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)),
        dtype=np.float32,
    )


def _contrasting_colour(rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """A colour at least MIN_CONTRAST away from all others, or the best of ten."""
    best, best_distance = None, -1.0
    for _ in range(10):
        colour = _random_colour(rng, (0.2, 1.0), (0.1, 1.0))
        distance = min(float(np.linalg.norm(colour - other)) for other in others)
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= MIN_CONTRAST:
            break
    return best


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random texture, float32 [height, width] in 0..1: how much of the second of two colours each pixel has."""
    kind = ("plain", "gradient", "stripes", "checks", "dots", "clouds")[rng.integers(6)]
    if kind == "plain":
        return np.full((height, width), rng.uniform(0, 0.3), dtype=np.float32)
    if kind == "clouds":
        cell = rng.uniform(4, 16)
        grid = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
        return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    if kind == "gradient":
        along -= along.min()
        return along / max(float(along.max()), 1.0)
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    frequency = np.float32(2 * np.pi / rng.uniform(5, 14))
    phases = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    wave = np.sin(along * frequency + phases[0])
    if kind == "stripes":
        return np.clip(0.5 + 2 * wave, 0, 1)
    wave *= np.sin(across * frequency + phases[1])
    return np.clip(0.5 + 4 * wave, 0, 1) if kind == "checks" else np.clip(4 * wave - 1, 0, 1)


def _mix(pattern: np.ndarray, colours: list[np.ndarray]) -> np.ndarray:
    """[h, w] pattern and two colours -> float32 [h, w, 3]."""
    return colours[0] + pattern[..., None] * (colours[1] - colours[0])


def _coverage(contours: list[np.ndarray], left: int, top: int, width: int, height: int) -> np.ndarray:
    """Share of each pixel of a window that lies inside the contours, float32 [height, width] in 0..1."""
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), dtype=np.uint8)
    bits = 4  # OpenCV takes fixed-point coordinates, with integers at pixel centres
    points = [
        np.rint((((c - (left, top)) * _SUPERSAMPLING) - 0.5) * (1 << bits)).astype(np.int32).reshape(-1, 1, 2)
        for c in contours
    ]
    cv2.fillPoly(canvas, points, 255, shift=bits)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _polygon_area(corners: np.ndarray) -> float:
    x, y = corners[:, 0], corners[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def plain_background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A ``Background`` of one texture."""
    first = _random_colour(rng, (0.05, 0.5), (0.2, 0.95))
    second = np.clip(first + rng.uniform(-0.22, 0.22, 3).astype(np.float32), 0, 1)
    return np.ascontiguousarray(_mix(_pattern(rng, height, width), [first, second])), [first, second]


class _Canvas:
    """A picture in the making with its map of labels (0: background, k: the k-th object)."""

    def __init__(self, rng: np.random.Generator, background: Background) -> None:
        self.rng = rng
        self.height, self.width = (int(side) for side in rng.integers(SIDE_RANGE[0], SIDE_RANGE[1] + 1, 2))
        self.image, self.background = background(rng, self.height, self.width)
        self.labels = np.zeros((self.height, self.width), dtype=np.int64)
        # Per label: pixels when it was painted, pixels still visible, and the outline if it says the same as the mask
        self.painted = [0]
        self.visible = [0]
        self.outlines: list[np.ndarray | None] = [None]

    def place(
        self,
        name: str,
        diameter: float,
        colours: list[np.ndarray],
        box: tuple[float, float, float, float],
        label: int,
    ) -> bool:
        """Paint a shape with a random pose and its centre in ``box`` (x0, y0, x1, y1) as (part of) object ``label``.

        Returns:
            Whether it was painted: not so if it would be too much outside the image or hide too much of another object.
        """
        rng = self.rng
        centre = np.array([rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])])
        angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        axes *= diameter / 2 * np.array([[stretch], [1 / stretch]])
        contours = [corners @ axes + centre for corners in _CONTOURS[name]]
        least, greatest = contours[0].min(axis=0), contours[0].max(axis=0)
        left, top = (max(int(np.floor(v)) - _SHADOW_REACH, 0) for v in least)
        right, bottom = (
            min(int(np.ceil(v)) + _SHADOW_REACH, side) for v, side in zip(greatest, (self.width, self.height))
        )
        if right <= left or bottom <= top:
            return False

        coverage = _coverage(contours, left, top, right - left, bottom - top)
        mask = coverage >= 0.5
        area = int(np.count_nonzero(mask))
        whole_area = _polygon_area(contours[0]) - sum(_polygon_area(hole) for hole in contours[1:])
        if area < MIN_INSIDE * whole_area:
            return False
        labels = self.labels[top:bottom, left:right]
        covered = np.bincount(labels[mask], minlength=len(self.visible) + 1)
        own = int(covered[label])  # parts of one crowd may cover each other
        covered[[0, label]] = 0
        if any(v - c < MIN_VISIBLE * p for v, c, p in zip(self.visible, covered, self.painted)):
            return False

        self._paint(coverage, _mix(_pattern(rng, *mask.shape), colours), left, top)
        self.visible = [v - int(c) for v, c in zip(self.visible, covered)]
        if label == len(self.visible):
            self.painted.append(0)
            self.visible.append(0)
            inside = (least >= 0).all() and (greatest <= (self.width, self.height)).all()
            self.outlines.append(contours[0] if inside and len(contours) == 1 else None)
        self.painted[label] += area - own
        self.visible[label] += area - own
        labels[mask] = label
        return True

    def _paint(self, coverage: np.ndarray, texture: np.ndarray, left: int, top: int) -> None:
        """Blend texture [h, w, 3] into the picture by coverage [h, w], over a soft shadow to the lower right."""
        height, width = coverage.shape
        window = self.image[top : top + height, left : left + width]
        shadow = np.zeros_like(coverage)
        shadow[2:, 2:] = coverage[:-2, :-2]
        shadow = cv2.blur(shadow, (5, 5))
        window *= 1 - 0.4 * shadow[..., None]
        window += coverage[..., None] * (texture - window)

    def finish(self) -> np.ndarray:
        """The picture with uneven light and grain, uint8 [H, W, 3] RGB."""
        rng = self.rng
        x = np.linspace(-1, 1, self.width, dtype=np.float32)[None, :]
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        slope = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
        light = 255 * (1 + slope[0] * x + slope[1] * y)
        grain = rng.standard_normal(self.image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
        return np.clip(self.image * light[..., None] + grain, 0, 255).astype(np.uint8)


def draw_scene(
    rng: np.random.Generator, background: Background = plain_background
) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one picture.

    Args:
        rng: the only source of randomness; the same state gives the same scene.
        background: what is behind the objects.

    Returns:
        The image, uint8 [H, W, 3] RGB, and its objects from back to front. Every object of the picture is among them.
    """
    canvas = _Canvas(rng, background)
    classes: list[int] = []
    crowds: list[bool] = []
    if rng.random() >= EMPTY_PROBABILITY:
        if rng.random() < CROWD_PROBABILITY:
            classes.append(_place_crowd(canvas))
            crowds.append(True)
        scale = np.sqrt(canvas.width * canvas.height)
        count = 1 + rng.choice(len(COUNT_PROBABILITIES), p=COUNT_PROBABILITIES)
        bands = rng.choice(len(DIAMETERS), size=count, p=[band[0] for band in DIAMETERS])
        diameters = [scale * rng.uniform(*DIAMETERS[band][1:]) for band in bands]
        for diameter in sorted(diameters, reverse=True):  # small ones in front
            class_index = int(rng.integers(len(CLASS_NAMES)))
            colours = [_contrasting_colour(rng, canvas.background) for _ in range(2)]
            margin = CENTRE_MARGIN * diameter
            centres = (margin, margin, canvas.width - margin, canvas.height - margin)
            for _ in range(8):
                if canvas.place(CLASS_NAMES[class_index], diameter, colours, centres, label=len(canvas.visible)):
                    classes.append(class_index)
                    crowds.append(False)
                    break
    objects = []
    for label, (class_index, is_crowd) in enumerate(zip(classes, crowds), start=1):
        unhidden = canvas.visible[label] == canvas.painted[label] and not is_crowd
        outline = canvas.outlines[label] if unhidden else None
        objects.append(SceneObject(class_index, canvas.labels == label, outline, is_crowd))
    return canvas.finish(), objects


def _place_crowd(canvas: _Canvas) -> int:
    """Paint a heap of small shapes of one class as one object; returns the index of the class."""
    rng = canvas.rng
    class_index = int(rng.integers(len(CLASS_NAMES)))
    reach_x, reach_y = rng.uniform(14, 26, 2)
    x, y = (
        rng.uniform(reach_x, canvas.width - reach_x),
        rng.uniform(reach_y, canvas.height - reach_y),
    )
    box = (x - reach_x, y - reach_y, x + reach_x, y + reach_y)
    label = len(canvas.visible)
    for _ in range(int(rng.integers(10, 19))):
        colours = [_contrasting_colour(rng, canvas.background) for _ in range(2)]
        while not canvas.place(CLASS_NAMES[class_index], rng.uniform(9, 15), colours, box, label):
            pass
    return class_index
