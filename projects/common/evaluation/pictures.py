"""Pictures of predictions beside ground truth, written while a data set is evaluated."""

import logging
import os
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from querymask.common.data.annotations import read_dataset
from querymask.common.data.image_files import ImageReader
from querymask.common.detections import PanopticDetections
from querymask.common.visualization import PictureNames

logger = logging.getLogger(__name__)


class PictureWriter(DatasetEvaluator):
    """Draws the first images of a data set; has no metrics. A new evaluation replaces the pictures of the last one.

    A picture that cannot be drawn is reported and left out: it does not cost the run its AP.

    Args:
        folder: of the pictures, named like the images.
        num_images: how many.
        score_threshold: predictions below it are not drawn.
        reader: of the image files, for RGB.
    """

    def __init__(
        self,
        dataset_name: str,
        folder: str,
        num_images: int,
        score_threshold: float,
        reader: ImageReader = ImageReader(),  # noqa: B008 (it is immutable)
    ) -> None:
        self._dataset_name = dataset_name
        self._folder = folder
        self._num_images = num_images
        self._score_threshold = score_threshold
        self._reader = reader
        self.reset()
        self._records: dict[object, dict] | None = None

    def reset(self) -> None:
        self._seen = self._written = 0
        self._names = PictureNames(".png")

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Draw, in the main process only: it has the first images of the data set."""
        if not comm.is_main_process():
            return
        for record, output in zip(inputs, outputs, strict=True):
            if self._seen == self._num_images:
                return
            self._seen += 1
            try:
                self._draw(record, output)
                self._written += 1
            except Exception as error:  # whatever it is, the evaluation goes on
                logger.warning(f"there is no picture of {record.get('file_name')}: {type(error).__name__}: {error}")

    def _draw(self, record: dict, output: dict) -> None:
        from querymask.common.visualization import save_comparison  # matplotlib and more, not needed for training

        if self._records is None:  # the model's inputs have no annotations
            self._records = {entry["image_id"]: entry for entry in read_dataset(self._dataset_name)}
        if "panoptic_seg" in output:
            instances = PanopticDetections.from_output(output["panoptic_seg"], ()).to_instances()
        else:
            instances = output["instances"].to("cpu")
        path = os.path.join(self._folder, self._names(record["file_name"]))
        metadata = MetadataCatalog.get(self._dataset_name)
        entry = self._records[record["image_id"]]
        save_comparison(entry, instances, metadata, path, self._score_threshold, self._reader)

    def evaluate(self) -> None:
        if self._written:
            logger.info(f"{self._written} pictures of predictions beside ground truth are in {self._folder}")
        self._records = None
