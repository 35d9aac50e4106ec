"""Make a folder for ``train_net.py --data`` from annotations of other programs.

    python tools/make_coco.py SOURCE OUTPUT [--form masks|labels|cityscapes|yolo|labelme] [--class-name NAME]

The form is recognised: masks, one file an object (NAME/images/*.png and NAME/masks/*.png, or images/NAME.png and
masks/NAME/*.png); label images (images/NAME.png and masks/NAME.png); Cityscapes' *_instanceIds.png; YOLO's text files
for segmentation; labelme's JSON files. OUTPUT gets train.json, val.json and test.json where SOURCE has such parts, else
annotations.json; the photographs; and check.jpg, on which the objects must be where they belong. Photographs that
cannot be used are named and left out; the exit status is 1 if there were any.
"""

import argparse
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
from tabulate import tabulate

from querymask.command_line import make_parser
from querymask.common.data.annotations import clean_coco
from querymask.common.data.conversion import FORMS, Photo, Source, find_form
from querymask.common.data.folders import PARTS, DataFolder
from querymask.common.data.image_files import ImageFileError, read_image
from querymask.common.data.segmentation import segmentation_box
from querymask.common.visualization import PictureNames, contact_sheet, draw_instances, write_image

SHOWN = 9
"""Photographs of check.jpg."""
NAMED = 20
"""Photographs that are left out, and remarks, that are written one by one."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder of photographs and annotations")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to make")
    parser.add_argument("--form", choices=list(FORMS), help="of the annotations (recognised)")
    parser.add_argument("--class-name", default="object", metavar="NAME", help="of what has no name there (object)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, write, count and draw; returns the exit status."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        source = read_source(args.source, args.form, args.class_name)
        for title, lines in (("", source.remarks), ("left out: ", source.left_out)):
            for line in lines[:NAMED]:
                print(f"{title}{line}", file=sys.stderr)
            if len(lines) > NAMED:
                print(f"{title}... and {len(lines) - NAMED} more", file=sys.stderr)
        if args.output.exists() and any(args.output.iterdir()):
            raise ValueError(f"{args.output} is not empty: give a new folder")
        write_folder(source, args.output)
        folder = DataFolder(args.output)
        print(count_table(folder))
        draw_check(folder, args.output / "check.jpg")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(source.photos)} photographs are in {args.output}, {len(source.left_out)} were left out")
    print(f"Look at {args.output / 'check.jpg'}, then: train_net.py --config-file CONFIG --data {args.output}")
    return int(bool(source.left_out))


def read_source(folder: Path, form: str | None, class_name: str) -> Source:
    """What a folder holds.

    Raises:
        ValueError: its form is not known, or nothing in it can be used.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    _, read = FORMS[form or find_form(folder)]
    source = read(folder, class_name)
    if not any(photo.objects for photo in source.photos):
        reasons = "; ".join(source.left_out[:3]) or "there are photographs, but no annotations belong to them"
        raise ValueError(f"{folder} has no photographs with objects: {reasons}")
    parts = {photo.part for photo in source.photos}
    if "" in parts and len(parts) > 1:
        stray = next(photo.file for photo in source.photos if not photo.part)
        raise ValueError(f"some photographs are in parts ({', '.join(sorted(parts)[1:])}), others are not: {stray}")
    return source


def write_folder(source: Source, output: Path) -> None:
    """Write photographs and annotation files."""
    names = list(dict.fromkeys([*source.classes, *(name for photo in source.photos for name, *_ in photo.objects)]))
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    numbers = {name: number for number, name in enumerate(names, start=1)}
    first = 1
    for part in ("", *PARTS):
        photos = [photo for photo in source.photos if photo.part == part]
        if not photos:
            continue
        content = coco_content(photos, numbers, first)
        first += len(content["annotations"])
        folder = output / (part or "images")
        folder.mkdir(parents=True)
        for photo, image in zip(photos, content["images"]):
            if photo.content is None:
                shutil.copyfile(photo.file, folder / image["file_name"])
            else:
                (folder / image["file_name"]).write_bytes(photo.content)
        file = output / f"{part or 'annotations'}.json"
        file.write_text(json.dumps(clean_coco({**content, "categories": categories}, str(file))))


def coco_content(photos: Sequence[Photo], numbers: dict[str, int], first: int) -> dict[str, Any]:
    """Images and annotations as COCO has them; the ids of the latter from ``first`` on."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    unique = PictureNames("")
    for number, photo in enumerate(photos, start=1):
        height, width = photo.size
        name = unique(photo.file) + photo.file.suffix
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for kind, segmentation, crowd in photo.objects:
            common = {"id": first + len(annotations), "image_id": number, "category_id": numbers[kind]}
            x0, y0, x1, y1 = segmentation_box(segmentation)
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({**common, "iscrowd": int(crowd), "bbox": box, "segmentation": segmentation})
    return {"images": images, "annotations": annotations}


def count_table(folder: DataFolder) -> str:
    """Photographs and objects of each class, by part."""
    rows = []
    for part in folder.names:
        entries = folder.entries(part)
        counts = Counter(a["category_id"] for entry in entries for a in entry["annotations"] if not a["iscrowd"])
        empty = sum(not entry["annotations"] for entry in entries)
        objects = [counts[index] for index in range(len(folder.classes))]
        rows.append([part, len(entries), empty, *objects])
    return tabulate(rows, ["part", "photographs", "without objects", *folder.classes], tablefmt="pipe")


def draw_check(folder: DataFolder, path: Path) -> None:
    """Some photographs of all parts with their objects on one picture."""
    entries = [entry for part in folder.names for entry in folder.entries(part) if entry["annotations"]]
    chosen = entries[:: max(len(entries) // SHOWN, 1)][:SHOWN]
    pictures, titles = [], []
    for entry in chosen:
        try:
            image = read_image(entry["file_name"])
        except ImageFileError as error:
            print(f"not drawn: {error}", file=sys.stderr)
            continue
        pictures.append(draw_instances(image, entry["annotations"], folder.classes))
        titles.append(f"{Path(entry['file_name']).name}, {len(entry['annotations'])} objects")
    if pictures:
        write_image(path, contact_sheet(pictures, 3, titles))


if __name__ == "__main__":
    sys.exit(main())
