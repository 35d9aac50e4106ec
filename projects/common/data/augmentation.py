"""DETR's augmentation: flip, resize to a random size, and a second branch with a random crop; and large-scale jitter.

Beside these, what suits images without an up and down (rotation by right angles), and jitter of brightness and colour.

Sources: Carion et al., End-to-End Object Detection with Transformers (ECCV 2020), section 4; SOLQ's release for the
range of the crop and the additional first resize; each method's release for the rounding of sizes; Ghiasi et al.,
Simple Copy-Paste (CVPR 2021), for the jitter, which Detectron2 calls ResizeScale and FixedSizeCrop. Randomness comes
from NumPy's global generator, which Detectron2 seeds for each worker.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform, Transform, TransformList
from PIL import Image


def _detr_sides(low: int, high: int, shorter: int, longest: float) -> tuple[float, float]:
    """DETR's and SOLQ's: the limited shorter side is the nearest integer, the longer side an integer part."""
    if high / low * shorter > longest:
        shorter = round(longest * low / high)
    shorter = max(shorter, 1)
    return shorter, shorter * high / low


def _detectron2_sides(low: int, high: int, shorter: int, longest: float) -> tuple[float, float]:
    """Detectron2's, and so ISTR's: the nearest integers."""
    sides = float(shorter), shorter / low * high
    if sides[1] > longest:
        scale = longest / sides[1]
        sides = sides[0] * scale, sides[1] * scale
    return sides[0] + 0.5, sides[1] + 0.5


def _mmdetection_sides(low: int, high: int, shorter: int, longest: float) -> tuple[float, float]:
    """MMDetection's, and so ISDA's: the nearest integers, of one scale."""
    scale = min(longest / high, shorter / low)
    return low * scale + 0.5, high * scale + 0.5


def _effseg_sides(low: int, high: int, shorter: int, longest: float) -> tuple[float, float]:
    """EffSeg's: integer parts."""
    if shorter * high > longest * low:
        return longest * low // high, longest
    return shorter, shorter * high // low


RESIZE_RULES: dict[str, Callable[[int, int, int, float], tuple[float, float]]] = {
    "detr": _detr_sides,
    "detectron2": _detectron2_sides,
    "mmdetection": _mmdetection_sides,
    "effseg": _effseg_sides,
}
"""By ``INPUT.RESIZE_RULE``: sides of which the integer parts count, from those of the image and what is wanted.

The releases differ by a pixel in some images, which published numbers rest on.
"""


def resized_size(width: int, height: int, shorter: int, longest: int | None, rule: str = "detr") -> tuple[int, int]:
    """Size (width, height) of an image after a resize that keeps its shape; each side has at least one pixel.

    Args:
        width, height: of the image.
        shorter: wanted length of the shorter side.
        longest: limit of the longer side, which lowers ``shorter`` where needed; None: no limit.
        rule: one of ``RESIZE_RULES``.
    """
    sides = RESIZE_RULES[rule](
        min(width, height), max(width, height), shorter, math.inf if longest is None else longest
    )
    low, high = (max(int(side), 1) for side in sides)
    return (low, high) if width <= height else (high, low)


MASK_RULES = ("nearest", "linear")
"""By ``INPUT.MASK_RESIZE_RULE``: how :class:`Resize` resizes masks."""


def mask_rule(name: str) -> str:
    """The name, if it is one of ``MASK_RULES``.

    Raises:
        ValueError: it is another one.
    """
    if name not in MASK_RULES:
        raise ValueError(f"INPUT.MASK_RESIZE_RULE must be one of {', '.join(MASK_RULES)}, not {name!r}.")
    return name


