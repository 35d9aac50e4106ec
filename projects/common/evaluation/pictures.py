"""Pictures of predictions beside ground truth, written while a data set is evaluated."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class PictureWriter(DatasetEvaluator):
    """Draws the first images of a data set; has no metrics. A new evaluation replaces the pictures of the last one.

    Args:
        folder: of the pictures, named like the images.
        num_images: how many.
        score_threshold: predictions below it are not drawn.
    """

    def __init__(self, dataset_name: str, folder: str, num_images: int, score_threshold: float) -> None:
        self._dataset_name = dataset_name
        self._folder = folder
        self._num_images = num_images
        self._score_threshold = score_threshold
        self._written = 0
        self._records: dict[object, dict] | None = None

    def reset(self) -> None:
        self._written = 0

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Draw, in the main process only: it has the first images of the data set."""
        if not comm.is_main_process():
            return
        for record, output in zip(inputs, outputs, strict=True):
            if self._written == self._num_images:
                return
            self._draw(record, output)
            self._written += 1

    def _draw(self, record: dict, output: dict) -> None:
        from querymask.common.visualization import save_comparison  # matplotlib and more, not needed for training

        if self._records is None:  # the model's inputs have no annotations
            self._records = {entry["image_id"]: entry for entry in DatasetCatalog.get(self._dataset_name)}
        instances = output["instances"].to("cpu")
        path = os.path.join(self._folder, f"{Path(record['file_name']).stem}.png")
        metadata = MetadataCatalog.get(self._dataset_name)
        save_comparison(self._records[record["image_id"]], instances, metadata, path, self._score_threshold)

    def evaluate(self) -> None:
        if self._written:
            logger.info(f"{self._written} pictures of predictions beside ground truth are in {self._folder}")
        self._records = None
