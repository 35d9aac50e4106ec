"""From what other programs write to COCO's format: a function for each form of annotations."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from querymask.common.data.annotations import AnnotationError
from querymask.common.data.conversion.labelme import is_labelme, read_labelme
from querymask.common.data.conversion.masks import (
    has_instance_ids,
    has_label_images,
    has_object_masks,
    read_instance_ids,
    read_label_images,
    read_object_masks,
)
from querymask.common.data.conversion.source import Photo, Source
from querymask.common.data.conversion.yolo import is_yolo, read_yolo
from querymask.common.data.folders import find_layout

FORMS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str], Source]]] = {
    "masks": (has_object_masks, read_object_masks),
    "labels": (has_label_images, read_label_images),
    "cityscapes": (has_instance_ids, read_instance_ids),
    "yolo": (is_yolo, read_yolo),
    "labelme": (is_labelme, read_labelme),
}
"""Name -> whether a folder looks so, and its reader, which takes the folder and a name for classes without one."""


def find_form(folder: Path) -> str:
    """The form of the annotations of a folder.

    Raises:
        ValueError: none or several.
    """
    found = [name for name, (looks_so, _) in FORMS.items() if looks_so(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} may be of the forms {', '.join(found)}: choose one with --form")
    with suppress(AnnotationError):
        name, _ = find_layout(folder)
        raise ValueError(f"{folder} has COCO's format ({name}): give it to train_net.py --data as it is")
    raise ValueError(
        f"{folder} is of none of the known forms: masks, one file an object (NAME/images/*.png and NAME/masks/*.png, "
        "or images/NAME.png and masks/NAME/*.png), label images (images/NAME.png and masks/NAME.png), Cityscapes' "
        "*_instanceIds.png, YOLO's text files (images/, labels/ and data.yaml), labelme's JSON files"
    )


__all__ = ["FORMS", "Photo", "Source", "find_form"]
