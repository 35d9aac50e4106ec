"""The masks of data sets cut out at their boxes, for what learns a mask coding. No image is read, but the
PNG files of panoptic data sets.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from querymask.common.data.annotations import read_dataset
from querymask.common.data.segment_maps import entry_segment_map
from querymask.common.data.segmentation import crop_polygons, decode_segmentation
from querymask.common.masks import crop_masks


class MaskCrops(Dataset):
    """Every annotation that is no crowd, in the order of the data sets, as a square mask inside its own box.

    Polygons are moved and scaled, then rasterised; other segmentations are cut out of the image's bitmask as training
    targets are.

    Args:
        names: registered data sets with segmentations.
        size: side of the masks.
        limit: take the first so many only; 0: all.

    Raises:
        KeyError: a data set is not registered.
        ValueError: there are no masks.
    """

    def __init__(self, names: Sequence[str], size: int, limit: int = 0) -> None:
        self.size = size
        self.entries = []
        for name in names:
            for image in read_dataset(name):
                for annotation in image.get("annotations", ()):
                    if not annotation["iscrowd"] and ("segmentation" in annotation or "pan_seg_file_name" in image):
                        self.entries.append((annotation, image))
        if limit:
            self.entries = self.entries[:limit]
        if not self.entries:
            raise ValueError(f"the data sets {', '.join(names)} have no masks: name some with segmentations")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(size, size) bool."""
        annotation, image = self.entries[index]
        box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        if "pan_seg_file_name" in image:
            bitmask = entry_segment_map(image) == annotation["id"]
        elif isinstance(annotation["segmentation"], list):
            return torch.from_numpy(crop_polygons(annotation["segmentation"], box, self.size))
        else:
            bitmask = decode_segmentation(annotation["segmentation"], image["height"], image["width"])
        mask = torch.from_numpy(bitmask).to(torch.bool)
        return crop_masks(mask[None], torch.tensor([box], dtype=torch.float64), self.size)[0]
