"""Draw the detections of several models side by side, from their result files (ISDA's Figure 6, for any models).

    python tools/compare_results.py --dataset coco_2017_val --output FOLDER ISDA=a.json "Mask R-CNN=b.json" [...]

A result file is what evaluation writes as inference/coco_instances_results.json: COCO's result format, of any code.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from querymask.command_line import make_parser
from querymask.common.data.annotations import read_dataset
from querymask.common.data.image_files import ImageReader
from querymask.common.evaluation.result_pictures import class_indices, draw_results, results_by_image
from querymask.common.fonts import set_font
from querymask.common.visualization import PictureNames, write_image


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, draw, write; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="registered data set of the results")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures are written")
    parser.add_argument("--num-images", type=int, default=8, help="first images of the set (default: 8)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score drawn (default: 0.3)")
    parser.add_argument("--font", default="", metavar="FILE", help="as VIS_FONT of a config")
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        default=(),
        metavar=("LOW", "HIGH"),
        help="as INPUT.PIXEL_RANGE of a config",
    )
    parser.add_argument("--max-pixels", type=int, default=0, metavar="N", help="as INPUT.MAX_PIXELS of a config")
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="title and result file of every model")
    args = parser.parse_args(arguments)
    try:
        pairs = [model.partition("=")[::2] for model in args.models]
        if missing := [name for name, path in pairs if not path]:
            raise ValueError(f"{missing[0]}: give every model as NAME=FILE")
        results = {name: results_by_image(path, args.dataset) for name, path in pairs}
        entries = read_dataset(args.dataset)[: args.num_images]
        class_names, ids = MetadataCatalog.get(args.dataset).thing_classes, class_indices(args.dataset)
        set_font(args.font)
        reader = ImageReader("RGB", tuple(args.pixel_range), args.max_pixels)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed, names = 0, PictureNames(".png")
    for entry in tqdm(entries, unit="image"):
        name = names(entry["file_name"])
        try:
            sheet = draw_results(entry, reader(entry["file_name"]), results, class_names, ids, args.score_threshold)
            write_image(Path(args.output) / name, sheet)
        except Exception as error:  # whatever it is, the other pictures are made
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            tqdm.write(f"error: there is no picture of {entry['file_name']}: {kind}{error}", file=sys.stderr)
            failed += 1
    if failed < len(entries):
        print(f"{len(entries) - failed} pictures are in {args.output}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
