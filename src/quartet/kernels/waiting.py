"""Calls of kernels that wait for each other, so that all that Python does for them is done before the first."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from quartet.kernels.library import kernel

MULTIPLY, SILU_PRODUCT, SILU_GRADIENT = range(3)
"""Numbers of the kernels that can wait, in float32 (waiting.h)."""
_HEAD = struct.Struct("2q")
_COUNT = struct.Struct("q")


class _Waiting(threading.local):
    """Of each thread, because two may run two models at once."""

    calls: list[bytes] | None = None
    tensors: list[Tensor]


_waiting = _Waiting()


@contextmanager
def together(wanted: bool) -> Iterator[None]:
    """Have the calls of kernels in the block wait until its end, if wanted: these are `multiply`, `silu_product` and
    `silu_gradient` in float32.

    Kernels sweep through the caches, and what Python does between two of them takes several times as long as in one go. Until
    the end of the block, or `caught_up`, nothing but these three may look at what they compute, or write to what they look
    at. One that cannot compute, so that torch has to, catches up by itself.
    """
    if not wanted or _waiting.calls is not None or kernel("run") is None:
        yield
        return
    _waiting.calls, _waiting.tensors = [], []
    try:
        yield
        caught_up()
    finally:
        _waiting.calls, _waiting.tensors = None, []


def caught_up() -> None:
    """Compute what waits, in the order of the calls."""
    if not _waiting.calls:
        return
    calls, _waiting.calls = _waiting.calls, []
    function = kernel("run")
    assert function is not None, "looked for by `together`"
    function(_COUNT.pack(len(calls)) + b"".join(calls))
    _waiting.tensors.clear()


def waits(number: int, given: bytes, tensors: list[Tensor] | tuple[Tensor, ...]) -> bool:
    """Keep a call if calls wait now.

    Args:
        number: the kernel's.
        given: its arguments, as waiting.h reads them.
        tensors: what it looks at and writes to, whose memory is kept until then.
    """
    if _waiting.calls is None:
        return False
    _waiting.calls.append(_HEAD.pack(number, len(given)) + given)
    _waiting.tensors += tensors
    return True
