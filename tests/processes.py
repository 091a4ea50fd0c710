"""Several processes on one machine, started as a launcher starts them, fast: one server imports everything and forks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ["preloaded", "distributed.runs"]
SECONDS = 120.0


class Failed(Exception):
    """A process raised; the message holds its traceback."""


def run_processes(folder: Path, count: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `target(*arguments)` in `count` processes that see a launcher's variables; gives what each returned or raised.

    Args:
        folder: for the results; what a process raised stands in place of its result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server finds modules through this variable alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"result-{count}-{rank}-{port}.pkl" for rank in range(count)]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    keep = {name: value for name, value in os.environ.items() if name.startswith(("QUARTET_", "HF_", "OMP_"))}
    processes = []
    for rank, file in enumerate(files):
        own = {**keep, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(context.Process(target=_run, args=(file, own, target, arguments)))
        processes[-1].start()
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def results(folder: Path, count: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `run_processes`, where none may raise."""
    found = run_processes(folder, count, target, *arguments)
    for rank, result in enumerate(found):
        if isinstance(result, tuple) and result and result[0] == "raised":
            raise Failed(f"process {rank}:\n{result[2]}")
    return [None if result is None else result[1] for result in found]


def _run(file: Path, environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        result: tuple[Any, ...] = ("returned", target(*arguments))
    except BaseException as error:
        result = ("raised", error, traceback.format_exc())
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(result))
    temporary.replace(file)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
