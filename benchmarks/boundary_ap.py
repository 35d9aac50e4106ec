"""Time of boundary AP beside plain mask AP, on synthetic detections in the numbers of COCO's validation set.

    python benchmarks/boundary_ap.py --save benchmarks/results/boundary_ap.md

Every image has some objects and 100 detections: three for each object, with outlines and places that are off by a
little, and others at random places of random classes, as models give them. Times are for the images that were run; the
last column scales them to 5,000.
"""

import time
from collections.abc import Callable
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)  # noqa: F401
import cv2
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querymask.command_line import add_save, make_parser, markdown_table, show_page
from querymask.common.evaluation.boundary import BoundaryEval
from querymask.common.evaluation.scores import evaluate, load_results

HEIGHT, WIDTH, CLASSES, DETECTIONS = 480, 640, 80, 100


def blob(rng: np.random.Generator, center: np.ndarray, radii: np.ndarray, ripple: float) -> dict[str, Any]:
    """An ellipse with a rippled outline, as RLE."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    stretch = 1 + ripple * np.sin(7 * angle + rng.uniform(0, 6))
    points = center + np.stack((np.cos(angle), np.sin(angle)), axis=1) * radii * stretch[:, None]
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
    return mask_util.encode(np.asfortranarray(mask))


def make_data(num_images: int, objects: int) -> tuple[COCO, list[dict[str, Any]]]:
    """Ground truth and results; sizes are spread like COCO's, from about 10 to 200 pixels."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, num_images + 1):
        for number in range(DETECTIONS - 2 * objects):
            center = rng.uniform((0, 0), (WIDTH, HEIGHT))
            radii = np.exp(rng.uniform(np.log(5), np.log(100))) * rng.uniform(0.6, 1.4, 2)
            category = int(rng.integers(1, CLASSES + 1))
            if number < objects:
                truth = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "iscrowd": 0}
                rle = blob(rng, center, radii, 0.05)
                annotations.append({**truth, "segmentation": rle, "area": float(mask_util.area(rle))})
            for _ in range(3 if number < objects else 1):
                found = blob(rng, center + rng.normal(0, 0.05, 2) * radii, radii, rng.uniform(0, 0.2))
                score = float(rng.uniform())
                results.append({"image_id": image, "category_id": category, "score": score, "segmentation": found})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, num_images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth, results


def main() -> None:
    """Measure both, print and save."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--objects", type=int, default=7, help="in an image (7; COCO has 7.3 on average)")
    add_save(parser)
    args = parser.parse_args()
    truth, results = make_data(args.images, args.objects)
    kinds: dict[str, Callable[..., COCOeval]] = {
        "mask AP": lambda *pair: COCOeval(*pair, "segm"),
        "boundary AP": BoundaryEval,
    }
    rows = []
    for name, kind in kinds.items():
        detections = load_results(truth, results, masks=True)
        start = time.process_time()
        scores = evaluate(kind(truth, detections))
        spent = time.process_time() - start
        rows.append((name, f"{scores['AP']:.2f}", f"{spent:.1f} s", f"{spent * 5000 / args.images / 60:.1f} min"))
    headers = ["", "AP", f"{args.images} images", "5,000 images"]
    text = (
        f"{WIDTH}x{HEIGHT} pixels, {args.objects} objects and {DETECTIONS} detections an image, {CLASSES} classes; CPU "
        "time of one thread, pycocotools' own evaluation included.\n\n" + markdown_table(rows, headers)
    )
    show_page("Boundary AP beside mask AP", "benchmarks/boundary_ap.py", text, args.save)


if __name__ == "__main__":
    main()
