"""Train the autoencoder of masks from the annotations of a data set.

    python tools/train_mask_autoencoder.py --train coco_2017_train --test coco_2017_val --output weights/smt.pth

Writes the weights with the best IoU on the test data, for MODEL.MASK_CODING.BASIS with NAME "autoencoder". An
interrupted run goes on at the last full epoch. Training is that of ISTR's second release: Adam, dice loss, 30 epochs.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from querymask.common.checkpoint import write_checkpoint
from querymask.common.data.mask_crops import MaskCrops
from querymask.common.losses import dice_loss
from querymask.common.mask_coding import AutoencoderMaskCoding
from querymask.common.mask_coding.fitting import reconstruction_quality

LEARNING_RATE = 1e-3
# Parts of the run after which the learning rate falls by 10
DROPS = (1 / 3, 2 / 3)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="NAME", help="registered data sets to learn from")
    parser.add_argument("--test", nargs="+", required=True, metavar="NAME", help="data sets that choose the epoch")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.pth", help="the file to write")
    parser.add_argument("--length", type=int, default=256, metavar="K", help="entries of the vectors (256)")
    parser.add_argument("--mask-size", type=int, default=112, metavar="S", help="side of the masks (112)")
    parser.add_argument("--batch-size", type=int, default=1024, metavar="B", help="masks of a step (1024)")
    parser.add_argument("--epochs", type=int, default=30, help="(30)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="use the first N masks of a split (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that rasterise masks (0: this one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".pth":
        parser.error(f"{args.output}: the name must end in .pth")
    return args


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and write; returns the best IoU."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train = MaskCrops(args.train, args.mask_size, args.limit)
    test = MaskCrops(args.test, args.mask_size, args.limit)
    print(f"{len(train)} masks of {', '.join(args.train)}, {len(test)} of {', '.join(args.test)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    coding = AutoencoderMaskCoding(args.mask_size, args.length, train_encoder=True, initialise=True).to(args.device)
    optimizer = torch.optim.Adam(coding.parameters(), lr=LEARNING_RATE)
    milestones = [round(part * args.epochs) for part in DROPS]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    kept = {"coding": coding, "optimizer": optimizer, "scheduler": scheduler}
    ignored = ("workers", "device", "output")
    settings = json.dumps({k: v for k, v in vars(args).items() if k not in ignored}, sort_keys=True)
    state_file = args.output.with_suffix(".state.pth")
    first, best = 0, -1.0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{state_file} is of a run with other settings ({state['settings']}): remove it to start anew, or give "
                "the same settings"
            )
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        first, best = state["epochs"], state["best"]
        print(f"goes on after {first} epochs")

    for epoch in range(first, args.epochs):
        order = torch.Generator().manual_seed(args.seed + epoch)
        loader = DataLoader(train, args.batch_size, shuffle=True, generator=order, num_workers=args.workers)
        loss = train_epoch(coding, optimizer, loader, f"epoch {epoch + 1} of {args.epochs}")
        scheduler.step()
        quality = reconstruction_quality(coding.eval(), test, batch_size=args.batch_size, workers=args.workers)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, " + ", ".join(f"{k} {v:.4f}" for k, v in quality.items()))
        if quality["pixel_iou"] > best:
            best = quality["pixel_iou"]
            state = {key: value.cpu() for key, value in coding.state_dict().items()}
            write_checkpoint(state, args.output, f"querymask {querymask.__version__}, mask autoencoder")
        partial = state_file.with_name(state_file.name + ".partial")
        state = {name: thing.state_dict() for name, thing in kept.items()}
        torch.save({**state, "settings": settings, "epochs": epoch + 1, "best": best}, partial)
        partial.replace(state_file)
    state_file.unlink(missing_ok=True)
    print(f"Written: {args.output}, pixel_iou {best:.4f}")
    return best


def train_epoch(
    coding: AutoencoderMaskCoding, optimizer: torch.optim.Optimizer, loader: DataLoader, title: str
) -> float:
    """One pass over the masks; returns the mean dice loss."""
    coding.train()
    device = next(coding.parameters()).device
    total = torch.zeros((), device=device)
    for masks in tqdm(loader, desc=title, unit="batch", mininterval=1):
        masks = masks.to(device)
        maps = coding.decode(coding.encode(masks))
        loss = dice_loss(maps, masks.to(maps.dtype)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(masks)
    return float(total / len(loader.dataset))


if __name__ == "__main__":
    main()
