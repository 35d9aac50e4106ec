"""The loss on data that is not trained on, to be seen beside that of training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import StochasticDepth

from querymask.common.data.annotations import read_dataset
from querymask.common.data.augmentation import build_augmentations
from querymask.common.data.mapper import InstanceMapper
from querymask.common.engine.sampling import VALIDATION, mix_seed, seeded
from querymask.common.processes import alone

logger = logging.getLogger(__name__)

REGULARISERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,  # its dropout
    StochasticDepth,
)
"""Modules that do something else in training than later."""


@contextmanager
def losses_without_training(model: nn.Module) -> Iterator[None]:
    """Inside, a model in training mode gives losses, but without dropout, and with the statistics of its norms."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if isinstance(module, REGULARISERS):
            module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def validation_losses(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Means over the images of ``DATASETS.TEST`` of the losses that training would have for them, one at a time.

    Images have the size of the evaluation; what a loss draws at random is the same at every call.

    Returns:
        ``total_loss`` and its terms, the same in all processes; empty where no set has annotations.
    """
    model = getattr(model, "module", model)  # DDP would wait for the others
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    arguments = InstanceMapper.from_config(cfg, is_train=True)
    arguments.update(augmentations=build_augmentations(cfg, is_train=False), max_instances=0, skip_empty=False)
    mapper = InstanceMapper(**arguments)
    sums: dict[str, float] = {}
    count = 0
    for name in cfg.DATASETS.TEST:
        entries = read_dataset(name)
        if not any(entry.get("annotations") for entry in entries):
            logger.info(f"{name} has no annotations, so it has no validation loss")
            continue
        loader = build_detection_test_loader(entries, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
        # What the model logs belongs to training, and goes nowhere here
        with losses_without_training(model), alone(), EventStorage(1), torch.random.fork_rng(devices):
            for batch in loader:
                seed = mix_seed(VALIDATION, count)
                with seeded(seed):
                    torch.manual_seed(seed)  # of a GPU, too
                    losses = model(batch)
                values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
                for key, value in zip(losses, values, strict=True):
                    sums[key] = sums.get(key, 0.0) + value
                count += 1
    every = comm.all_gather((sums, count))
    total = sum(number for _, number in every)
    if not total:
        return {}
    names = max((found for found, _ in every), key=len)
    means = {name: sum(found.get(name, 0.0) for found, _ in every) / total for name in names}
    return {"total_loss": sum(means.values()), **means}
