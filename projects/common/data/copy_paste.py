"""Simple Copy-Paste (Ghiasi et al. 2021): instances of one training image on another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from querymask.common.data.mapper import InstanceMapper

# Objects that are covered are kept while at least this part of their pixels is seen, as those at an image's border are
LEAST_VISIBLE = 0.05


def copy_paste(item: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Paste a random choice of a source's instances, where they lie there, onto an image.

    Both have been augmented; with large-scale jitter (``INPUT.LSJ``) they have one size and objects of many scales, as
    in the paper. Otherwise what lies beyond the image is cut off. Covered instances get the boxes of what is left of
    their masks, and are left out below ``LEAST_VISIBLE``. The paper's blending of borders, which it found without
    effect, is left out.

    Args:
        item, source: outputs of the mapper with masks; of the second, every instance comes with probability 1/2.

    Returns:
        A new item; the pasted instances are the last ones.
    """
    instances = source["instances"]
    chosen = instances[torch.from_numpy(np.flatnonzero(np.random.rand(len(instances)) < 0.5))]
    height, width = item["image"].shape[1:]
    masks = torch.zeros((len(chosen), height, width), dtype=torch.bool)
    rows, columns = min(height, source["image"].shape[1]), min(width, source["image"].shape[2])
    masks[:, :rows, :columns] = chosen.gt_masks.tensor[:, :rows, :columns]
    seen = masks.any(1).any(1)
    chosen, masks = chosen[seen], masks[seen]
    if not len(chosen):
        return item
    pasted = masks.any(0)
    image = item["image"].clone()
    image[:, :rows, :columns] = torch.where(
        pasted[:rows, :columns], source["image"][:, :rows, :columns], image[:, :rows, :columns]
    )
    return {**item, "image": image, "instances": _joined(item["instances"], chosen, masks, pasted)}


def _joined(present: Instances, chosen: Instances, masks: torch.Tensor, pasted: torch.Tensor) -> Instances:
    """Instances under and on a pasted region (H, W)."""
    before = present.gt_masks.tensor
    left = before & ~pasted
    areas, rest = before.sum((1, 2)), left.sum((1, 2))
    boxes = present.gt_boxes.tensor.clone()
    covered = rest < areas
    boxes[covered] = BitMasks(left[covered]).get_bounding_boxes().tensor
    kept = ~covered | (rest > LEAST_VISIBLE * areas)
    joined = Instances(present.image_size)
    joined.gt_boxes = Boxes(torch.cat((boxes[kept], BitMasks(masks).get_bounding_boxes().tensor)))
    joined.gt_classes = torch.cat((present.gt_classes[kept], chosen.gt_classes))
    joined.gt_masks = BitMasks(torch.cat((left[kept], masks)))
    return joined


class CopyPasteMapper:
    """A mapper that pastes instances of a random other image where that is drawn.

    Args:
        mapper: of training, with masks.
        dataset: entries to take the other image from.
        probability: of pasting.

    Raises:
        ValueError: another probability than 0 to 1, or a mapper without masks.
    """

    def __init__(self, mapper: InstanceMapper, dataset: Sequence[dict[str, Any]], probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"INPUT.COPY_PASTE is a probability, between 0 and 1, not {probability}.")
        if not mapper.use_masks:
            raise ValueError("INPUT.COPY_PASTE needs masks, and the model has none: set it to 0.")
        self.mapper = mapper
        self.dataset = dataset
        self.probability = probability

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """As the mapper."""
        item = self.mapper(entry)
        if item is None or np.random.rand() >= self.probability:
            return item
        source = self.mapper(self.dataset[np.random.randint(len(self.dataset))])
        if source is None:
            return item
        item = copy_paste(item, source)
        if 0 < self.mapper.max_instances < len(item["instances"]):
            kept = np.random.choice(len(item["instances"]), self.mapper.max_instances, replace=False)
            item["instances"] = item["instances"][torch.from_numpy(np.sort(kept))]
        return item