class Resize(T.ResizeTransform):
    """Detectron2's resize with other masks.

    By the rule "nearest", the releases', cell i takes pixel floor(i * old / new), where Pillow, which Detectron2 uses,
    takes the one at the cell's centre: masks lie up to half a cell further right and down than the image. By "linear"
    a cell belongs to the mask if four pixels around its centre do by half, and masks lie where the image does.
    """

    def __init__(
        self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None, masks: str = "nearest"
    ) -> None:
        """
        Args:
            h, w, new_h, new_w: sizes of the image before and after it.
            interp: Pillow's filter for images.
            masks: one of ``MASK_RULES``.
        """
        super().__init__(h, w, new_h, new_w, interp)
        self.masks = mask_rule(masks)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize a mask [H, W], uint8 of 0 and 1."""
        if self.masks == "linear":
            return cv2.resize(segmentation, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)  # rounded
        rows, columns = (
            # float32 as in torch.nn.functional.interpolate, so that the rounding is the same
            np.minimum(np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(np.int64), old - 1)
            for old, new in ((self.h, self.new_h), (self.w, self.new_w))
        )
        return segmentation[rows[:, None], columns]


class OpenCVResize(Resize):
    """With OpenCV's bilinear interpolation of four pixels, however much smaller the result is: no antialiasing."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image [H, W, ...]."""
        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])


