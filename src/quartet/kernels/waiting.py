"""Calls of kernels that wait for each other, so that all that Python does for them is done before the first."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from quartet.kernels.library import ARGUMENTS, FLOATS, kernel, without_dtypes

ORDER = (
    "multiply",
    "add_f32",
    "silu_product_f32",
    "silu_gradient_f32",
    "rms_norm_f32",
    "rms_norm_gradient_f32",
    "rotary_f32_f32",
    "attention_f32",
    "attention_gradient_f32",
)
"""The kernels that can wait, as waiting.h counts them."""
_NUMBERS = {name: number for number, name in enumerate(ORDER)}
_HEAD = struct.Struct("2q")
_COUNT = struct.Struct("q")


class _Waiting(threading.local):
    """Of each thread, because two may run two models at once."""

    calls: list[bytes] | None = None
    kept: list[object]


_waiting = _Waiting()


@contextmanager
def together(wanted: bool) -> Iterator[None]:
    """Have the calls of kernels in the block wait until its end, if wanted: those of `ORDER`.

    Kernels sweep through the caches, and what Python does between two of them takes several times as long as in one go. Until
    the end of the block, or `caught_up`, nothing but these may look at what they compute, or write to what they look at. One
    that cannot compute, so that torch has to, and one that cannot wait catch up by themselves.
    """
    if not wanted or _waiting.calls is not None or kernel("run") is None:
        yield
        return
    _waiting.calls, _waiting.kept = [], []
    try:
        yield
        caught_up()
    finally:
        _waiting.calls, _waiting.kept = None, []


def caught_up() -> None:
    """Compute what waits, in the order of the calls."""
    calls = _waiting.calls
    if calls is None:
        return
    if calls:
        _compute(calls)
        calls.clear()
    _waiting.kept.clear()


def _compute(calls: list[bytes]) -> None:
    function = kernel("run")
    assert function is not None, "looked for by `together`"
    function(_COUNT.pack(len(calls)) + b"".join(calls))


def call(name: str, given: tuple[float, ...], kept: Iterable[object]) -> None:
    """Call a kernel, or let it wait if calls wait now.

    Args:
        name: with its dtypes.
        given: its arguments.
        kept: what has the memory that it looks at and writes to.
    """
    if _waiting.calls is not None:
        if name in _NUMBERS and waits(name, _layout(name).pack(*given), kept):
            return
        caught_up()
    function = kernel(name)
    assert function is not None, "who calls it has looked for it"
    function(*given)


def waits(name: str, given: bytes, kept: Iterable[object]) -> bool:
    """Keep a call of a kernel of `ORDER` if calls wait now.

    Args:
        given: its arguments, as waiting.h reads them.
        kept: as in `call`; kept until then.
    """
    if _waiting.calls is None:
        return False
    _waiting.calls.append(_HEAD.pack(_NUMBERS[name], len(given)) + given)
    _waiting.kept += kept
    return True


def keep(tensors: Iterable[object]) -> None:
    """Hold what a kernel would look at, had its tensors numbers, for as long as calls wait: a plan of memory counts it so."""
    if _waiting.calls is not None:
        _waiting.kept += tensors


@cache
def _layout(name: str) -> struct.Struct:
    """A kernel's arguments in places of eight bytes each."""
    bare = without_dtypes(name)
    return struct.Struct("".join("f4x" if place == FLOATS.get(bare) else "q" for place in range(ARGUMENTS[bare])))
