"""Matrices for kernels that multiply, and their products in float64."""

from __future__ import annotations

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


def exact(*terms: Term) -> Tensor:
    """The sum of the products in float64."""
    return sum((scale * (left.double() @ right.double()) for left, right, scale in terms), torch.zeros(()).double())


def relative(found: Tensor, expected: Tensor) -> float:
    """The error over the norm of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())
