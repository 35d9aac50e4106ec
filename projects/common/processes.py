"""A batch that is spread over several processes, or computed in parts one after the other, and counts as one.

DDP averages the gradients of the processes. So that they are those of the whole batch in one process, sums over the
batch are multiplied by the number of processes, counts are those of all processes, and what is chosen for the batch
(at random, or the highest scores) is chosen among all of it.

The parts that a process computes one after the other (``SOLVER.ACCUMULATION_STEPS``) are averaged, too. How many
instances the others have is known before they are computed (:func:`whole_batch`), what they will choose is not: limits
of a batch are divided by the number of parts.

Each process has the images ``batch[rank::world_size]`` of the whole batch, the same number in every process
(:class:`querymask.common.engine.sampling.TrainingBatchSampler`). All processes must call the methods of
:class:`Processes` in the same order, also those without an instance.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


@dataclass(frozen=True)
class _Batch:
    """What is known of a process's batch while a part of it is computed: the parts, and every image's instances."""

    parts: int = 1
    instances: tuple[int, ...] = ()
    alone: bool = False


_batch = _Batch()


@contextmanager
def batch_in_parts(parts: int, instances: Sequence[int]) -> Iterator[None]:
    """Inside, models compute one of several parts, with the same number of images, of this process's batch.

    Args:
        parts: how many.
        instances: number of every image's targets, of all parts.
    """
    with _set_batch(_Batch(parts, tuple(instances))):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Inside, the images of every process are a batch of their own, and nothing is asked of other processes."""
    with _set_batch(_Batch(alone=True)):
        yield


@contextmanager
def _set_batch(batch: _Batch) -> Iterator[None]:
    global _batch
    before, _batch = _batch, batch
    try:
        yield
    finally:
        _batch = before


def whole_batch(instances: Sequence[int]) -> Sequence[int]:
    """Number of the targets of every image of this process's batch, where these are those of the present part."""
    return _batch.instances if _batch.parts > 1 else instances


@dataclass(frozen=True)
class Processes:
    """The processes whose images are one batch.

    Attributes:
        together: all of them; False: each process's images are a batch of their own.
    """

    together: bool = True

    @property
    def number(self) -> int:
        """How many; 1 where each is alone."""
        return comm.get_world_size() if self.together and not _batch.alone else 1

    @property
    def count(self) -> int:
        """How many pieces of a batch are averaged: processes, times the parts that each computes."""
        return self.number * _batch.parts if self.together else 1

    def limit(self, of_batch: int) -> int:
        """What a limit of the whole batch is for what all processes compute at a time."""
        return max(of_batch // _batch.parts, 1) if self.together else of_batch

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, without gradient; of any shape, the same in all of them."""
        values = values.detach().clone()
        if self.number > 1:
            dist.all_reduce(values)
        return values

    def draw(self, sample: Callable[[int], Tensor], images: Tensor, num_images: int) -> Tensor:
        """Random rows that do not depend on how the batch is spread: the first process draws those of all.

        Args:
            sample: gives n random rows, as (n, ...).
            images: (n,) number of the image that each row is for, ascending.
            num_images: of this process.

        Returns:
            This process's rows (n, ...) of what ``sample`` gives for the whole batch.
        """
        if self.number == 1:
            return sample(len(images))
        own = (images[:, None] == torch.arange(num_images, device=images.device)).sum(0)  # bincount waits for a GPU
        counts = self._gather(own)  # (processes, images)
        rows = sample(int(counts.sum()))  # the only wait for a GPU: how many rows there are in all
        dist.broadcast(rows, 0)
        ends = counts.t().flatten().cumsum(0).view(num_images, self.number)  # image i of process p is image (i, p)
        shifts = (ends - counts.t())[:, comm.get_rank()] - (own.cumsum(0) - own)
        return rows[shifts[images] + torch.arange(len(images), device=images.device)]

    def share_of_highest(self, scores: Tensor, count: int) -> int:
        """How many of the highest scores of all processes, as many as ``limit(count)``, this process has.

        Of equal scores at the limit, those of the first processes count.

        Args:
            scores: (n,) of this process.
            count: at least 1, the same in all processes.
        """
        count = self.limit(count)
        if self.number == 1:
            return min(count, len(scores))
        highest = scores.new_full((count,), -torch.inf)
        own = scores.topk(min(count, len(scores))).values
        highest[: len(own)] = own
        places = torch.arange(count, device=scores.device)
        every, valid = self._gather(torch.stack((highest, (places < len(own)).to(scores.dtype)))).unbind(1)
        order = every.flatten().argsort(descending=True, stable=True)
        order = order[valid.flatten()[order].argsort(descending=True, stable=True)]  # a score may itself be -inf
        chosen = (order.div(count, rounding_mode="floor") == comm.get_rank())[:count] & (places < valid.sum())
        return int(chosen.sum())  # the only wait for a GPU

    def _gather(self, values: Tensor) -> Tensor:
        """(...) of every process -> (processes, ...)."""
        every = [torch.empty_like(values) for _ in range(self.number)]
        dist.all_gather(every, values.contiguous())
        return torch.stack(every)


TOGETHER, ALONE = Processes(), Processes(together=False)
