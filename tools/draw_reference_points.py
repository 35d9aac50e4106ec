"""Draw the reference points of ISDA's queries over images, coloured by object (Figure 5 of the paper).

    python tools/draw_reference_points.py --config-file CONFIG --output FOLDER [--images FILE ...] MODEL.WEIGHTS FILE

Without --images, the first images of DATASETS.TEST are drawn.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import querymask  # isort: skip  (before Detectron2: makes it importable)
import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.modeling import build_model
from tqdm import tqdm

from querymask.common.data.mapper import InstanceMapper
from querymask.common.engine import choose_device
from querymask.common.visualization import write_image
from querymask.isda.figures import draw_reference_points, reference_points


def image_entries(cfg: CfgNode, files: list[str], count: int) -> Iterator[dict[str, Any]]:
    """Entries in Detectron2's format, of the files or of the first images of the test set."""
    if not files:
        yield from DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]
    for file in files:
        height, width = detection_utils.read_image(file, format="RGB").shape[:2]
        yield {"file_name": file, "height": height, "width": width}


def main() -> None:
    """Read the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an ISDA")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures are written")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images of your own")
    parser.add_argument("--num-images", type=int, default=8, help="images of the test set (default: 8)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score of an object (default: 0.3)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args()
    cfg = querymask.get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "ISDA":
        parser.error(f"{args.config_file} is a {cfg.MODEL.META_ARCHITECTURE}: reference points belong to an ISDA")
    if not cfg.MODEL.WEIGHTS:
        parser.error("MODEL.WEIGHTS is empty: give the file of a trained model as MODEL.WEIGHTS FILE")
    choose_device(cfg)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    mapper = InstanceMapper(cfg, is_train=False)
    for entry in tqdm(list(image_entries(cfg, args.images, args.num_images)), unit="image"):
        points, objects, detections = reference_points(model, mapper(entry), args.score_threshold)
        image = np.ascontiguousarray(detection_utils.read_image(entry["file_name"], format="RGB"))
        path = Path(args.output) / f"{Path(entry['file_name']).stem}.png"
        write_image(path, draw_reference_points(image, points, objects, detections))
    print(f"pictures are in {args.output}")


if __name__ == "__main__":
    main()
