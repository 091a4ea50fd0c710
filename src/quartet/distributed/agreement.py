"""What processes settle before they form a group, which takes the same of each: that all were started with the same
configuration, and that none has to refuse it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from quartet.config import Config, by_key
from quartet.errors import ConfigError

T = TypeVar("T")

WORDS = "quartet/start"
READ_SECONDS = 5.0
"""How long the main process, which may hold the store, stays until the others have read why nothing starts."""


def agree_to_start(store: Store, rank: int, world_size: int, config: Config, choose: Callable[[], T]) -> T:
    """The result of `choose`, which may refuse the configuration; every process calls this.

    Raises:
        ConfigError: the same in every process: configurations differ, or `choose` raised it in one of them.
    """
    found: list[T] = []
    refused = ""
    try:
        found.append(choose())
    except ConfigError as error:
        refused = str(error)
    own = {"settings": dict(by_key(config.model_dump(mode="json"))), "refused": refused}
    store.set(f"{WORDS}/{rank}", json.dumps(own))
    if rank == 0:
        everyone = [json.loads(store.get(f"{WORDS}/{other}")) for other in range(world_size)]
        verdict = _difference([one["settings"] for one in everyone]) or _refusal([one["refused"] for one in everyone])
        store.set(WORDS, verdict)
        if verdict:
            _wait_for_readers(store, world_size - 1)
    else:
        verdict = store.get(WORDS).decode()
        if verdict:
            store.add(f"{WORDS}/read", 1)
    if verdict:
        raise ConfigError(verdict)
    return found[0]


def _difference(everyone: list[dict[str, Any]]) -> str:
    for rank, other in enumerate(everyone):
        for key in [*everyone[0], *other]:
            if other.get(key) != everyone[0].get(key):
                return (
                    f"process {rank} has {key}={other.get(key)!r} where process 0 has {everyone[0].get(key)!r}; start all "
                    "processes with the same configuration"
                )
    return ""


def _refusal(everyone: list[str]) -> str:
    """The first that refuses; which process it is matters only where not all say the same."""
    rank = next((rank for rank, words in enumerate(everyone) if words), None)
    if rank is None:
        return ""
    words = everyone[rank]
    return words if len(set(everyone)) == 1 else f"process {rank}: {words}"


def _wait_for_readers(store: Store, count: int) -> None:
    deadline = time.monotonic() + READ_SECONDS
    while store.add(f"{WORDS}/read", 0) < count and time.monotonic() < deadline:
        time.sleep(0.01)
