"""Detect and draw: images, folders, patterns, a video, a webcam or a page to try, with any config and checkpoint.

    python demo.py --run FOLDER --input a.jpg folder "holiday/*.png" --output FOLDER
    python demo.py --config-file FILE --input a.jpg folder "holiday/*.png" --output FOLDER --opts MODEL.WEIGHTS FILE
    python demo.py --config-file FILE --test-images 8 --output FOLDER --opts MODEL.WEIGHTS FILE
    python demo.py --config-file FILE --video-input FILE --output FILE.mp4 --opts MODEL.WEIGHTS FILE
    python demo.py --config-file FILE --webcam --opts MODEL.WEIGHTS FILE
    python demo.py --run FOLDER --slice 640 --input large.tif --output FOLDER
    python demo.py --run FOLDER --serve --compare FOLDER

--run takes config and weights of a training run: its best checkpoint where one was kept, else its last. Without
--output, pictures are shown in a window. Pictures have at most 1280 pixels on their longer side. Beside them are the
detections as COCO JSON, in the pixels of the files: detections.json, and images.json with the images and classes that
its ids mean (of a video OUT.mp4, OUT.detections.json and OUT.images.json). --label-images adds labels/NAME.png of 16
bits, whose pixels have the number of their object: 1 for the first of the image in detections.json.

--view shows what goes on inside a method in place of detections: reference_points (ISDA), stages (ISTR), coefficients
(SOLQ), refinement (EffSeg). Files that cannot be read or drawn are reported and left out; the exit status is 1 if there
were any.

--serve opens a page at http://127.0.0.1:7860 for this machine alone (--serve 0.0.0.0:7860: for all that reach it), with
an image to drop, the score, the classes, the views and the files; --compare shows another run beside it, or another
checkpoint of the same config. It needs the extra serve (gradio).
"""

import argparse
import glob
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
import cv2
import numpy as np
from detectron2.config import CfgNode
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from querymask.command_line import add_data, load_config, load_run, make_parser
from querymask.common.data.annotations import read_dataset
from querymask.common.data.image_files import IMAGE_ENDINGS, find_file
from querymask.common.data.read_ahead import read_ahead
from querymask.common.detection_files import DetectionWriter, model_categories
from querymask.common.detections import Detections
from querymask.common.fonts import set_font
from querymask.common.predictor import Predictor, explain
from querymask.common.views import choose_view, find_views
from querymask.common.visualization import LONGER_SIDE_RANGE, PictureNames, draw_instances, write_image
from querymask.serve import DEFAULT_ADDRESS, ServedModel, import_gradio, parse_address, serve

WINDOW = "QueryMask (q: quit)"
Draw = Callable[[np.ndarray], tuple[np.ndarray, Detections | None]]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE")
    model.add_argument("--run", metavar="FOLDER", help="OUTPUT_DIR of a training run")
    add_data(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, folders of images, or patterns in quotes")
    source.add_argument("--test-images", type=int, metavar="N", help="the first images of DATASETS.TEST")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera")
    source.add_argument(
        "--serve",
        nargs="?",
        type=parse_address,
        const=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"a page to try the model on (default: {DEFAULT_ADDRESS})",
    )
    parser.add_argument("--compare", metavar="PATH", help="on the page, too: another run's folder, or a checkpoint")
    parser.add_argument("--output", metavar="PATH", help="folder of the pictures; for a video or camera, an .mp4 file")
    parser.add_argument("--label-images", action="store_true", help="write a label image of every image, too")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="least score drawn (default: 0.3)")
    parser.add_argument("--slice", type=int, metavar="N", help="see images in slices of N x N pixels (TEST.SLICE.SIZE)")
    parser.add_argument("--overlap", type=float, metavar="X", help="what slices share, in parts of N (default: 0.2)")
    parser.add_argument("--view", metavar="NAME", help=f"a look inside: {', '.join(sorted(find_views()))}")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(arguments)
    for key, value in (("SIZE", args.slice), ("OVERLAP", args.overlap)):
        if value is not None:
            args.opts = [f"TEST.SLICE.{key}", value, *args.opts]
    if args.serve and (args.output or args.view or args.label_images):
        parser.error("--serve shows views and gives files on its page: leave out --output, --view and --label-images")
    if args.compare and not args.serve:
        parser.error("--compare is for the page of --serve")
    if args.label_images and (args.view or not args.output or args.video_input or args.webcam):
        parser.error("--label-images is for images with --output and without --view")
    return args


