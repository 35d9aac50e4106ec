"""What a model finds in an image, and the forms in which other programs read it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from querymask.common.data.segmentation import encode_masks
from querymask.common.packages import import_package
from querymask.common.run_length_masks import RunLengthMasks
from querymask.common.transfer import HostCopy

if TYPE_CHECKING:
    import supervision

HIGHEST_LABEL = 65535
"""Of an object in a label image, which has 16 bits."""


@dataclass(frozen=True)
class Detections:
    """The objects of an image, the highest score first.

    Attributes:
        size: (height, width) of the image that boxes and masks are of, in pixels.
        scores: (n,) float32, in [0, 1].
        labels: (n,) int64, the classes, counted from 0.
        names: (n) of the classes; "class 3" where the model knows none.
        boxes: (n, 4) float32, x0, y0, x1, y1 in pixels; None where the model finds no boxes.
        masks: (n, H, W) bool; run lengths where the model sees an image in slices, (n, H, W) would be too large then;
            None where it makes no masks.
    """

    size: tuple[int, int]
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    boxes: np.ndarray | None
    masks: np.ndarray | RunLengthMasks | None

    @classmethod
    def from_instances(cls, instances: Instances, class_names: Sequence[str]) -> "Detections":
        """Detectron2's detections, on the CPU, by descending score."""
        labels = instances.pred_classes.numpy()
        masks = instances.pred_masks if instances.has("pred_masks") else None
        if isinstance(masks, torch.Tensor):
            masks = masks.numpy().astype(bool, copy=False)
        return cls(
            size=tuple(instances.image_size),
            scores=instances.scores.numpy(),
            labels=labels,
            names=_names_of(labels, class_names),
            boxes=instances.pred_boxes.tensor.numpy() if instances.has("pred_boxes") else None,
            masks=masks,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, rows: Sequence[int]) -> "Detections":
        """Those of these rows."""
        rows = np.asarray(rows, dtype=np.int64)
        return Detections(
            size=self.size,
            scores=self.scores[rows],
            labels=self.labels[rows],
            names=[self.names[row] for row in rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            masks=None if self.masks is None else self.masks[rows],
        )

    def to_instances(self) -> Instances:
        """As Detectron2 has them."""
        fields = {"scores": torch.from_numpy(self.scores), "pred_classes": torch.from_numpy(self.labels)}
        if self.boxes is not None:
            fields["pred_boxes"] = Boxes(torch.from_numpy(self.boxes))
        if self.masks is not None:
            fields["pred_masks"] = torch.from_numpy(self.masks) if isinstance(self.masks, np.ndarray) else self.masks
        return Instances(self.size, **fields)

    def run_lengths(self) -> list[dict[str, Any]] | None:
        """The masks as COCO's compressed RLE, ``{"size": [H, W], "counts": str}`` each; None where there are none."""
        if isinstance(self.masks, RunLengthMasks):
            return self.masks.texts()
        return None if self.masks is None else encode_masks(self.masks)

    def to_coco(
        self, image_id: Any, category_ids: Sequence[Any] | None = None, size: tuple[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """In COCO's result format.

        Args:
            image_id: of the data set.
            category_ids: of the classes; None: their number from 0.
            size: (height, width) to which boxes and masks are scaled, one mask at a time; None: as they are.
        """
        height, width = size or self.size
        scale = np.array([width / self.size[1], height / self.size[0]] * 2)
        masks = self._masks_of(height, width)
        results = []
        for row, (label, score) in enumerate(zip(self.labels.tolist(), self.scores.tolist())):
            category = label if category_ids is None else category_ids[label]
            result = {"image_id": image_id, "category_id": category, "score": score}
            if self.boxes is not None:
                x0, y0, x1, y1 = (self.boxes[row] * scale).tolist()
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if self.masks is not None:
                (result["segmentation"],) = encode_masks(next(masks)[None])
            results.append(result)
        return results

    def label_image(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """The number of each pixel's object, 1 for the highest score; 0 for none, of several the highest score counts.

        Args:
            size: (height, width) of the result; None: as the masks.

        Returns:
            uint16 [height, width].

        Raises:
            ValueError: there are no masks, or more objects than 16 bits count.
        """
        if self.masks is None:
            raise ValueError("the model makes no masks, of which a label image consists: take one with a mask branch")
        if len(self) > HIGHEST_LABEL:
            raise ValueError(f"{len(self)} objects are more than the {HIGHEST_LABEL} of a label image: raise the score")
        image = np.zeros(size or self.size, np.uint16)
        for number, mask in enumerate(self._masks_of(*image.shape), start=1):
            image[mask & (image == 0)] = number
        return image

    def to_supervision(self) -> "supervision.Detections":
        """For the package supervision; boxes of models without are those around the masks, names in ``class_name``."""
        package = import_package("supervision", "to_supervision needs", "supervision")
        masks = self.masks
        if isinstance(masks, RunLengthMasks):
            masks = np.array([*self._masks_of(*self.size)], bool).reshape(-1, *self.size)
        boxes = _boxes_of(masks) if self.boxes is None else self.boxes
        return package.Detections(
            xyxy=boxes,
            mask=masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _masks_of(self, height: int, width: int) -> Iterator[np.ndarray]:
        """Masks (height, width) bool, made one at a time: all of a large photograph would fill the memory."""
        for number in range(0 if self.masks is None else len(self)):
            mask = (
                self.masks.decode(number).astype(bool) if isinstance(self.masks, RunLengthMasks) else self.masks[number]
            )
            if mask.shape != (height, width):
                values = mask.astype(np.uint8) * 255
                mask = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR) >= 128
            yield mask


@dataclass(frozen=True)
class PanopticDetections(Detections):
    """The segments of an image, of which no two have a pixel in common; the highest score first, and without boxes.

    Attributes:
        things: (n,) bool, whether a segment is a thing; stuff has one segment a class.
        ids: (H, W) int32, the panoptic map: number of each pixel's segment, 1 for the first one; 0: void.
    """

    things: np.ndarray
    ids: np.ndarray

    @classmethod
    def from_output(
        cls,
        output: tuple[torch.Tensor, Sequence[Mapping[str, Any]]],
        class_names: Sequence[str],
        score_threshold: float = 0.0,
    ) -> "PanopticDetections":
        """Detectron2's ``panoptic_seg``; segments of a lower score become void."""
        ids, segments = HostCopy(output[0]).read().numpy(), output[1]
        chosen = [segment for segment in segments if segment["score"] >= score_threshold]
        chosen.sort(key=lambda segment: -segment["score"])
        numbers = np.zeros(1 + max((segment["id"] for segment in segments), default=0), np.int32)
        numbers[[segment["id"] for segment in chosen]] = np.arange(1, 1 + len(chosen))
        ids = numbers[ids]
        labels = np.array([segment["category_id"] for segment in chosen], np.int64)
        return cls(
            size=ids.shape,
            scores=np.array([segment["score"] for segment in chosen], np.float32),
            labels=labels,
            names=_names_of(labels, class_names),
            boxes=None,
            masks=ids == np.arange(1, 1 + len(chosen))[:, None, None],
            things=np.array([segment["isthing"] for segment in chosen], bool),
            ids=ids,
        )

    def label_image(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """The panoptic map as uint16 of another ``size`` (height, width)."""
        ids = self.ids.astype(np.uint16)
        return ids if size is None else cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST)

    def _masks_of(self, height: int, width: int) -> Iterator[np.ndarray]:
        ids = self.label_image((height, width))
        return (ids == number for number in range(1, 1 + len(self)))


def _names_of(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    return [str(class_names[i]) if i < len(class_names) else f"class {i}" for i in labels.tolist()]


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """(n, 4) float32 x0, y0, x1, y1 around masks (n, H, W); zeros for an empty one."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks):
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        box[:] = x, y, x + width, y + height
    return boxes
