"""Learn the basis of a mask coding from the annotations of a data set: principal components, or a dictionary.

    python tools/fit_mask_basis.py --train coco_2017_train --test coco_2017_val --output weights/pca_28_60.npz
    python tools/fit_mask_basis.py --data FOLDER --output weights/pca_28_60.npz
    python tools/fit_mask_basis.py --method pca_linear --train coco_2017_train --output weights/pca_linear_28_60.npz
    python tools/fit_mask_basis.py --method sparse --train coco_2017_train --output weights/sparse_28_256.npz

Writes the basis, for MODEL.MASK_CODING.BASIS, with its statistics, and draws beside it the first components or atoms,
for PCA also the energy curve. An interrupted PCA goes on when it is started again. The dictionary of the sparse coding
needs scikit-learn, the extra "sparse". See projects/istr/README.md and projects/solq/README.md.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import matplotlib
import numpy as np

from querymask.command_line import add_masks, make_parser, parse_masks
from querymask.common.data.mask_crops import MaskCrops
from querymask.common.mask_coding import (
    MaskCoding,
    PCABasis,
    PCAMaskCoding,
    PixelPCAMaskCoding,
    SparseBasis,
    SparseMaskCoding,
)
from querymask.common.mask_coding.fitting import fit_dictionary, fit_pca_basis, reconstruction_quality

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN_COMPONENTS = 24
SHOWN_VARIANCES = 5
DEFAULT_LENGTHS = {"pca": 60, "pca_pixels": 60, "pca_linear": 60, "sparse": 256}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--method",
        choices=sorted(DEFAULT_LENGTHS),
        default="pca",
        help="MODEL.MASK_CODING.NAME that it is for: principal components of logits (pca), of pixels (pca_pixels), of "
        "pixels without their mean (pca_linear), or a dictionary (sparse)",
    )
    add_masks(parser, ending=".npz", size=28)
    parser.add_argument(
        "--components", type=int, metavar="K", help="length of the vectors: components (60), or atoms (256)"
    )
    parser.add_argument(
        "--penalty", type=float, default=1.0, metavar="BETA", help="sparse: weight of the sum of absolute entries (1)"
    )
    args = parse_masks(parser, arguments)
    if args.components is None:
        args.components = DEFAULT_LENGTHS[args.method]
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Fit, evaluate, write and draw; returns the figures of the evaluation."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    masks = MaskCrops(args.train, args.mask_size, args.limit)
    print(f"{len(masks)} masks of {', '.join(args.train)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fit = fit_sparse if args.method == "sparse" else fit_pca
    basis, coding, report = fit(args, masks)
    statistics: dict[str, object] = {"train": " ".join(args.train), "masks": len(masks), "seed": args.seed}
    quality: dict[str, float] = {}
    if args.test:
        held_out = MaskCrops(args.test, args.mask_size, args.limit)
        quality = reconstruction_quality(coding, held_out, workers=args.workers)
        statistics |= {"test": " ".join(args.test), "test_masks": len(held_out), **quality}
    basis.save(args.output, statistics=json.dumps(statistics))
    pictures = args.output.with_suffix(".components.png")
    if isinstance(basis, PCABasis):
        draw_energy(basis, args.output.with_suffix(".energy.png"))
        mean = {} if args.method == "pca_linear" else {"mean": basis.mean}
        draw_pictures({**mean, **numbered(basis.components)}, pictures)
    else:
        draw_pictures(numbered(basis.dictionary), pictures)
    print(report)
    for name, value in quality.items():
        print(f"{name} on {', '.join(args.test)}: {value:.4f}")
    print(f"Written: {args.output}, and pictures beside it")
    return quality


def fit_pca(args: argparse.Namespace, masks: MaskCrops) -> tuple[PCABasis, MaskCoding, str]:
    """Principal components, the coding with them, and what to say about them."""
    basis = fit_pca_basis(
        masks,
        args.components,
        args.batch_size,
        coding=args.method,
        seed=args.seed,
        state=args.output.with_suffix(".state.npz"),
        settings={"train": args.train, "mask_size": args.mask_size, "masks": len(masks)},
        workers=args.workers,
    )
    variances = ", ".join(f"{value:.2f}" for value in basis.explained_variance[:SHOWN_VARIANCES])
    report = (
        f"variances {variances}, ..., {basis.explained_variance[-1]:.4g}\n"
        f"{args.components} components hold {basis.explained_variance_ratio.sum():.2%} of the variance"
    )
    sizes = (args.mask_size, args.components)
    if args.method == "pca":
        return basis, PCAMaskCoding(*sizes, basis, noise=None), report
    return basis, PixelPCAMaskCoding(*sizes, basis, centred=args.method == "pca_pixels"), report


def fit_sparse(args: argparse.Namespace, masks: MaskCrops) -> tuple[SparseBasis, MaskCoding, str]:
    """A dictionary, the coding with it, and what to say about it."""
    try:
        basis = fit_dictionary(
            masks, args.components, args.penalty, args.batch_size, seed=args.seed, workers=args.workers
        )
    except ImportError as error:
        sys.exit(f"error: {error}")
    coding = SparseMaskCoding(args.mask_size, args.components, basis)
    return basis, coding, f"{args.components} atoms, learned with a penalty of {args.penalty:g}"


def draw_energy(basis: PCABasis, path: Path) -> None:
    """The part of the variance that the first components hold, by their number (ISTR's Figure 1)."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    energy = np.cumsum(basis.explained_variance_ratio)
    axes.plot(np.arange(1, len(energy) + 1), energy)
    axes.set(xlabel="components", ylabel="part of the variance", ylim=(0, 1), xlim=(1, max(len(energy), 2)))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def numbered(rows: np.ndarray) -> dict[str, np.ndarray]:
    """The first rows by their number from 1 on."""
    return {str(number): row for number, row in enumerate(rows[:SHOWN_COMPONENTS], start=1)}


def draw_pictures(pictures: dict[str, np.ndarray], path: Path) -> None:
    """Rows (S * S,) as pictures below their names, red positive, blue negative."""
    columns = min(5, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, pictures.items(), strict=False):
        size = round(len(values) ** 0.5)
        limit = np.abs(values).max()
        axis.imshow(values.reshape(size, size), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
