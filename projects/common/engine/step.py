"""One training step: forward, backward, optimiser, and what is kept for the log."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from querymask.common.engine.sampling import STEP, mix_seed, seed_everything
from querymask.common.processes import batch_in_parts

logger = logging.getLogger(__name__)

LARGEST_SCALE = 2.0**16
"""Of losses, to begin with: float16 ends there."""


def initial_loss_scale(loss: torch.Tensor) -> float:
    """The power of two from which the loss scale of float16 sets out: the largest up to 65536, scaled by which the loss
    of the first batch is within float16.

    ``GradScaler`` sets out from 65536, which suits a loss of one. Losses that are sums over a batch are thousands, and
    their gradients hundreds: the scale would have to be halved ten times, of which each costs an iteration.

    Args:
        loss: of the first batch, a scalar. All processes get the scale of the largest.
    """
    largest = loss.detach().float().clone()
    if comm.get_world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    value = float(largest)
    if not math.isfinite(value):
        return 1.0  # no scale helps: write_metrics says so
    return LARGEST_SCALE / 2.0 ** math.ceil(math.log2(max(value, 1.0)))


class TrainingStep:
    """Runs steps and keeps their losses on the device until :meth:`write_metrics`.

    Detectron2's trainers copy every loss to the host and gather it from all processes in every iteration. Here both
    happen once in a while, for all iterations since the last time at once.

    All random numbers of an iteration (dropout, for example) are a function of (seed, iteration, rank), which is what
    makes a resumed run equal an uninterrupted one.

    Args:
        model: gives a dict of losses (scalars) when it is called with a batch in training mode.
        data_loader: gives batches; ``iter`` must be cheap until the first ``next``.
        autocast: type of mixed precision, None for none; float16 has a loss scale, which fits the first batch's loss.
        parts: that a batch is computed in, one after the other; it must have a multiple of them.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        seed: int,
        autocast: torch.dtype | None = None,
        parts: int = 1,
    ) -> None:
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.seed = seed
        self.iter = 0
        self.device_type = next(model.parameters()).device.type
        self.autocast = autocast
        self.parts = parts
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=autocast == torch.float16)
        self._scale_is_known = not self.grad_scaler.is_enabled()
        self._batches: Iterator | None = None
        self._pending: list[tuple[int, tuple[str, ...], torch.Tensor]] = []

    def run_step(self) -> None:
        """One iteration; ``iter`` must be set to its number."""
        if not self.model.training:
            raise RuntimeError("the model was left in evaluation mode: call model.train() after evaluating")
        if self._batches is None:
            self._batches = iter(self.data_loader)
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        seed_everything(mix_seed(self.seed, STEP, self.iter, comm.get_rank()))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch) if self.parts == 1 else self._backward_in_parts(batch)
        self.grad_scaler.unscale_(self.optimizer)  # clipping inside step() must see the true gradients
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

        self._keep(losses)
        if comm.is_main_process():
            get_event_storage().put_scalar("data_time", data_time)

    def _backward(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, or of the mean over its parts for one of them; gives the losses."""
        with torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None):
            losses = self.model(batch)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            total = torch.stack(list(losses.values())).sum()
        if not self._scale_is_known:
            self._set_scale(initial_loss_scale(total))
        self.grad_scaler.scale(total / self.parts).backward()
        return losses

    def _backward_in_parts(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``_backward`` part by part, in the memory of one; gives the losses of the whole batch."""
        instances = [len(item["instances"]) if "instances" in item else 0 for item in batch]
        sums: dict[str, torch.Tensor] = {}
        for number in range(self.parts):
            wait = isinstance(self.model, DistributedDataParallel) and number < self.parts - 1
            with self.model.no_sync() if wait else nullcontext(), batch_in_parts(self.parts, instances):
                losses = self._backward(batch[number :: self.parts])
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / self.parts
        return sums

    def _set_scale(self, scale: float) -> None:
        self.grad_scaler.load_state_dict({**self.grad_scaler.state_dict(), "scale": scale})
        self._scale_is_known = True

    def close(self) -> None:
        """Stop the workers of the data loader now; left to the garbage collector, that can take five seconds each."""
        self._batches = None

    def _keep(self, losses: Mapping[str, torch.Tensor]) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._pending.append((self.iter, tuple(losses), values))

    def write_metrics(self) -> None:
        """Put the losses of all steps since the last call into the event storage, averaged over the processes.

        Must be called by all processes after the same iteration.

        Raises:
            FloatingPointError: a loss was infinite or NaN.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = torch.cat([values for _, _, values in pending])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
        rows = torch.split(values.cpu(), [len(names) for _, names, _ in pending])
        storage = get_event_storage()
        now = storage.iter
        for (iteration, names, _), row in zip(pending, rows, strict=True):
            losses = dict(zip(names, row.tolist(), strict=True))
            if not torch.isfinite(row).all():
                raise FloatingPointError(
                    f"loss became infinite or NaN at iteration {iteration}: {losses}. Lower SOLVER.BASE_LR, clip "
                    "gradients (SOLVER.CLIP_GRADIENTS), or look for broken boxes and masks in the data set"
                )
            storage.iter = iteration
            storage.put_scalar("total_loss", sum(losses.values()))
            if names != ("total_loss",):
                storage.put_scalars(**losses)
        storage.iter = now

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss scale, under the names of Detectron2's trainers."""
        state = {"iteration": self.iter, "optimizer": self.optimizer.state_dict()}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iter = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler.is_enabled():
            if state.get("grad_scaler"):
                self.grad_scaler.load_state_dict(state["grad_scaler"])
                self._scale_is_known = True
            else:
                logger.info("the checkpoint has no loss scale, as it is not of training in fp16: a new one is found")
        elif state.get("grad_scaler"):
            logger.info("the checkpoint is of training in fp16: its loss scale is left out, nothing else needs it")
