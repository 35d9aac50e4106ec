"""Draw where an EffSeg refines its masks, stage by stage (Figure 1 of the paper), and the masks after every stage.

    python tools/draw_refinement.py --config-file CONFIG [--images FILE ...] --output FOLDER MODEL.WEIGHTS FILE

Without --images, the first images of DATASETS.TEST are drawn.
"""

import argparse
from pathlib import Path

import querymask  # isort: skip  (before Detectron2: makes it importable)
import cv2
import numpy as np
from detectron2.data import DatasetCatalog, detection_utils
from tqdm import tqdm

from querymask.common.engine import choose_device
from querymask.common.predictor import Predictor
from querymask.common.visualization import write_image
from querymask.effseg.figures import draw_refinement, refinement


def main() -> None:
    """Read the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an EffSeg")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures are written")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images of your own")
    parser.add_argument("--num-images", type=int, default=8, help="images of the test set (default: 8)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score of an object (default: 0.3)")
    parser.add_argument("--width", type=int, default=0, help="reduce pictures to this width (default: as drawn)")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEG files, from 1 to 95 (default: 92)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args()
    cfg = querymask.get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "EffSeg":
        parser.error(f"{args.config_file} is a {cfg.MODEL.META_ARCHITECTURE}: refinement stages belong to an EffSeg")
    if cfg.MODEL.EFFSEG.MASK_HEAD != "effseg":
        parser.error(f"MODEL.EFFSEG.MASK_HEAD is {cfg.MODEL.EFFSEG.MASK_HEAD!r}: only 'effseg' refines in stages")
    if not cfg.MODEL.WEIGHTS:
        parser.error("MODEL.WEIGHTS is empty: give the file of a trained model as MODEL.WEIGHTS FILE")
    choose_device(cfg)
    predictor = Predictor(cfg)
    files = args.images or [entry["file_name"] for entry in DatasetCatalog.get(cfg.DATASETS.TEST[0])[: args.num_images]]
    for file in tqdm(files, unit="image"):
        item, image = predictor.prepare(np.ascontiguousarray(detection_utils.read_image(file, format="RGB")))
        picture = draw_refinement(image, refinement(predictor.model, item, args.score_threshold))
        if 0 < args.width < picture.shape[1]:
            size = (args.width, round(picture.shape[0] * args.width / picture.shape[1]))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        write_image(Path(args.output) / f"{Path(file).stem}.jpg", picture, args.quality)
    print(f"pictures are in {args.output}")


if __name__ == "__main__":
    main()
