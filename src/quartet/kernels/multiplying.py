"""Sums of matrix products: tensors looked at, memory handed over."""

from __future__ import annotations

import platform
import struct
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from quartet.kernels.library import are_real, fit, has_wide_vectors, kernel
from quartet.kernels.waiting import caught_up, keep, waits

WITHIN = 288 * (96 + 1024 + 32)
"""Numbers of a thread's room (`WITHIN` in terms.h), which is kept. A plan of memory does not count it: it lies within what is
counted for the libraries, which multiply less where kernels do."""
SMALLEST = 2**17
"""Multiplications below which a call of torch's product costs less."""
_kept = threading.local()


class Term(NamedTuple):
    """`scale left @ right`: `[rows, width]` and `[width, columns]`, in any order in memory."""

    left: Tensor
    right: Tensor
    scale: float = 1.0


_HEAD = "9q"
_TERM = "7qf4x"
"""`product_sum` and `term` in terms.h, the terms after the head."""


def multiplies() -> bool:
    """Whether products in float32 are computed by kernels here: where there are some, and torch's library is slower."""
    return kernels_are_faster() and kernel("multiply") is not None


@cache
def kernels_are_faster() -> bool:
    """Whether the library with which torch multiplies leaves much of this processor unused.

    That is MKL. On two cores of an AMD processor with AVX2 kernels took 0.5 to 1.0 of its time, at some narrow
    matrices up to 1.2 (benchmarks/products.py). On Intel's it is at its best, and where vectors are wider oneDNN multiplies.
    """
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX2" and has_wide_vectors()
    return vectors and not is_intel() and torch.backends.mkl.is_available()


@cache
def is_intel() -> bool:
    """Whether Intel made this processor."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


def multiply(out: Tensor, *terms: Term, bias: Tensor | None = None, add: bool = False) -> bool:
    """The sum of some products over `out`, or added to it.

    Args:
        out: `[rows, columns]`, numbers of a row side by side, in memory of which no term has a part.
        bias: `[columns]`, added to every row.

    Returns:
        Whether it was computed: not where shapes do not go together, about which torch has something to say.
    """
    if _multiplied(out, terms, bias, add):
        return True
    caught_up()
    return False


def _multiplied(out: Tensor, terms: tuple[Term, ...], bias: Tensor | None, add: bool) -> bool:
    if not multiplies():
        return False
    rows, columns = out.shape
    tensors, width = [out], 0
    for left, right, _ in terms:
        depth, across = right.shape
        if left.shape != (rows, depth) or across != columns:
            return False
        tensors += (left, right)
        width += depth
    if bias is not None:
        if bias.shape != (columns,):
            return False
        tensors.append(bias)
    if rows * columns * width < max(SMALLEST, 1) or not _fit(tensors, out, bias):
        return False
    if are_real(*tensors):
        threads, function = torch.get_num_threads(), kernel("multiply")
        assert function is not None, "looked for by `multiplies`"
        numbers: list[float] = [rows, columns, out.stride(0), add, len(terms), threads]
        numbers += (out.data_ptr(), _room(threads).data_ptr(), 0 if bias is None else bias.data_ptr())
        for left, right, scale in terms:
            numbers += (left.data_ptr(), right.data_ptr(), *left.stride(), *right.stride(), left.shape[1], scale)
        given = _layout(len(terms)).pack(*numbers)
        if not waits("multiply", given, tensors):
            function(given)
    else:
        keep(tensors)
    increment_version(out)
    return True


def _fit(tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return False
    return fit(*tensors) and out.stride(1) == 1 and (bias is None or bias.is_contiguous())


@cache
def _layout(terms: int) -> struct.Struct:
    return struct.Struct(_HEAD + _TERM * terms)


def _room(threads: int) -> Tensor:
    """This thread's own, kept from call to call."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < threads * WITHIN:
        room = _kept.room = torch.empty(threads * WITHIN, dtype=torch.float32, device="cpu")
    return room
