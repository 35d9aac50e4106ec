"""What the cases of EffSeg share: inputs and weights by name, pasting in an independent form, what follows it."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from cases import fixture, load_manifest
from torch import Tensor, nn

from querymask.effseg.fqdet.suppression import Detections


def make_input(case: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A float64 input of a case."""
    name = f"{case['input_prefix']}.{name}"
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))


def official_state(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a case's checkpoint by their official names, with the case's overrides."""
    return fixed_weights(load_manifest("effseg", case["checkpoint_file"]), case["overrides"])


def fixed_weights(
    manifest: Mapping[str, list[int]], overrides: Mapping[str, Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """Weights by name for the keys and shapes of a checkpoint, some of them multiplied or added to."""
    state = {key: fixture().weight(key, shape) for key, shape in manifest.items()}
    for operation, entries in overrides.items():
        for key, number in entries.items():
            assert operation in ("multiply", "add"), f"unknown override: {operation}"
            state[key] = state[key] * number if operation == "multiply" else state[key] + number
    return state


def paste(masks: Tensor, boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Bilinear reads of the masks at the canvas' pixel centres, zero outside of them."""
    y, x = (torch.arange(size, dtype=boxes.dtype) + 0.5 for size in canvas)
    x = 2 * (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) - 1
    y = 2 * (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) - 1
    grid = torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], -1)
    return nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


class PastedDetections:
    """Masks and scores of the detections of all images, beside a case's arrays.

    Args:
        compare: (values, name of the array, tolerance = 1e-5).
    """

    def __init__(self, compare: Callable[..., None]) -> None:
        self.compare = compare
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, image: int, pasted: Tensor, found: Detections, queries: Tensor) -> None:
        """The detections of an image with their pasted probabilities and their queries, counted over all images."""
        # The case's boxes are rounded to float32: 1e-5 of a pixel, across which a mask can fall from 1 to 0 at its rim
        self.compare(pasted[::10, ::4, ::4], f"img{image}_pasted_scores", tolerance=5e-5)
        masks = pasted > 0.5
        area = masks.sum((1, 2))
        for key, value in (
            ("seg_labels", found.labels),
            ("seg_scores", found.scores * (pasted * masks).sum((1, 2)) / (area + 1e-6)),
            ("seg_image", torch.full_like(found.labels, image)),
            ("seg_query", queries),
            ("seg_mask_area", area),
            ("seg_masks_packed", masks),
        ):
            self.rows.setdefault(key, []).append(value)

    def compare_all(self) -> None:
        """After the last image."""
        rows = {key: torch.cat(values) for key, values in self.rows.items()}
        masks = rows.pop("seg_masks_packed")
        self.compare(np.packbits(masks[::8].numpy(), axis=-1), "seg_masks_packed")
        for key, values in rows.items():
            self.compare(values, key)
