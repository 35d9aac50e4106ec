"""Train the autoencoder of masks from the annotations of a data set.

    python tools/train_mask_autoencoder.py --train coco_2017_train --test coco_2017_val --output weights/smt.pth

Writes the weights with the best IoU on the test data, for MODEL.MASK_CODING.BASIS with NAME "autoencoder". An
interrupted run goes on at the last full epoch. Training is that of ISTR's second release: Adam, dice loss, 30 epochs.
"""

import logging
from collections.abc import Sequence

import torch

from querymask.command_line import add_masks, make_parser, parse_masks
from querymask.common.data.mask_crops import MaskCrops
from querymask.common.mask_coding.fitting import fit_autoencoder


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and write; returns the best IoU."""
    parser = make_parser(__doc__)
    add_masks(parser, ending=".pth", size=112)
    parser.add_argument("--length", type=int, default=256, metavar="K", help="entries of the vectors (256)")
    parser.add_argument("--epochs", type=int, default=30, help="(30)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parse_masks(parser, arguments)
    if not args.test:
        parser.error("--test names the data sets that choose the epoch")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train = MaskCrops(args.train, args.mask_size, args.limit)
    test = MaskCrops(args.test, args.mask_size, args.limit)
    print(f"{len(train)} masks of {', '.join(args.train)}, {len(test)} of {', '.join(args.test)}")
    best = fit_autoencoder(
        train,
        test,
        args.output,
        args.length,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        device=args.device,
        settings={key: getattr(args, key) for key in ("train", "test", "mask_size", "limit")},
    )
    print(f"Written: {args.output}, pixel_iou {best:.4f}")
    return best


if __name__ == "__main__":
    main()
