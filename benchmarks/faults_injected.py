"""The faults that are put into a run's own process, before it starts."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A fault that a run reports."""

    name: str
    prepare: Prepare
    overrides: tuple[str, ...]
    code: int
    said: tuple[str, ...]
    resumed: bool = True
    """Whether the run is resumed, without the fault."""


def kill_at_operation(number: int) -> Prepare:
    """SIGKILL at the operation of that number (fsync, mkdir, unlink, rename) among those that write checkpoints."""

    def prepare() -> None:
        from quartet.run import checkpoint

        count = 0
        save = checkpoint.save_checkpoint

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return wrapper

        def saving(*arguments: Any, **options: Any) -> Any:
            places = [(os, "fsync"), (os, "mkdir"), (os, "unlink"), (Path, "replace")]
            before = [(owner, name, getattr(owner, name)) for owner, name in places]
            for owner, name, original in before:
                setattr(owner, name, counted(original))
            try:
                return save(*arguments, **options)
            finally:
                for owner, name, original in before:
                    setattr(owner, name, original)

        _replace("quartet.run.store", "save_checkpoint", saving)

    return prepare


def limit_file_size(*, after_checkpoint: int, limit: int) -> Prepare:
    """The kernel refuses to let any file grow beyond `limit` bytes, while checkpoints after `after_checkpoint`
    are saved."""

    def prepare() -> None:
        from quartet.run import checkpoint

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = checkpoint.save_checkpoint

        def saving(folder: Path, roles: Any, optimizer: Any, state: Any, **options: Any) -> Any:
            if state.iteration > after_checkpoint:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                return save(folder, roles, optimizer, state, **options)
            finally:  # what the run prints goes to a file here, and has to be seen
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        _replace("quartet.run.store", "save_checkpoint", saving)

    return prepare


def _replace(module: str, name: str, value: Any) -> None:
    import importlib

    setattr(importlib.import_module(module), name, value)


def _in_each_microbatch(act: Callable[[Any], Any]) -> None:
    """Have `act` see, and perhaps change, the policy's loss `[n, T]` of every microbatch of an update."""
    from quartet.stages import passes

    loss = passes.clipped_policy_loss

    def acting(logprobs: Any, *arguments: Any, **options: Any) -> Any:
        import torch

        found = loss(logprobs, *arguments, **options)
        planned = type(logprobs) is not torch.Tensor  # the prediction of memory runs the update without data
        return found if planned else act(found)

    passes.clipped_policy_loss = acting


def _little_memory(rows: int) -> Prepare:
    """Microbatches of more than so many sequences find no memory."""

    def limited(loss: Any) -> Any:
        import torch

        if len(loss) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss

    return lambda: _in_each_microbatch(limited)


def _bad_losses(first: int, last: int) -> Prepare:
    """A loss that is NaN in the microbatches `first` to `last` of the run."""
    calls = 0

    def spoiled(loss: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss * (float("nan") if first <= calls <= last else 1.0)

    return lambda: _in_each_microbatch(spoiled)


FAULT = "none"
"""What the reward function below does wrong, and from which call on."""
_calls = 0


def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward function that goes wrong at its sixth call."""
    global _calls
    _calls += 1
    scores = [float(len(text)) for text in responses]
    if FAULT == "none" or _calls < 6:
        return scores
    if FAULT == "raises":
        raise ValueError("no judgement today")
    if FAULT == "hangs":
        time.sleep(60)
    return {"count": scores[:-1], "nan": [float("nan"), *scores[1:]], "infinity": [*scores[:-1], float("inf")]}[FAULT]


def _function(fault: str) -> Prepare:
    def prepare() -> None:
        global FAULT
        FAULT = fault

    return prepare


def _nothing() -> None:
    return


def _endpoint(name: str) -> tuple[str, ...]:
    """PORT stands for that of the benchmark's own server, which goes wrong at its sixth request and recovers."""
    return (f"rewards=[{{url: 'http://127.0.0.1:PORT/{name}', timeout: 1.0}}]",)


_FUNCTION = ("rewards=[{function: 'faults_injected:judge', timeout: 1.0}]",)
MEMORY = [
    Case(
        "update", _little_memory(1), (), 0, ("out of memory in the update: going on with 1 sequences at once",), False
    ),
    Case("not even one", _little_memory(0), (), 2, ("memory ran out in the update with a single sequence",)),
]
NOT_FINITE = [
    Case("one minibatch", _bad_losses(5, 5), (), 0, ("1 optimizer steps were not taken",), False),
    Case(
        "all from then on",
        _bad_losses(17, 10**9),
        (),
        2,
        ("the loss of episode", "is nan", "ppo.max_bad_steps=4 in a row"),
    ),
]
REWARDS = [
    Case(
        "function raises",
        _function("raises"),
        _FUNCTION,
        2,
        ("raised ValueError: no judgement today", "go on from step-"),
    ),
    Case("server answers 500", _nothing, _endpoint("500"), 2, ("status 500 with 'out of order'", "go on from step-")),
    Case("server answers garbage", _nothing, _endpoint("garbage"), 2, ("answered '<html>hello", "go on from step-")),
    Case(
        "function hangs",
        _function("hangs"),
        _FUNCTION,
        2,
        ("was not done with 4 episodes after 1 s", "go on from step-"),
    ),
    Case("function returns too few", _function("count"), _FUNCTION, 2, ("returned 3 rewards for 4 episodes", "step-")),
    Case("function returns NaN", _function("nan"), _FUNCTION, 2, ("returned nan for episode 0 of the batch", "step-")),
    Case("function returns infinity", _function("infinity"), _FUNCTION, 2, ("returned inf for episode 3", "step-")),
    Case("server is slow", _nothing, _endpoint("slow"), 2, ("no answer within 1 s", "step-")),
    Case("server redirects", _nothing, _endpoint("redirect"), 2, ("which is refused; give the final url", "step-")),
    Case(
        "server refuses",
        _nothing,
        ("rewards=[{url: 'http://127.0.0.1:1/', timeout: 1.0}]",),
        2,
        ("failed 4 times, at last because the connection failed", "go on from step-"),
        False,
    ),
]
