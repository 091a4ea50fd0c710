"""How many threads a kernel shares its work among."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class _Idle(threading.local):
    """Of each thread that calls kernels."""

    count: Callable[[], int] | None = None


_idle = _Idle()


def threads_now() -> int:
    """Torch's in this thread, and those idle beside them: for kernels whose numbers do not depend on how many, bit for bit."""
    return torch.get_num_threads() + (0 if _idle.count is None else _idle.count())


@contextmanager
def more_threads(count: Callable[[], int]) -> Iterator[None]:
    """Have kernels that this thread calls in the block take more threads than torch's operations do.

    Args:
        count: how many more there are at the moment; asked at every call.
    """
    before, _idle.count = _idle.count, count
    try:
        yield
    finally:
        _idle.count = before
