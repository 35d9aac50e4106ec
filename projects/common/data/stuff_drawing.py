"""Random scenes as those of ``shape_drawing``, before backgrounds of several classes of stuff.

A background is cut into bands by wavy lines; each band shows a class by its colours and its texture. Bands that are no
neighbours may be of one class, which is one segment of two parts then.
"""

import colorsys

import cv2
import numpy as np

from querymask.common.data.shape_drawing import SceneObject, draw_scene

STUFF_NAMES = ("sky", "water", "grass", "sand", "bricks")

# Probabilities of 1, 2, ... bands
BAND_PROBABILITIES = (0.1, 0.35, 0.35, 0.2)
# Stuff of fewer visible pixels belongs to no segment
LEAST_AREA = 40

# Ranges of hue, saturation and value; difference in value of the second colour
_COLOURS = {
    "sky": ((0.54, 0.62), (0.15, 0.45), (0.8, 1.0), 0.12),
    "water": ((0.5, 0.66), (0.5, 0.9), (0.3, 0.6), 0.15),
    "grass": ((0.24, 0.38), (0.4, 0.8), (0.3, 0.65), 0.25),
    "sand": ((0.09, 0.14), (0.3, 0.6), (0.7, 0.95), 0.15),
    "bricks": ((0.98, 1.04), (0.4, 0.7), (0.4, 0.7), 0.25),
}


def draw_panoptic_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[SceneObject], np.ndarray]:
    """Draw one picture.

    Returns:
        As ``draw_scene``, and the class of stuff that each pixel shows, int64 [H, W]; -1 where there is an object or
        no segment.
    """
    regions = []

    def background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
        image, colours, classes = _draw_background(rng, height, width)
        regions.append(classes)
        return image, colours

    image, objects = draw_scene(rng, background)
    (stuff,) = regions
    for scene_object in objects:
        stuff[scene_object.mask] = -1
    for index in range(len(STUFF_NAMES)):
        if np.count_nonzero(stuff == index) < LEAST_AREA:
            stuff[stuff == index] = -1
    return image, objects, stuff


def _draw_background(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Picture float32 [H, W, 3] in 0..1, its colours, and the class of each pixel, int64 [H, W]."""
    bands = _bands(rng, height, width)
    image = np.zeros((height, width, 3), dtype=np.float32)
    classes = np.zeros((height, width), dtype=np.int64)
    colours, last = [], -1
    for band in range(int(bands.max()) + 1):
        index = int(rng.choice([i for i in range(len(STUFF_NAMES)) if i != last]))
        hue, saturation, value, step = _COLOURS[STUFF_NAMES[index]]
        hsv = rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)
        second = hsv[0], hsv[1], hsv[2] - step
        pair = [np.array(colorsys.hsv_to_rgb(*colour), dtype=np.float32) for colour in (hsv, second)]
        texture = _texture(rng, STUFF_NAMES[index], height, width)
        chosen = bands == band
        image[chosen] = (pair[0] + texture[..., None] * (pair[1] - pair[0]))[chosen]
        classes[chosen] = index
        colours += pair
        last = index
    return image, colours, classes


def _bands(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The number of the band of each pixel, from 0 at the top, int64 [H, W]."""
    count = 1 + int(rng.choice(len(BAND_PROBABILITIES), p=BAND_PROBABILITIES))
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(-0.5, 0.5)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    across = across + rng.uniform(1, 6) * np.sin(along * rng.uniform(0.03, 0.12) + rng.uniform(0, 2 * np.pi))
    parts = rng.uniform(0.6, 1.4, count)
    limits = across.min() + np.ptp(across) * np.cumsum(parts / parts.sum())[:-1]
    return np.digitize(across, limits)


def _texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """How much of the second of two colours each pixel of a class has, float32 [height, width] in 0..1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if name in ("sky", "grass"):  # large clouds, or blades that are higher than wide
        cell = (rng.uniform(18, 30), rng.uniform(24, 40)) if name == "sky" else (rng.uniform(4, 7), rng.uniform(1.5, 3))
        grid = rng.random((int(height / cell[0]) + 2, int(width / cell[1]) + 2), dtype=np.float32)
        return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    phases = rng.uniform(0, 2 * np.pi, 2)
    if name == "water":  # waves
        return 0.5 + 0.5 * np.sin(2 * np.pi * y / rng.uniform(5, 8) + 1.5 * np.sin(x / rng.uniform(5, 9) + phases[0]))
    if name == "sand":  # grains
        return (rng.random((height, width), dtype=np.float32) < 0.25).astype(np.float32)
    row = rng.uniform(6, 9)  # joints of bricks, which are shifted from row to row
    rows = np.floor(y / row)
    column = (x + row * (rows % 2)) % (2 * row)
    return ((y % row < 1.3) | (column < 1.3)).astype(np.float32)
