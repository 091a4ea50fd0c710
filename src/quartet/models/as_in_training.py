"""Passes without gradients whose numbers are compared with those of a pass that has some: to the same rounding, by the same
operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Asked(threading.local):
    """Of each thread, because two may run two models at once."""

    now = False


_asked = _Asked()


@contextmanager
def as_in_training() -> Iterator[None]:
    """Compute without gradients as with them: attention, norms and gated MLPs else take other kernels, which round
    otherwise."""
    before, _asked.now = _asked.now, True
    try:
        yield
    finally:
        _asked.now = before


def computes_as_in_training() -> bool:
    """Whether gradients are taken, or numbers computed that are compared with those of such a pass."""
    return torch.is_grad_enabled() or _asked.now
