"""Batches are a function of (seed, iteration): not of interruptions, workers or the number of processes."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from querymask.common.engine.sampling import (
    TrainingBatchSampler,
    TrainLoader,
    mix_seed,
    repeated_epoch,
    seeded,
    shuffled_epoch,
)


def draw() -> tuple[float, float, float]:
    """One number of each generator that augmentation may use."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def mapper(entry: dict) -> dict:
    return {**entry, "random": draw()}


def batches(count: int, start: int = 0, num_workers: int = 0, seed: int = 1, **options: object) -> list[list[dict]]:
    """The first batches of a loader of 7 entries from iteration ``start`` on."""
    loader = TrainLoader([{"index": i} for i in range(7)], mapper, 3, num_workers=num_workers, seed=seed, **options)
    loader.start_at(start, seed)
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_start_and_workers_do_not_matter(num_workers: int) -> None:
    whole = batches(9)
    assert batches(5, start=4, num_workers=num_workers) == whole[4:]


def test_seed_matters() -> None:
    assert batches(3) != batches(3, seed=2)


def test_every_entry_comes_once_in_an_epoch_with_other_numbers_each_time() -> None:
    entries = list(itertools.chain.from_iterable(batches(7)))
    assert Counter(entry["index"] for entry in entries) == dict.fromkeys(range(7), 3)
    assert len({entry["random"] for entry in entries}) == 21
    assert [e["index"] for e in entries[:7]] != [e["index"] for e in entries[7:14]]


def test_loading_leaves_the_generators_alone() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = draw(), draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = draw()
    with seeded(5):
        inside = draw()
    assert (before, draw()) == expected
    with seeded(5):
        assert draw() == inside


def test_group_is_the_same_in_a_batch() -> None:
    groups = [0, 1, 0, 1, 0, 1, 1]
    drawn = batches(20, groups=groups)
    assert all(len({groups[entry["index"]] for entry in batch}) == 1 for batch in drawn)
    assert {groups[batch[0]["index"]] for batch in drawn} == {0, 1}
    assert batches(8, start=12, groups=groups) == drawn[12:]


def test_processes_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(itertools.islice(TrainingBatchSampler(shuffled_epoch(7, 3), 4), 6))
    parts = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        parts.append(list(itertools.islice(TrainingBatchSampler(shuffled_epoch(7, 3), 4), 6)))
    for batch, first, second in zip(whole, *parts):
        assert [first[0], second[0], first[1], second[1]] == batch


@pytest.mark.parametrize("batch_size", [0, -2, 3])
def test_bad_batch_size_is_refused(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"IMS_PER_BATCH is {batch_size}.*2 processes"):
        TrainLoader([{}], mapper, batch_size)


def test_repeat_factors_are_the_average_number_of_repeats() -> None:
    epoch = repeated_epoch(torch.tensor([1.0, 2.5, 0.25]), seed=0)
    counts = Counter(itertools.chain.from_iterable(epoch(e) for e in range(400)))
    assert counts[0] == 400
    assert counts[1] == pytest.approx(1000, abs=60)
    assert counts[2] == pytest.approx(100, abs=50)
    assert epoch(3) == epoch(3) != epoch(4)


def test_mapper_that_fails_is_not_hidden() -> None:
    def broken(entry: dict) -> dict:
        raise ValueError(f"entry {entry['index']} is broken")

    with pytest.raises(ValueError, match="is broken"):
        next(iter(TrainLoader([{"index": 4}], broken, 1)))


def test_mixed_seeds_differ() -> None:
    seeds = {mix_seed(seed, purpose, n) for seed in range(5) for purpose in range(4) for n in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_skipped_images_are_replaced_by_random_others() -> None:
    """The replacement, too, is a function of seed and position; what is not skipped stays as it was."""

    def skip_even(entry: dict) -> dict | None:
        return mapper(entry) if entry["index"] % 2 else None

    def run(start: int = 0, num_workers: int = 0) -> list[list[dict]]:
        loader = TrainLoader([{"index": i} for i in range(7)], skip_even, 3, num_workers=num_workers, seed=1)
        loader.start_at(start, 1)
        return list(itertools.islice(loader, 9))[: 9 - start]

    whole = run()
    assert run(start=4) == whole[4:]
    plain = batches(9)
    chosen = Counter()
    for replaced, kept in zip(itertools.chain(*whole), itertools.chain(*plain), strict=True):
        assert replaced["index"] % 2
        if kept["index"] % 2:
            assert replaced == kept
        else:
            chosen[replaced["index"]] += 1
    assert len(chosen) == 3  # all odd entries take their turn


def test_data_set_without_usable_images() -> None:
    loader = TrainLoader([{"index": 0}], lambda entry: None, 1)
    with pytest.raises(RuntimeError, match="skipped 1000 images in a row.*REPLACE_EMPTY False"):
        next(iter(loader))
