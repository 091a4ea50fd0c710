"""Matrices for kernels that multiply, and their products in float64."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from quartet.kernels import Term

ORDERS = ("rows", "columns", "apart")
"""Numbers of a row side by side, of a column, or neither."""


def matrix(rows: int, columns: int, order: str = "rows", seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of normal numbers, in one of the orders in memory."""
    generator = torch.Generator().manual_seed(seed)
    return ordered(torch.randn(rows, columns, generator=generator).to(dtype), order)


def ordered(values: Tensor, order: str) -> Tensor:
    """A matrix in one of the orders in memory."""
    if order == "columns":
        return values.t().contiguous().t()
    if order == "apart":
        return torch.stack([values, values], -1)[..., 0]
    return values.contiguous()


@contextmanager
def at_the_end(matrix: Tensor) -> Iterator[Tensor]:
    """The same numbers at the end of memory: to read the next byte ends the process."""
    flat = matrix if matrix.is_contiguous() else matrix.t()
    count = flat.numel() * flat.element_size()
    pages = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, pages + mmap.PAGESIZE)
    memory = torch.frombuffer(room, dtype=torch.uint8)
    protect = partial(ctypes.CDLL(None).mprotect, ctypes.c_void_p(memory.data_ptr() + pages), mmap.PAGESIZE)
    assert protect(0) == 0
    there = memory[pages - count : pages].view(flat.dtype).view(flat.shape).copy_(flat)
    try:
        yield there if flat is matrix else there.t()
    finally:
        assert protect(mmap.PROT_READ | mmap.PROT_WRITE) == 0


def exact(*terms: Term) -> Tensor:
    """The sum of the products in float64."""
    return sum((scale * (left.double() @ right.double()) for left, right, scale in terms), torch.zeros(()).double())


def relative(found: Tensor, expected: Tensor) -> float:
    """The error over the norm of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())
