"""Masks of instances: reading them, cutting them out at boxes, pasting them into images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import BitMasks, Instances
from torchvision.ops import roi_align

from querymask.common.ops.exporting import exportable
from querymask.common.precision import full_precision
from querymask.common.transfer import PackedMasks, masks_to_device, numbers_to_device

Bands = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Probabilities of the masks of an image: (numbers (k,) of masks, first row of the canvas, the one after the last) ->
(k, rows, width). All canvases at once would be gigabytes."""


def instance_masks(instances: Instances) -> torch.Tensor:
    """Ground-truth masks of an image as (n, H, W) bool, from bitmasks, their bits, or polygons."""
    if not instances.has("gt_masks"):
        raise ValueError(
            "instances have no gt_masks, which the mask branch needs: let the mapper give them, or switch the branch "
            "off: MODEL.MASK_BRANCH.NAME none"
        )
    masks = instances.gt_masks
    if isinstance(masks, PackedMasks):
        return masks.unpack(instances.gt_classes.device)
    if not len(masks):  # Detectron2 0.5 cannot convert an empty list of polygons
        return torch.zeros(0, *instances.image_size, dtype=torch.bool, device=instances.gt_classes.device)
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks_to_device(masks.tensor, instances.gt_classes.device)


def mask_coverage(
    masks: torch.Tensor, boxes: torch.Tensor, size: int, index: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of each cell of a box its mask covers: RoIAlign with ceil(side / size) samples per cell and axis.

    Args:
        masks: (n, H, W) bool, or 0 and 1.
        boxes: (m, 4) XYXY in pixels of the masks.
        size: cells a side.
        index: (m,) the mask of each box; None: one box a mask, m = n.

    Returns:
        (m, size, size) in [0, 1], in the boxes' precision, at least float32.
    """
    boxes = full_precision(boxes)
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    if index is None:
        index = torch.arange(len(boxes), device=boxes.device)
    rois = torch.cat((index[:, None].to(boxes.dtype), boxes), dim=1)
    return roi_align(masks[:, None].to(boxes.dtype), rois, size, sampling_ratio=0, aligned=True)[:, 0]


def crop_masks(masks: torch.Tensor, boxes: torch.Tensor, size: int, index: torch.Tensor | None = None) -> torch.Tensor:
    """Cut every mask out at its box and resize it to a square: the cells of which it covers half.

    In float32 the same as Detectron2's ``BitMasks.crop_and_resize``.

    Args:
        masks, boxes, size, index: as for :func:`mask_coverage`.

    Returns:
        (m, size, size) bool.
    """
    return mask_coverage(masks, boxes, size, index) >= 0.5


def bilinear_weights(positions: torch.Tensor, cells: int) -> torch.Tensor:
    """What bilinear sampling takes of the cells of one axis, cell i having its centre at i; zero beyond the last ones.

    Args:
        positions: (...).

    Returns:
        (..., cells).
    """
    numbers = torch.arange(cells, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[..., None] - numbers).abs()).clamp(min=0)


def paste_by_products(maps: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Square maps (n, size, size) put into their boxes (n, 4) XYXY of an image, in the form for export.

    Returns:
        (n, height, width): bilinear at pixel centres, zero outside of the map and for boxes that are empty or not
        finite.
    """
    weights = []  # of x, then of y: (n, pixels, size)
    for axis, side in enumerate((width, height)):
        low, high = boxes[:, axis, None], boxes[:, 2 + axis, None]
        centres = torch.arange(side, dtype=boxes.dtype, device=boxes.device) + 0.5
        weights.append(bilinear_weights((centres - low) / (high - low) * maps.shape[-1] - 0.5, maps.shape[-1]))
    pasted = weights[1] @ maps.to(boxes.dtype) @ weights[0].transpose(1, 2)
    proper = (boxes[:, :2] < boxes[:, 2:]).all(1) & boxes.isfinite().all(1)
    return pasted.where(proper[:, None, None], 0)


def _paste_masks_by_products(
    maps: torch.Tensor, boxes: torch.Tensor, height: int, width: int, threshold: float
) -> torch.Tensor:
    return paste_by_products(maps, boxes, height, width) >= threshold


@exportable(_paste_masks_by_products)
def paste_masks(maps: torch.Tensor, boxes: torch.Tensor, height: int, width: int, threshold: float) -> torch.Tensor:
    """Put square maps into their boxes of an image: bilinear sampling at pixel centres, zero outside of the map.

    Args:
        maps: (n, size, size) bool or float.
        boxes: (n, 4) XYXY in pixels; may reach beyond the image or lie outside of it. Empty and nan boxes give empty
            masks.
        threshold: foreground is what reaches it.

    Returns:
        (n, height, width) bool.
    """
    if not len(maps):
        return maps.new_zeros((0, height, width), dtype=torch.bool)
    if not maps.is_floating_point():
        maps = maps.to(boxes.dtype)
    low, high = boxes[:, :2], boxes[:, 2:]
    limit = numbers_to_device([width, height], boxes.dtype, boxes.device)
    visible = ((low < high) & (high > 0) & (low < limit)).all(1)
    if boxes.device.type == "cpu" and visible.all():  # a GPU would have to be waited for
        return paste_masks_in_image(maps, boxes, (height, width), threshold=threshold)
    anywhere = torch.cat([torch.zeros_like(limit), torch.ones_like(limit)])
    masks = paste_masks_in_image(maps, boxes.where(visible[:, None], anywhere), (height, width), threshold=threshold)
    return masks.logical_and_(visible[:, None, None])


def paste_probabilities(
    maps: torch.Tensor, boxes: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> torch.Tensor:
    """Probabilities at pixel centres of a part of the canvas: bilinear, zero outside of the map.

    Each pixel's probability is wanted, of any part of the canvas, where :func:`paste_masks` gives masks of the whole.

    Args:
        maps: (n, S, S).
        boxes: (n, 4) x0, y0, x1, y1 in pixels; may reach beyond the canvas. Empty ones and such that are not finite
            give zeros.
        rows, columns: first, and the one after the last.

    Returns:
        (n, rows, columns).
    """
    proper = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    x, y = (
        2 * (torch.arange(*span, device=boxes.device) + 0.5 - boxes[:, axis, None]) / sides[:, None] - 1
        for axis, (span, sides) in enumerate(zip((columns, rows), (boxes[:, 2:] - boxes[:, :2]).unbind(1), strict=True))
    )
    # So far outside, positions need no precision, but must not overflow when they are rounded
    x, y = (torch.where(proper[:, None], position, 2.0).clamp(-3, 3) for position in (x, y))
    grid = torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1)
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0]


