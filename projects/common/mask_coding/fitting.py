"""Learning bases of mask codings from a data set, and how well a coding gives masks back.

The PCA of mask logits or pixels (ISTR, section 3.2), a dictionary for sparse coding (SOLQ, Table 3a), and the
autoencoder of ISTR's second release.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import querymask
from querymask.common.checkpoint import write_checkpoint
from querymask.common.losses import dice_loss
from querymask.common.mask_coding.autoencoder import AutoencoderMaskCoding
from querymask.common.mask_coding.base import MaskCoding
from querymask.common.mask_coding.incremental_pca import IncrementalPCA, batch_slices
from querymask.common.mask_coding.pca import PCABasis, label_logits
from querymask.common.mask_coding.sparse import SparseBasis
from querymask.common.packages import import_package

logger = logging.getLogger(__name__)

SAVE_PERIOD = 20
"""Batches of the PCA between two states on disk."""
LEARNING_RATE = 1e-3
"""Of the autoencoder."""
DROPS = (1 / 3, 2 / 3)
"""Parts of its training after which the learning rate falls by 10."""


def fit_pca_basis(
    masks: Dataset,
    num_components: int,
    batch_size: int = 1024,
    *,
    coding: str = "pca",
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    settings: dict[str, object] | None = None,
    workers: int = 0,
) -> PCABasis:
    """Incremental PCA of all masks in their order: of their logits, with noise on the labels, or of their pixels.

    Holds one batch and the components in memory. The noise of a mask depends on the seed and its place alone, so the
    result does not depend on interruptions.

    Args:
        masks: of (size, size) bool.
        num_components: K.
        batch_size: masks of an update.
        coding: "pca" for logits, "pca_pixels", or "pca_linear": pixels without their mean.
        seed: of the noise.
        state: file from which an interrupted run goes on; removed at the end.
        settings: what else the run depends on; a state of other settings is refused.
        workers: processes that read masks.

    Raises:
        ValueError: too few masks, or the state is of another run.
    """
    pca = IncrementalPCA(num_components, coding)
    settings = {**(settings or {}), "coding": coding, "components": num_components}
    settings |= {"batch_size": batch_size, "seed": seed}
    state = None if state is None else Path(state)
    if state is not None and state.exists():
        _read_state(pca, state, settings)
        logger.info(f"goes on after {pca.count} masks from {state}")
    slices = [part for part in batch_slices(len(masks), batch_size, num_components) if part.start >= pca.count]
    pixels = len(masks[0]) ** 2
    noise = np.random.default_rng(seed)
    noise.bit_generator.advance(pca.count * pixels)  # a number takes one step of the generator
    loader = _loader(masks, slices, workers)
    with tqdm(total=len(masks), initial=pca.count, unit="mask", mininterval=1) as progress:
        for number, batch in enumerate(loader, start=1):
            rows = batch.flatten(1).to(torch.float64)
            if coding == "pca":
                rows = label_logits(rows, torch.from_numpy(noise.random((len(rows), pixels))))
            pca.update(rows.numpy())
            progress.update(len(rows))
            if state is not None and number % SAVE_PERIOD == 0:
                _write_state(pca, state, settings)
    if state is not None:
        state.unlink(missing_ok=True)
    return pca.basis()


def fit_dictionary(
    masks: Dataset, num_atoms: int, penalty: float = 1.0, batch_size: int = 1024, *, seed: int = 0, workers: int = 0
) -> SparseBasis:
    """Online dictionary learning (Mairal et al. 2009) on the pixels of all masks, once, in their order.

    Done by scikit-learn, which keeps rows within the unit ball; afterwards they are scaled to length 1, as the paper
    has them. An interrupted run starts anew.

    Args:
        masks: of (size, size) bool.
        num_atoms: K.
        penalty: weight of |v|_1 in |x - v D|^2 / 2 + penalty |v|_1.
        batch_size: masks of an update.
        seed: of the initial dictionary, and of what takes the place of atoms that nothing uses.
        workers: processes that read masks.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: too few masks.
    """
    package = import_package(
        "sklearn.decomposition", "learning a dictionary (but not its use) needs scikit-learn,", "querymask[sparse]"
    )
    if min(len(masks), batch_size) < num_atoms:
        raise ValueError(
            f"batches of {min(len(masks), batch_size)} masks do not suffice for {num_atoms} atoms: use more masks, a "
            "larger batch or fewer atoms"
        )
    learner = package.MiniBatchDictionaryLearning(num_atoms, alpha=penalty, fit_algorithm="cd", random_state=seed)
    slices = list(batch_slices(len(masks), batch_size, num_atoms))
    for batch in tqdm(_loader(masks, slices, workers), unit="batch", mininterval=1):
        learner.partial_fit(batch.flatten(1).to(torch.float64).numpy())
    lengths = np.linalg.norm(learner.components_, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{int((lengths == 0).sum())} of {num_atoms} atoms are empty: use more masks or fewer atoms")
    return SparseBasis(learner.components_ / lengths, penalty)


def fit_autoencoder(
    masks: Dataset,
    held_out: Dataset,
    output: Path,
    length: int,
    *,
    epochs: int = 30,
    batch_size: int = 1024,
    seed: int = 0,
    workers: int = 0,
    device: str = "cpu",
    settings: Mapping[str, object] | None = None,
) -> float:
    """Train the autoencoder as ISTR's second release does: Adam, dice loss, the weights of the best epoch.

    An interrupted run goes on at the last full epoch, from a file beside ``output`` that is removed at the end.

    Args:
        masks: of (size, size) bool.
        held_out: like them; they choose the epoch.
        output: file of the weights, ending in ".pth".
        length: K.
        batch_size: masks of a step.
        seed: of the weights and of the order.
        workers: processes that read masks.
        settings: what else the run depends on; a state of other settings is refused.

    Returns:
        the best ``pixel_iou`` of ``reconstruction_quality``.

    Raises:
        ValueError: the state is of another run.
    """
    torch.manual_seed(seed)
    coding = AutoencoderMaskCoding(len(masks[0]), length, train_encoder=True, initialise=True).to(device)
    optimizer = torch.optim.Adam(coding.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(part * epochs) for part in DROPS], gamma=0.1)
    kept = {"coding": coding, "optimizer": optimizer, "scheduler": scheduler}
    settings = {**(settings or {}), "length": length, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    text = json.dumps(settings, sort_keys=True)
    path = output.with_suffix(".state.pth")
    first, best = 0, -1.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        _check_settings(path, state["settings"], text)
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        first, best = state["epochs"], state["best"]
        logger.info(f"goes on after {first} epochs")
    for epoch in range(first, epochs):
        order = torch.Generator().manual_seed(seed + epoch)
        loader = DataLoader(masks, batch_size, shuffle=True, generator=order, num_workers=workers)
        loss = _train_epoch(coding, optimizer, loader, f"epoch {epoch + 1} of {epochs}")
        scheduler.step()
        quality = reconstruction_quality(coding.eval(), held_out, batch_size=batch_size, workers=workers)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
        logger.info(f"epoch {epoch + 1}: loss {loss:.4f}, {figures}")
        if quality["pixel_iou"] > best:
            best = quality["pixel_iou"]
            weights = {key: value.cpu() for key, value in coding.state_dict().items()}
            write_checkpoint(weights, output, f"querymask {querymask.__version__}, mask autoencoder")
        partial = path.with_name(path.name + ".partial")
        state = {name: thing.state_dict() for name, thing in kept.items()}
        torch.save({**state, "settings": text, "epochs": epoch + 1, "best": best}, partial)
        partial.replace(path)
    path.unlink(missing_ok=True)
    return best


def _train_epoch(
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


@torch.no_grad()
def reconstruction_quality(
    coding: MaskCoding, masks: Dataset, batch_size: int = 1024, workers: int = 0
) -> dict[str, float]:
    """What is lost by coding masks.

    Returns:
        ``pixel_iou``: mean of the IoU of foreground and of background over all pixels of all masks, as ISTR's release
        has it; ``foreground_iou``: the first of them; ``mask_iou``: mean of the masks' own IoU.
    """
    device = next((x.device for x in (*coding.parameters(), *coding.buffers())), torch.device("cpu"))
    both = either = total = 0
    ious = 0.0
    slices = list(batch_slices(len(masks), batch_size, 0))
    for batch in tqdm(_loader(masks, slices, workers), unit="batch", mininterval=1):
        truth = batch.to(device)
        decoded = coding.decode(coding.encode(truth)) >= 0.5
        intersection = (decoded & truth).sum((1, 2))
        union = (decoded | truth).sum((1, 2))
        ious += float((intersection / union.clamp(min=1)).where(union > 0, torch.ones(())).sum())
        both, either, total = both + int(intersection.sum()), either + int(union.sum()), total + truth.numel()
    foreground, background = both / max(either, 1), (total - either) / max(total - both, 1)
    return {
        "pixel_iou": (foreground + background) / 2,
        "foreground_iou": foreground,
        "mask_iou": ious / len(masks),
    }


def _loader(masks: Dataset, slices: Iterable[slice], workers: int) -> DataLoader:
    batches = [range(part.start, min(part.stop, len(masks))) for part in slices]
    first = batches[0].start if batches else 0
    shifted = [[index - first for index in batch] for batch in batches]
    return DataLoader(Subset(masks, range(first, len(masks))), batch_sampler=shifted, num_workers=workers)


def _write_state(pca: IncrementalPCA, path: Path, settings: dict[str, object]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, settings=json.dumps(settings, sort_keys=True), **pca.state_dict())
    partial.replace(path)


def _read_state(pca: IncrementalPCA, path: Path, settings: dict[str, object]) -> None:
    with np.load(path) as file:
        _check_settings(path, str(file["settings"]), json.dumps(settings, sort_keys=True))
        pca.load_state_dict(dict(file))


def _check_settings(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{path} is of a run with other settings ({found}): remove it to start anew, or give the same settings"
        )
