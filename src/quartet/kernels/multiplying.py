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

from quartet.kernels.library import are_real, fit, has_tile_products, has_wide_vectors, kernel
from quartet.kernels.threads import threads_now
from quartet.kernels.waiting import caught_up, keep, waits

WITHIN = 288 * (96 + 1024 + 32)
"""Numbers of a thread's room (`WITHIN` in terms.h), which is kept. A plan of memory does not count it: it lies within what is
counted for the libraries, which multiply less where kernels do."""
SMALLEST = 2**17
"""Multiplications below which a call of torch's product costs less, in float32."""
WITHIN_TILES = 256 * (24 * 36 + 4 * 36 + 4 + 512 // 16 * 24)
"""The same where tiles multiply (`TILES_WITHIN` in amx_products.h)."""
NARROW = 64
"""Columns, or numbers that are summed up, to which a single product in bfloat16 is computed by tiles: larger ones are left to
oneDNN."""
_kept = threading.local()


class Term(NamedTuple):
    """`scale left @ right`: `[rows, width]` and `[width, columns]`, in any order in memory."""

    left: Tensor
    right: Tensor
    scale: float = 1.0


_HEAD = "10q"
_TERM = "7qf4x"
"""`product_sum` and `term` in terms.h, the terms after the head."""


def multiplies(dtype: torch.dtype = torch.float32) -> bool:
    """Whether products in a dtype are computed by kernels here: where there are some, and torch's library is slower."""
    if dtype == torch.bfloat16:
        return kernel("multiply_tiles") is not None and has_tile_products()
    return dtype == torch.float32 and kernels_are_faster() and kernel("multiply") is not None


def multiplies_alone(left: Tensor, right: Tensor) -> bool:
    """Whether a single product in the dtype of both sides is computed by kernels here: asked before there is memory for it."""
    dtype, (width, columns) = left.dtype, right.shape
    return multiplies(dtype) and (dtype == torch.float32 or min(width, columns) <= NARROW)


@cache
def kernels_are_faster() -> bool:
    """Whether the library with which torch multiplies leaves much of this processor unused.

    That is MKL. On two cores of an AMD processor with AVX2 kernels took 0.5 to 1.0 of its time, at some narrow matrices up to
    1.2; on two cores of an Intel one with AVX-512 about as long by vectors and less by tiles of AMX
    (benchmarks/products.py), and a layer's kernels are one call. On Intel's with AVX2 MKL was as fast or faster, and on
    others with AVX-512 oneDNN multiplies.
    """
    vectors = torch.backends.cpu.get_cpu_capability()
    measured = vectors.startswith("AVX512") if is_intel() else vectors == "AVX2"
    return measured and has_wide_vectors() and torch.backends.mkl.is_available()


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
        out: `[rows, columns]`, numbers of a row side by side, in memory of which no term has a part. In the dtype of the terms,
            float32 or bfloat16; sums of products in bfloat16 may go into float32 too. They are rounded once, and a left side
            that is scaled before.
        bias: `[columns]`, added to every row; in the dtype of the result.

    Returns:
        Whether it was computed: not where shapes do not go together, about which torch has something to say.
    """
    if _multiplied(out, terms, bias, add):
        return True
    caught_up()
    return False


def _multiplied(out: Tensor, terms: tuple[Term, ...], bias: Tensor | None, add: bool) -> bool:
    dtype = terms[0].left.dtype
    if not multiplies(dtype):
        return False
    rows, columns = out.shape
    tensors, width = [out], 0
    for left, right, _ in terms:
        depth, across = right.shape
        if left.shape != (rows, depth) or across != columns or left.dtype != dtype or right.dtype != dtype:
            return False
        tensors += (left, right)
        width += depth
    if bias is not None:
        if bias.shape != (columns,) or bias.dtype != out.dtype or bias.dtype != dtype or not bias.is_contiguous():
            return False
        tensors.append(bias)
    # In bfloat16 whatever the rows: tiles round a sum once, and a row's numbers are to be the same beside others.
    smallest = SMALLEST if dtype == torch.float32 else 1
    if rows * columns * width < max(smallest, 1) or not _fit(tensors, out, dtype, terms):
        return False
    if are_real(*tensors):
        _call(out, terms, bias, add, tensors)
    else:
        keep(tensors)
    increment_version(out)
    return True


def _fit(tensors: list[Tensor], out: Tensor, dtype: torch.dtype, terms: tuple[Term, ...]) -> bool:
    if not fit(*tensors) or out.stride(1) != 1:
        return False
    if dtype == torch.float32 or out.dtype == torch.float32:
        return out.dtype == torch.float32
    return out.dtype == dtype and (len(terms) > 1 or multiplies_alone(terms[0].left, terms[0].right))


def _call(out: Tensor, terms: tuple[Term, ...], bias: Tensor | None, add: bool, tensors: list[Tensor]) -> None:
    tiles, threads = terms[0].left.dtype == torch.bfloat16, threads_now()
    if tiles:
        caught_up()
    numbers: list[float] = [*out.shape, out.stride(0), add, out.dtype == torch.float32, len(terms), threads]
    numbers += (out.data_ptr(), _room(threads).data_ptr(), 0 if bias is None else bias.data_ptr())
    for left, right, scale in terms:
        numbers += (left.data_ptr(), right.data_ptr(), *left.stride(), *right.stride(), left.shape[1], scale)
    given = _layout(len(terms)).pack(*numbers)
    if not tiles and waits("multiply", given, tensors):
        return
    function = kernel("multiply_tiles" if tiles else "multiply")
    assert function is not None, "looked for by `multiplies`"
    function(given)


@cache
def _layout(terms: int) -> struct.Struct:
    return struct.Struct(_HEAD + _TERM * terms)


def _room(threads: int) -> Tensor:
    """This thread's own, kept from call to call."""
    room: Tensor | None = getattr(_kept, "room", None)
    numbers = threads * max(WITHIN, WITHIN_TILES if has_tile_products() else 0)
    if room is None or room.numel() < numbers:
        caught_up()  # what waits may compute in the smaller one
        room = _kept.room = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return room
