"""Training data as a function of (seed, iteration): what a run reads does not depend on interruptions or workers."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from querymask.common.transfer import HostBatch

EPOCH, SAMPLE, STEP, START, VALIDATION = range(5)
"""What a random number is for: the order of an epoch, the augmentation of a sample, a training step, initialisation, a
validation loss."""


def mix_seed(*numbers: int) -> int:
    """A 32-bit seed from several numbers, such as (seed, STEP, iteration); neighbours give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch (all devices) of this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU generators of Python, numpy and torch start from ``seed``; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


REPLACEMENTS = 1000
"""How many other images are tried where the mapper skips one."""


class SeededDataset(Dataset):
    """A mapped data set whose element (index, position) has randomness of its own, whoever computes it and when.

    Where the mapper gives None, a random other element takes the place.
    """

    def __init__(self, dataset: Sequence[dict], mapper: Callable[[dict], dict | None], seed: int) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, position = key
        with seeded(mix_seed(self.seed, SAMPLE, position)):
            for _ in range(REPLACEMENTS):
                if (item := self.mapper(self.dataset[index])) is not None:
                    return item
                index = np.random.randint(len(self.dataset))
        raise RuntimeError(
            f"the mapper skipped {REPLACEMENTS} images in a row: augmentation leaves hardly any instances of the data "
            "set. Check its annotations, or set INPUT.REPLACE_EMPTY False"
        )


class TrainingBatchSampler(Sampler):
    """Endless batches of (index, position) for this process, from a given iteration on.

    The epochs' permutations are strung together; position counts their elements. A batch of all processes together is
    cut from this stream and every process takes each ``world_size``-th element, so the batch of an iteration does not
    depend on the number of processes.

    Args:
        epoch: gives the indices of epoch number e, shuffled; a function of (seed, e).
        batch_size: images of all processes together.
        groups: group of each index; a batch has elements of one group only (images of like aspect ratio).
        start_iteration: batches of earlier iterations are left out.
    """

    def __init__(
        self,
        epoch: Callable[[int], Sequence[int]],
        batch_size: int,
        groups: Sequence[int] | None = None,
        start_iteration: int = 0,
    ) -> None:
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        if batch_size < 1 or batch_size % self.world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}; it counts the images of all {self.world_size} processes "
                "together and must be a positive multiple of their number"
            )
        self.epoch = epoch
        self.batch_size = batch_size
        self.groups = groups
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(self._batches(), self.start_iteration, None):
            yield batch[self.rank :: self.world_size]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        indices = itertools.chain.from_iterable(map(self.epoch, itertools.count()))
        open_batches: dict[int, list[tuple[int, int]]] = {}
        for position, index in enumerate(indices):
            group = self.groups[index] if self.groups is not None else 0
            batch = open_batches.setdefault(group, [])
            batch.append((index, position))
            if len(batch) == self.batch_size:
                yield open_batches.pop(group)


def shuffled_epoch(size: int, seed: int) -> Callable[[int], list[int]]:
    """Epochs that have every index once, in random order."""

    def epoch(number: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(seed, EPOCH, number))
        return torch.randperm(size, generator=generator).tolist()

    return epoch


def repeated_epoch(repeat_factors: torch.Tensor, seed: int) -> Callable[[int], list[int]]:
    """Epochs that have index i ``repeat_factors[i]`` times on average (stochastic rounding), in random order."""
    whole = torch.trunc(repeat_factors)
    fraction = repeat_factors - whole

    def epoch(number: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(seed, EPOCH, number))
        repeats = whole + (torch.rand(len(fraction), generator=generator) < fraction)
        indices = torch.repeat_interleave(torch.arange(len(repeats)), repeats.long())
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    return epoch


class TrainLoader:
    """Endless training batches of this process.

    Nothing is read before the first ``next``, so that iteration and seed may still be set by ``start_at`` when a run
    is resumed.

    Args:
        dataset: entries in Detectron2's format.
        mapper: from an entry to a model input.
        batch_size: images of all processes together.
        groups: see :class:`TrainingBatchSampler`.
        repeat_factors: see :func:`repeated_epoch`; None: every image once in an epoch.
        pin_memory: batches come in pinned memory, from where they are copied to a GPU without waiting; a thread of
            the loader puts them there if there are workers.
        pack_masks: bitmasks come as :class:`querymask.common.transfer.PackedMasks`.
    """

    def __init__(
        self,
        dataset: Sequence[dict],
        mapper: Callable[[dict], dict | None],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        groups: Sequence[int] | None = None,
        repeat_factors: torch.Tensor | None = None,
        pin_memory: bool = False,
        pack_masks: bool = False,
    ) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.pin_memory = pin_memory
        self.pack_masks = pack_masks
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.groups = groups
        self.repeat_factors = repeat_factors
        self.start_iteration = 0
        self._sampler()  # a bad batch size is an error now, not at the first iteration

    def start_at(self, iteration: int, seed: int) -> None:
        """Make the next ``iter`` start with the batch of ``iteration`` (counted from 0)."""
        self.start_iteration, self.seed = iteration, seed

    def _sampler(self) -> TrainingBatchSampler:
        if self.repeat_factors is None:
            epoch = shuffled_epoch(len(self.dataset), self.seed)
        else:
            epoch = repeated_epoch(self.repeat_factors, self.seed)
        return TrainingBatchSampler(epoch, self.batch_size, self.groups, self.start_iteration)

    def __iter__(self) -> Iterator[list[dict]]:
        yield from DataLoader(
            SeededDataset(self.dataset, self.mapper, self.seed),
            batch_sampler=self._sampler(),
            num_workers=self.num_workers,
            collate_fn=HostBatch.packed if self.pack_masks else HostBatch,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
        )
