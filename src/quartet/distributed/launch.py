"""Joining the processes that a launcher started (torchrun, accelerate launch, deepspeed: whatever sets the usual variables)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from quartet.config import Config
from quartet.distributed.agreement import agree_to_start
from quartet.distributed.choose import engine_name, refuse_impossible, refuse_not_installed
from quartet.distributed.engine import ProcessEngine, SingleProcess
from quartet.errors import ConfigError, QuartetError, TrainingError, brief

TIMEOUT = timedelta(minutes=30)
"""Longest wait of one process for the others in one operation."""
FAILED = "quartet/failed"
GRACE_SECONDS = 5.0
"""How long a process that lost the others waits for their last words."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together."""

    rank: int
    world_size: int
    local_rank: int


def place() -> Place:
    """Read the launcher's variables.

    Raises:
        ConfigError: some of them are missing or no numbers.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Place(0, 1, 0)
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(
            f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r} are to be numbers; start with torchrun"
        ) from error
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size} is set and {missing[0]} is not; start with torchrun, which sets both"
        )
    return Place(rank, world_size, local_rank)


@contextmanager
def joined(config: Config) -> Iterator[ProcessEngine]:
    """The engine of this process, for the length of a run.

    An error in one process reaches the others: those that wait for it in vain are told what it was.

    Raises:
        ConfigError: an engine that is not installed or not possible here, or processes with different configurations.
        TrainingError: another process failed.
    """
    here = place()
    if here.world_size == 1 and engine_name(config, 1) == "none":
        refuse_impossible(config, "none", 1)
        yield SingleProcess()
        return
    store = _store(here)
    try:
        name, device = agree_to_start(store, here.rank, here.world_size, config, partial(_chosen, config, here))
        _join(config, here, device, store)
        yield _engine(name, device)
        dist.barrier()
    except BaseException as error:
        told = _last_words(store, here.rank, error) if isinstance(error, Exception) else None
        _leave_alone()
        if told is not None:
            raise told from error
        raise
    dist.destroy_process_group()


def _chosen(config: Config, here: Place) -> tuple[str, torch.device]:
    """This process's engine and device; refuses what cannot be had here."""
    name = engine_name(config, here.world_size)
    refuse_impossible(config, name, here.world_size)
    refuse_not_installed(name)
    device = _device(config, here)
    if config.distributed.backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "distributed.backend=nccl needs GPUs, and the models are on the CPU here; use distributed.backend=auto or gloo"
        )
    return name, device


def _device(config: Config, here: Place) -> torch.device:
    wanted = config.models.device
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if here.local_rank >= count:
        raise ConfigError(
            f"process {here.rank} is number {here.local_rank} on a machine with {count} GPUs; start at most {count} "
            "processes there (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def _store(here: Place) -> Store:
    """Where processes leave word for each other; gives it when all have come."""
    if here.world_size == 1:
        return HashStore()
    store: Store
    store, _, _ = next(iter(rendezvous("env://", here.rank, here.world_size, timeout=TIMEOUT)))
    return store


def _join(config: Config, here: Place, device: torch.device, store: Store) -> None:
    backend: str = config.distributed.backend
    if device.type == "cuda":
        backend = "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend="gloo" if device.type == "cpu" else backend,
        store=PrefixStore("quartet", store),
        rank=here.rank,
        world_size=here.world_size,
        timeout=TIMEOUT,
    )
    # accelerate and DeepSpeed have been seen to leave every process as number 0 of 1.
    assert (dist.get_rank(), dist.get_world_size()) == (here.rank, here.world_size)


def _leave_alone() -> None:
    """Leave the group after an error. gloo closes its connections, which the others notice; NCCL's way out is one that all
    processes take together, and they may be waiting in another operation: there the launcher ends them."""
    if not dist.is_initialized():
        return
    if "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
        return
    abort = getattr(distributed_c10d, "_abort_process_group", None)
    if abort is not None:
        with suppress(RuntimeError):  # not to stand in the way of the error that is under way
            abort()


def _engine(name: str, device: torch.device) -> ProcessEngine:
    if name == "fsdp2":
        from quartet.distributed.fsdp2 import FullyShardedDataParallel

        return FullyShardedDataParallel(device)
    if name == "zero3":
        from quartet.distributed.zero3 import Zero3

        return Zero3(device)
    if name == "zero2":
        from quartet.distributed.zero2 import Zero2

        return Zero2(device)
    from quartet.distributed.ddp import DataParallel

    return DataParallel(device)


def _last_words(store: Store, rank: int, error: Exception) -> QuartetError | None:
    """Leave word of an error for the others, or, where it is only that the others are gone, say why they are."""
    lost = not isinstance(error, QuartetError) and _is_connection(error)
    try:
        if not lost:
            if not store.check([FAILED]):
                store.set(FAILED, f"{rank} {type(error).__name__}: {brief(error, 500)}")
            return None
        deadline = time.monotonic() + GRACE_SECONDS
        while not store.check([FAILED]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if store.check([FAILED]):
            failed, _, words = store.get(FAILED).decode().partition(" ")
            return TrainingError(f"process {failed} failed, and the run with it: {words}")
    except RuntimeError:  # the store went down with the process that held it
        if not lost:
            return None
    return TrainingError(
        "another process has gone without a word (killed, or out of memory); its machine's log says more, and quartet resume "
        "goes on from the newest checkpoint"
    )


def _is_connection(error: Exception) -> bool:
    """Whether an operation between processes failed, rather than something in this one."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
