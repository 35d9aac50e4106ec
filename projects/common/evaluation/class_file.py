"""The names of the classes beside a result file, which has their ids only."""

import json
import logging
from pathlib import Path

from detectron2.data import MetadataCatalog

from querymask.common.data.annotations import is_panoptic

logger = logging.getLogger(__name__)

FILE = "classes.json"


def write_class_file(dataset_name: str, folder: str | Path) -> None:
    """Write {category id: name} of a data set to ``classes.json`` in a folder of results."""
    if names := _names_by_id(dataset_name):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def compare_class_file(results: str | Path, dataset_name: str) -> None:
    """Warn where the ``classes.json`` beside a result file has other names than a data set."""
    path = Path(results).with_name(FILE)
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or a file of another program
        return
    present = _names_by_id(dataset_name)
    if isinstance(written, dict) and present and written != present:
        different = [key for key in {**written, **present} if written.get(key) != present.get(key)]
        pairs = [f"{key} is {written.get(key)!r} there, {present.get(key)!r} here" for key in different[:6]]
        logger.warning(
            f"{path} says that the results are of other classes than those of {dataset_name}; of {len(different)} "
            f"categories: {'; '.join(pairs)}"
        )


def _names_by_id(dataset_name: str) -> dict[str, str]:
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("thing_classes") or []
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {index: index for index in range(len(names))}
    if is_panoptic(dataset_name):
        ids = {**ids, **metadata.stuff_dataset_id_to_contiguous_id}
    return {str(id): str(names[index]) for id, index in sorted(ids.items(), key=lambda item: item[1])}
