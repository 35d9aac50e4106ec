"""Start one process per GPU, or per ``--num-gpus`` on CPU, or join those that torchrun has started."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from querymask.common import compat

TIMEOUT = timedelta(minutes=30)


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

    Like ``detectron2.engine.launch``, and beyond it: works on CPU (gloo), and joins the process group that torchrun
    describes in the environment (RANK, LOCAL_RANK, WORLD_SIZE) instead of starting processes of its own.

    Args:
        main: must be importable by name if more than one process is started.
        num_processes: processes on this machine; one GPU each if ``device`` is "cuda".
        dist_url: where the processes meet; "auto" picks a free port of this machine.
        device: "cuda" (nccl) or "cpu" (gloo).

    Returns:
        What ``main`` returned if it ran in this process, otherwise None.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        return _run(
            main,
            args,
            "env://",
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            local_rank,
            local_size,
            device,
        )
    world_size = num_machines * num_processes
    if world_size == 1:
        return main(*args)
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                "--dist-url auto works on one machine only: give tcp://ADDRESS:PORT of machine 0"
            )
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    spawn_args = (main, args, dist_url, machine_rank, world_size, num_processes, device)
    mp.spawn(_spawned, spawn_args, nprocs=num_processes)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def _spawned(
    local_rank: int,
    main: Callable[..., Any],
    args: tuple[Any, ...],
    dist_url: str,
    machine_rank: int,
    world_size: int,
    local_size: int,
    device: str,
) -> None:
    if (
        device == "cpu"
    ):  # otherwise every process takes all cores; torchrun does the same by OMP_NUM_THREADS
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    rank = machine_rank * local_size + local_rank
    _run(main, args, dist_url, rank, world_size, local_rank, local_size, device)


def _run(
    main: Callable[..., Any],
    args: tuple[Any, ...],
    dist_url: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    device: str,
) -> Any:
    """Join the process group, call ``main``, leave the group."""
    if device == "cuda":
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"{local_size} processes on this machine need as many GPUs, it has {torch.cuda.device_count()}: "
                "lower --num-gpus or set MODEL.DEVICE cpu"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=dist_url, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        compat.create_local_process_group(local_size)
        return main(*args)
    finally:
        dist.destroy_process_group()