class ResizeShortestSide(T.Augmentation):
    """Resize such that the shorter side has a randomly chosen length.

    Bilinear and antialiased as Pillow's; of the rule "mmdetection" as OpenCV's.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        longest: int | None = None,
        sampling: str = "choice",
        rule: str = "detr",
        masks: str = "nearest",
    ) -> None:
        """
        Args:
            sizes: lengths to choose from, or the first and last of a range; 0 leaves images as they are.
            longest: limit of the longer side; None: no limit.
            sampling: "choice" or "range".
            rule: one of ``RESIZE_RULES``.
            masks: one of ``MASK_RULES``.
        """
        super().__init__()
        if rule not in RESIZE_RULES:
            raise ValueError(f"INPUT.RESIZE_RULE must be one of {', '.join(RESIZE_RULES)}, not {rule!r}.")
        if sampling not in ("choice", "range"):
            raise ValueError(f"Sampling of image sizes must be 'choice' or 'range', not {sampling!r}.")
        if len(sizes) == 0 or (sampling == "range" and len(sizes) != 2):
            raise ValueError(f"Sampling of image sizes by {sampling!r} does not go with the sizes {tuple(sizes)}.")
        self.sizes = tuple(sizes)
        self.longest = longest
        self.sampling = sampling
        self.rule = rule
        self.masks = mask_rule(masks)

    def get_transform(self, image: np.ndarray) -> Transform:
        """The resize of one image [H, W, ...]."""
        height, width = image.shape[:2]
        if self.sampling == "range":
            size = np.random.randint(self.sizes[0], self.sizes[1] + 1)
        else:
            size = self.sizes[np.random.randint(len(self.sizes))]
        if size == 0:
            return NoOpTransform()
        new_width, new_height = resized_size(width, height, int(size), self.longest, self.rule)
        if (new_width, new_height) == (width, height):
            return NoOpTransform()
        kind = OpenCVResize if self.rule == "mmdetection" else Resize
        return kind(height, width, new_height, new_width, Image.BILINEAR, self.masks)


class RandomCropOfRange(T.Augmentation):
    """Crop whose width and height are uniform integers from ``least`` to ``greatest``, limited by the image."""

    def __init__(self, least: int, greatest: int) -> None:
        super().__init__()
        if not 0 < least <= greatest:
            raise ValueError(f"The crop's range must be 0 < least <= greatest, not {least}, {greatest}.")
        self.least = least
        self.greatest = greatest

    def get_transform(self, image: np.ndarray) -> Transform:
        """The crop of one image [H, W, ...]."""
        height, width = image.shape[:2]
        crop_width, crop_height = (
            np.random.randint(min(self.least, side), min(self.greatest, side) + 1) for side in (width, height)
        )
        x0 = np.random.randint(width - crop_width + 1)
        y0 = np.random.randint(height - crop_height + 1)
        return CropTransform(x0, y0, crop_width, crop_height)


class ResizeToScale(T.Augmentation):
    """Resize, keeping the shape, such that the image just fits into a square whose side is scaled at random.

    Detectron2's ResizeScale, with the masks of ``Resize`` and at least one pixel for images of extreme shape.
    """

    def __init__(self, size: int, least: float, greatest: float, masks: str = "nearest") -> None:
        """
        Args:
            size: side of the square at scale 1.
            least, greatest: the scale is uniform between them.
            masks: one of ``MASK_RULES``.
        """
        super().__init__()
        if size < 1 or not 0 < least <= greatest:
            raise ValueError(
                "Large-scale jitter needs INPUT.LSJ.SIZE of at least 1 and INPUT.LSJ.SCALE with 0 < least <= greatest, "
                f"not {size} and {(least, greatest)}."
            )
        self.size = size
        self.least = least
        self.greatest = greatest
        self.masks = mask_rule(masks)

    def get_transform(self, image: np.ndarray) -> Transform:
        """The resize of one image [H, W, ...]."""
        height, width = image.shape[:2]
        side = self.size * np.random.uniform(self.least, self.greatest)
        scale = min(side / height, side / width)
        new_height, new_width = (max(int(np.round(old * scale)), 1) for old in (height, width))
        if (new_height, new_width) == (height, width):
            return NoOpTransform()
        return Resize(height, width, new_height, new_width, Image.BILINEAR, self.masks)


class CropOrPad(T.Augmentation):
    """Make an image a square: crop sides that are too long, at a random place; pad short ones at the right and bottom.

    Detectron2's FixedSizeCrop. Masks are padded with 0, where main's default is 255, meant for semantic labels.
    """

    def __init__(self, size: int, pad_value: float) -> None:
        """
        Args:
            size: side of the square.
            pad_value: of the image, in its own range (0 to 255).
        """
        super().__init__()
        if size < 1:
            raise ValueError(f"INPUT.LSJ.SIZE must be at least 1, not {size}.")
        self.size = size
        self.pad_value = pad_value

    def get_transform(self, image: np.ndarray) -> Transform:
        """The crop and the padding of one image [H, W, ...]."""
        height, width = image.shape[:2]
        part = np.random.uniform()  # one for both sides, as in Detectron2
        y0, x0 = (int(np.round(max(side - self.size, 0) * part)) for side in (height, width))
        kept_height, kept_width = min(height, self.size), min(width, self.size)
        crop = CropTransform(x0, y0, kept_width, kept_height, width, height)
        right, bottom = self.size - kept_width, self.size - kept_height
        return TransformList([crop, PadTransform(0, 0, right, bottom, kept_width, kept_height, self.pad_value)])


_ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


class QuarterTurns(Transform):
    """Rotation by right angles, of which every pixel is one of the image.

    Args:
        turns: counterclockwise.
        height, width: of the image.
    """

    def __init__(self, turns: int, height: int, width: int) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Rotate [H, W, ...]; masks, too."""
        if img.ndim == 2 and img.dtype == np.uint8 and self.turns % 4 in _ROTATIONS:
            return cv2.rotate(img, _ROTATIONS[self.turns % 4])  # several times as fast, and masks are many
        return np.ascontiguousarray(np.rot90(img, self.turns))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate points [n, 2] of x, y in pixels, of which the corner of the image is the origin."""
        x, y, height, width = coords[:, 0], coords[:, 1], self.height, self.width
        for _ in range(self.turns % 4):
            x, y, height, width = y, width - x, width, height
        return np.stack((x, y), axis=1)

    def inverse(self) -> Transform:
        """The rotation back."""
        turned = self.turns % 2 == 1
        return QuarterTurns(-self.turns, *((self.width, self.height) if turned else (self.height, self.width)))


class RandomQuarterTurns(T.Augmentation):
    """Rotation by 0, 90, 180 or 270 degrees, each as likely."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """The rotation of one image [H, W, ...]."""
        return QuarterTurns(np.random.randint(4), *image.shape[:2])


def color_jitter(strength: float) -> list[T.Augmentation]:
    """Brightness, contrast and saturation, each times a factor between 1 - strength and 1 + strength.

    Raises:
        ValueError: the strength is not between 0 and 1.
    """
    if not 0 <= strength < 1:
        raise ValueError(f"INPUT.COLOR_JITTER must be between 0 and 1, not {strength}.")
    kinds = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation) if strength else ()
    return [kind(1 - strength, 1 + strength) for kind in kinds]


def random_flips(name: str) -> list[T.Augmentation]:
    """Each with a probability of one half.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ("horizontal", "vertical", "both", "none"):
        raise ValueError(f"INPUT.RANDOM_FLIP must be 'horizontal', 'vertical', 'both' or 'none', not {name!r}.")
    flips = []
    if name in ("horizontal", "both"):
        flips.append(T.RandomFlip(horizontal=True, vertical=False))
    if name in ("vertical", "both"):
        flips.append(T.RandomFlip(horizontal=False, vertical=True))
    return flips


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations that ``cfg.INPUT`` asks for.

    Training: flips, rotation and jitter of colours where they are asked for. Then, where DETR_CROP.RESIZE_FIRST, a
    resize; with DETR_CROP.PROBABILITY a resize to DETR_CROP.MIN_SIZES and a crop; a resize. With LSJ.ENABLED instead: a
    resize to a random scale, crop or padding to a square. Test: a resize.

    Raises:
        ValueError: keys have no meaning, no effect, or exclude each other.
    """
    keys = cfg.INPUT
    if not is_train:
        size, limit = keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST
        return [ResizeShortestSide([size], limit, rule=keys.RESIZE_RULE, masks=keys.MASK_RESIZE_RULE)]
    if keys.CROP.ENABLED:
        raise ValueError("INPUT.CROP is not used by QueryMask: use INPUT.DETR_CROP, or set INPUT.CROP.ENABLED False.")
    augmentations = random_flips(keys.RANDOM_FLIP)
    if keys.ROTATE_90:
        augmentations.append(RandomQuarterTurns())
    augmentations += color_jitter(keys.COLOR_JITTER)
    if keys.LSJ.ENABLED:
        if keys.DETR_CROP.ENABLED:
            raise ValueError(
                "INPUT.LSJ.ENABLED and INPUT.DETR_CROP.ENABLED exclude each other: set one of them to False."
            )
        if len(keys.LSJ.SCALE) != 2:
            raise ValueError(f"INPUT.LSJ.SCALE is {list(keys.LSJ.SCALE)}: give the least and the greatest scale.")
        size = keys.LSJ.SIZE
        resize = ResizeToScale(size, *keys.LSJ.SCALE, masks=keys.MASK_RESIZE_RULE)
        return [*augmentations, resize, CropOrPad(size, keys.LSJ.PAD_VALUE)]
    sizes = keys.MIN_SIZE_TRAIN if isinstance(keys.MIN_SIZE_TRAIN, Sequence) else (keys.MIN_SIZE_TRAIN,)
    rules = {"rule": keys.RESIZE_RULE, "masks": keys.MASK_RESIZE_RULE}
    resize = ResizeShortestSide(sizes, keys.MAX_SIZE_TRAIN, keys.MIN_SIZE_TRAIN_SAMPLING, **rules)
    crop = keys.DETR_CROP
    if crop.ENABLED:
        if crop.RESIZE_FIRST:
            augmentations.append(resize)
        branch = T.AugmentationList([ResizeShortestSide(crop.MIN_SIZES, **rules), _crop(crop)])
        augmentations.append(T.RandomApply(branch, crop.PROBABILITY))
    augmentations.append(resize)
    return augmentations


def _crop(keys: CfgNode) -> T.Augmentation:
    """The crop of the second branch: of a size from a range, or of a part of the image."""
    relative = list(keys.RELATIVE_SIZE)
    if not relative:
        return RandomCropOfRange(*keys.CROP_RANGE)
    if len(relative) != 2 or not all(0 < part <= 1 for part in relative):
        raise ValueError(
            f"INPUT.DETR_CROP.RELATIVE_SIZE is {relative}: give parts of height and width in (0, 1], as [0.7, 0.7], or "
            "[] for a crop of CROP_RANGE."
        )
    return T.RandomCrop("relative", relative)