def _paste_bands_by_products(maps: torch.Tensor, boxes: torch.Tensor, width: int) -> Bands:
    maps, boxes = full_precision(maps), full_precision(boxes)
    return lambda numbers, top, bottom: paste_by_products(maps[numbers], boxes[numbers], bottom, width)[:, top:]


@exportable(_paste_bands_by_products)
def pasted_bands(maps: torch.Tensor, boxes: torch.Tensor, width: int) -> Bands:
    """Bands of the canvas into which maps are pasted by :func:`paste_probabilities`.

    Args:
        maps: (n, S, S).
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the canvas.
        width: of the canvas.
    """
    maps = full_precision(maps)
    boxes = full_precision(boxes).to(maps.dtype)

    def band(numbers: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        own, places = maps[numbers], boxes[numbers]
        if not uses_windows(places.device):
            return paste_probabilities(own, places, (top, bottom), (0, width))
        pasted = own.new_zeros(len(own), bottom - top, width)
        for index, ((first, last), columns) in enumerate(box_windows(places, (bottom, width))):
            rows = max(first, top), max(last, top)
            part = paste_probabilities(own[index : index + 1], places[index : index + 1], rows, columns)
            pasted[index, rows[0] - top : rows[1] - top, slice(*columns)] = part[0]
        return pasted

    return band


def box_windows(boxes: torch.Tensor, canvas: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of the canvas, first and the one after the last, that hold each box and a pixel around it.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in pixels, whose values the host waits for.
        canvas: height and width.
    """
    height, width = canvas
    spans = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).nan_to_num()
    spans = spans.minimum(spans.new_tensor([width, height, width, height])).clamp(min=0)
    return [((y0, max(y0, y1)), (x0, max(x0, x1))) for x0, y0, x1, y1 in spans.long().tolist()]


def uses_windows(device: torch.device) -> bool:
    """Whether reading boxes costs nothing, which on a GPU makes the host wait."""
    return device.type == "cpu"


def resize_masks(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resize in which any positive weight on foreground makes foreground: what torchvision does to booleans.

    Args:
        masks: (..., H, W) bool.
        height, width: wanted.

    Returns:
        (..., height, width) bool.
    """
    return _resize_axis(_resize_axis(masks, -2, height), -1, width)


def _resize_axis_anyway(masks: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    low, high = _bilinear_neighbours(masks.shape[axis], size, masks.device)
    return masks.index_select(axis, low) | masks.index_select(axis, high)


@exportable(_resize_axis_anyway)
def _resize_axis(masks: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return masks if masks.shape[axis] == size else _resize_axis_anyway(masks, axis, size)


def _bilinear_neighbours(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The two cells of ``old`` that have a positive weight in each of ``new``, twice the same where there is but one.

    In integers: rounding would give weights to neighbours that have none.
    """
    position = ((2 * torch.arange(new, device=device) + 1) * old - new).clamp(min=0)  # times 2 * new
    low = torch.div(position, 2 * new, rounding_mode="floor")
    high = low + (position > low * 2 * new).long()
    return low.clamp(max=old - 1), high.clamp(max=old - 1)


def pad_masks(masks: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """(n, H, W) of an image -> (n, *canvas), padded with background at the right and the bottom."""
    return F.pad(masks, (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))
