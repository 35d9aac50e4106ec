"""Start one process per GPU, or as many as wanted on CPU, or join those that torchrun has started."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from querymask.common import compat

TIMEOUT = timedelta(minutes=30)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Which process of how many this is, in the job and on its machine, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str
    device: str


def launch(
    main: Callable[..., Any],
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: tuple[Any, ...] = (),
) -> Any:
    """Call ``main(*args)`` in every process of the job.

    Does what ``detectron2.engine.launch`` does, works on CPU as well (gloo), and joins the processes that torchrun
    describes in the environment instead of starting its own; the other arguments do not matter then.

    Args:
        main: importable by name if more than one process is started.
        num_processes: on this machine; on CUDA one GPU each.
        dist_url: where the processes meet; "auto" picks a free port of this machine.
        device: "cuda" (nccl) or "cpu" (gloo).

    Returns:
        What ``main`` returned if it ran in this process, otherwise None.
    """
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:4])
        return _run(main, args, Place(rank, world_size, local_rank, local_size, "env://", device))
    world_size = num_machines * num_processes
    if world_size <= 1:
        return main(*args)
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("--dist-url auto is for one machine: give tcp://ADDRESS:PORT of the first machine")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first = Place(machine_rank * num_processes, world_size, 0, num_processes, dist_url, device)
    mp.spawn(_spawned, (main, args, first), nprocs=num_processes)


def first_rank(num_processes: int, machine_rank: int) -> int:
    """The rank of this process where torchrun has started it, else of the first that ``launch`` will start here."""
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        return int(os.environ["RANK"])
    return machine_rank * num_processes


def _spawned(local_rank: int, main: Callable[..., Any], args: tuple[Any, ...], first: Place) -> None:
    if first.device == "cpu":  # else every process takes all cores; torchrun limits them by OMP_NUM_THREADS
        torch.set_num_threads(max(1, torch.get_num_threads() // first.local_size))
    _run(main, args, Place(**{**vars(first), "rank": first.rank + local_rank, "local_rank": local_rank}))


def _run(main: Callable[..., Any], args: tuple[Any, ...], place: Place) -> Any:
    """Join the process group, call ``main``, leave the group."""
    if place.device == "cuda":
        if place.local_size > torch.cuda.device_count():
            raise ValueError(
                f"{place.local_size} processes on this machine need as many GPUs, but it has "
                f"{torch.cuda.device_count()}: start fewer (--num-gpus), or set MODEL.DEVICE cpu"
            )
        torch.cuda.set_device(place.local_rank)
    backend = "nccl" if place.device == "cuda" else "gloo"
    store, rank, world_size = next(dist.rendezvous(place.url, place.rank, place.world_size, timeout=TIMEOUT))
    # torchrun keeps its store where it starts processes again: they would look for those that have died
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    compat.create_local_process_group(place.local_size)
    result = main(*args)
    dist.destroy_process_group()
    return result


def _free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]
