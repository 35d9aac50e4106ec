"""A batch that is spread over several processes, and counts as one.

DDP averages the gradients of the processes. So that they are those of the whole batch in one process, sums over the
batch are multiplied by the number of processes, counts are those of all processes, and what is chosen for the batch
(at random, or the highest scores) is chosen among all of it.

Each process has the images ``batch[rank::world_size]`` of the whole batch, the same number in every process
(:class:`querymask.common.engine.sampling.TrainingBatchSampler`). All processes must call the methods of
:class:`Processes` in the same order, also those without an instance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes whose images are one batch.

    Attributes:
        together: all of them; False: each process's images are a batch of their own.
    """

    together: bool = True

    @property
    def count(self) -> int:
        """How many; 1 where each is alone."""
        return comm.get_world_size() if self.together else 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, without gradient; of any shape, the same in all of them."""
        values = values.detach().clone()
        if self.count > 1:
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
        if self.count == 1:
            return sample(len(images))
        own = (images[:, None] == torch.arange(num_images, device=images.device)).sum(0)  # bincount waits for a GPU
        counts = self._gather(own)  # (processes, images)
        rows = sample(int(counts.sum()))  # the only wait for a GPU: how many rows there are in all
        dist.broadcast(rows, 0)
        ends = counts.t().flatten().cumsum(0).view(num_images, self.count)  # image i of process p is image (i, p)
        shifts = (ends - counts.t())[:, comm.get_rank()] - (own.cumsum(0) - own)
        return rows[shifts[images] + torch.arange(len(images), device=images.device)]

    def share_of_highest(self, scores: Tensor, count: int) -> int:
        """How many of the ``count`` highest scores of all processes this process has.

        Of equal scores at the limit, those of the first processes count.

        Args:
            scores: (n,) of this process.
            count: at least 1, the same in all processes.
        """
        if self.count == 1:
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
        every = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(every, values.contiguous())
        return torch.stack(every)


TOGETHER, ALONE = Processes(), Processes(together=False)