def make_draw(args: argparse.Namespace, predictor: Predictor, architecture: str) -> Draw:
    """From an image to its picture, both uint8 [H, W, 3] RGB, and what it shows, if those are detections."""
    view = choose_view(args.view, architecture) if args.view else None
    names = predictor.class_names

    def draw(image: np.ndarray) -> tuple[np.ndarray, Detections | None]:
        item, reduced = predictor.prepare(image)
        if view is not None:
            return predictor.draw_view(view, item, reduced, args.confidence_threshold), None
        (found,) = predictor.detect([item], args.confidence_threshold)
        return draw_instances(reduced, found.to_instances(), names), found

    return draw


def find_images(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files of images, folders and patterns, each once; and messages on what matched nothing."""
    files: dict[Path, None] = {}
    problems = []
    for text in inputs:
        path = Path(text)
        try:
            if path.is_dir():
                found = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_ENDINGS and not f.is_dir())
            else:
                found = _file(text) or sorted(map(Path, glob.glob(text, recursive=True)))
        except OSError as error:
            problems.append(f"{text} cannot be read: {error.strerror}")
            continue
        if not found:
            problems.append(f"{text}: no images in this folder" if path.is_dir() else f"{text}: there is no such file")
        files.update(dict.fromkeys(found))
    return list(files), problems


def _file(text: str) -> list[Path]:
    """The file of this name, if there is one."""
    try:
        return [Path(find_file(text))]
    except FileNotFoundError:
        return []


def show(picture: np.ndarray, wait: int) -> bool:
    """Show a picture for ``wait`` milliseconds (0: until a key is pressed); whether to go on."""
    try:
        cv2.imshow(WINDOW, picture[:, :, ::-1])
        return cv2.waitKey(wait) & 0xFF not in (ord("q"), 27)
    except cv2.error:
        raise SystemExit("no window can be opened: OpenCV is headless or there is no display. Give --output") from None


def run_on_images(
    args: argparse.Namespace,
    files: Sequence[tuple[Path, Any]],
    reader: Callable[[Path], np.ndarray],
    draw: Draw,
    writer: DetectionWriter | None,
) -> int:
    """Draw every image, and read the next ones meanwhile; returns how many failed.

    Args:
        files: with their image ids.
    """
    failed = 0
    names = PictureNames(".jpg")
    with logging_redirect_tqdm():
        images = read_ahead(lambda item: reader(item[0]), files)
        for (file, image_id), reading in tqdm(images, unit="image", total=len(files), disable=not files):
            name = names(file)
            try:
                image = reading.result()
                picture, found = draw(image)
                if args.output:
                    write_image(Path(args.output) / name, picture)
                if args.label_images:
                    labels = Path(args.output, "labels", name).with_suffix(".png")
                    write_labels(labels, found.label_image(image.shape[:2]))
                if writer is not None:
                    writer.add(found, image.shape[:2], image_id, str(file))
            except Exception as error:  # whatever it is, the other files are done
                tqdm.write(f"error: {explain(file, error)}", file=sys.stderr)
                failed += 1
                continue
            if not args.output and not show(picture, wait=0):
                break
    return failed


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write uint16 [H, W] as PNG; the folder is made where it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def run_on_video(args: argparse.Namespace, draw: Draw, writer: DetectionWriter | None) -> int:
    """Draw every frame; returns 1 if the video or the camera cannot be read, else 0."""
    source = 0 if args.webcam else args.video_input
    video = cv2.VideoCapture(source)
    total = 0 if args.webcam else max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    film, count = None, 0
    try:
        with tqdm(total=total or None, unit="frame") as progress:
            while True:
                read, frame = video.read()
                if not read:
                    break
                image = np.ascontiguousarray(frame[:, :, ::-1])
                picture, found = draw(image)
                count += 1
                progress.update()
                if writer is not None:
                    writer.add(found, image.shape[:2], count, f"{'camera' if args.webcam else source}, frame {count}")
                if args.output:
                    film = film or open_film(args.output, video.get(cv2.CAP_PROP_FPS) or 25, picture)
                    film.write(np.ascontiguousarray(picture[:, :, ::-1]))
                elif not show(picture, wait=1):
                    break
    except KeyboardInterrupt:  # the usual end of a camera's recording
        pass
    finally:
        video.release()
        if film is not None:
            film.release()
    if not count:
        what = "the camera gives" if args.webcam else f"{args.video_input} has"
        print(f"error: {what} no frames, or OpenCV cannot read them", file=sys.stderr)
    return int(not count)


def open_film(path: str, rate: float, picture: np.ndarray) -> cv2.VideoWriter:
    """A video of pictures of this size, with this many a second."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    height, width = picture.shape[:2]
    film = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    if not film.isOpened():
        raise SystemExit(f"{path} cannot be written: give the name of an .mp4 file in a folder that can be written to")
    return film


def load_other(args: argparse.Namespace, load: Callable[..., CfgNode], source: str) -> CfgNode:
    """The config of --compare; what --opts says but MODEL.WEIGHTS holds for it, too."""
    opts = [text for pair in zip(args.opts[::2], args.opts[1::2]) if pair[0] != "MODEL.WEIGHTS" for text in pair]
    if Path(args.compare).is_dir():
        return load_run(args.compare, opts, data=args.data)
    return load(source, [*opts, "MODEL.WEIGHTS", args.compare], data=args.data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parse_arguments(arguments)
    problems: list[str] = []
    try:
        load, source = (load_run, args.run) if args.run else (load_config, args.config_file)
        cfg = load(source, args.opts, data=args.data)
        files: list[tuple[Path, Any]] | None = None
        if args.test_images is not None:
            entries = read_dataset(cfg.DATASETS.TEST[0])[: args.test_images]
            files = [(Path(entry["file_name"]), entry["image_id"]) for entry in entries]
        elif args.input:
            found, problems = find_images(args.input)
            files = [(file, number) for number, file in enumerate(found, start=1)]
        set_font(cfg.VIS_FONT)
        if args.view and cfg.TEST.SLICE.SIZE:
            raise ValueError("a view is of one pass of the network: leave out --slice (TEST.SLICE.SIZE 0)")
        if not cfg.MODEL.WEIGHTS:
            print("MODEL.WEIGHTS is empty: the weights are random", file=sys.stderr)
        if args.serve:
            import_gradio()  # before the models are made
            models = [ServedModel.from_config(cfg, cfg.MODEL.WEIGHTS or source)]
            if args.compare:
                other = load_other(args, load, source)
                models.append(ServedModel.from_config(other, other.MODEL.WEIGHTS))
            serve(models, *args.serve, args.confidence_threshold)
            return 0
        predictor = Predictor(cfg, longest_side=LONGER_SIDE_RANGE[1])
        draw = make_draw(args, predictor, cfg.MODEL.META_ARCHITECTURE)
        writer = None
        if args.output and not args.view:
            prefix = f"{Path(args.output).with_suffix('')}." if files is None else f"{args.output}/"
            writer = DetectionWriter(prefix, model_categories(cfg, predictor.class_names))
    except (ValueError, KeyError, OSError, ImportError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    with writer or nullcontext():
        if files is None:
            return run_on_video(args, draw, writer)
        failed = run_on_images(args, files, predictor.reader, draw, writer)
    return int(failed + len(problems) > 0)


if __name__ == "__main__":
    sys.exit(main())
