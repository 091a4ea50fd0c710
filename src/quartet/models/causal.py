"""Causal attention of sequences side by side by a kernel, where numbers of a training pass are computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet import kernels


def causal_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float) -> Tensor:
    """softmax(q k^T * scaling) v of each token over those of its sequence up to itself (arXiv 1706.03762).

    Keeps what it is given and what it gives; shares are computed again in the backward pass.

    Args:
        query: `[1, heads, tokens, d]`, one after the other the tokens of all sequences.
        key, value: `[1, key heads, tokens, d]`; each serves `heads / key heads` query heads.
        bounds: int64 `[sequences + 1]`: the place of each sequence's first token, and after the last sequence's last.
        longest: tokens of the longest sequence.

    Returns:
        `[1, tokens, heads, d]`, zeros for tokens of no sequence.
    """
    apply: Callable[..., Tensor] = Causal.apply
    return apply(query, key, value, bounds, longest, scaling)


def as_one_row(states: Tensor) -> Tensor:
    """`[n, heads, L, d]` as `[1, heads, n * L, d]`: in the same memory where it lies so, else a copy."""
    rows, heads, length, size = states.shape
    return states.transpose(1, 2).reshape(1, rows * length, heads, size).transpose(1, 2)


class Causal(torch.autograd.Function):
    """The pass of `causal_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float
    ) -> Tensor:
        mixed = kernels.attention(query, key, value, bounds, longest, scaling)
        ctx.save_for_backward(query, key, value, mixed, bounds)
        ctx.longest, ctx.scaling = longest, scaling
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, bounds = ctx.saved_tensors
        found = kernels.attention_gradient(
            query, key, value, mixed, gradient.contiguous(), bounds, ctx.longest, ctx.scaling
        )
        return *found, None, None, None
