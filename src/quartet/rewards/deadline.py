"""Runs a call with a time limit that also holds when the call hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class DeadlineExceeded(Exception):
    """The call did not return in time; it is left behind in a daemon thread, which cannot be ended from outside."""


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """What `call()` returns, or its exception raised here.

    The call runs in a daemon thread, so that a hanging one neither blocks the caller nor the end of the process. It
    sees the caller's CUDA device, and gradients are off in it. Raises DeadlineExceeded after `seconds`.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    # The current CUDA device belongs to the thread: without this, every rank's call would land on device 0.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                results.append(call())
        except BaseException as error:
            # Everything, SystemExit too: an exception left in a thread would be printed and lost.
            errors.append(error)

    thread = threading.Thread(target=work, name="quartet-reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise DeadlineExceeded
    return results[0]
