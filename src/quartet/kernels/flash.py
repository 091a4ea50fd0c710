"""Causal attention of sequences side by side on a GPU, by the FlashAttention kernels (arXiv 2307.08691) that torch brings."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.library import are_real

WIDEST = 256
"""Numbers of a head."""


@cache
def are_there() -> bool:
    """Whether this torch has the operations, in the form that is known here."""
    try:
        schema = torch.ops.aten._flash_attention_forward.default._schema
    except AttributeError:
        return False
    names = [argument.name for argument in schema.arguments]
    return names[:10] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
        "return_debug_mask",
    ]


def fits(heads: int, key_heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads of this size and number."""
    return dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= WIDEST and heads % key_heads == 0


def attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float
) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T * scaling) v of each token over those of its sequence up to itself.

    Args:
        query: `[tokens, heads, size]`.
        key, value: `[tokens, key heads, size]`; each serves `heads / key heads` query heads.
        starts: int32 `[sequences + 1]`: the place of each sequence's first token, and after the last sequence's last.
        longest: tokens of the longest.

    Returns:
        `[tokens, heads, size]`, and what the gradient needs besides.
    """
    if not are_real(query, key, value):
        rest = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        return torch.empty_like(query), [rest, query.new_empty(2), query.new_empty(0)]
    operation: Any = torch.ops.aten._flash_attention_forward
    mixed, sums, *random, _ = operation(
        *(query, key, value, starts, starts, longest, longest, 0.0, True, False), scale=scaling
    )
    return mixed, [sums, *random]


def attention_gradient(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    rest: list[Tensor],
    starts: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    Args:
        mixed, rest: what `attention` gave.
        gradient: of `mixed`, contiguous.
    """
    if not are_real(query, key, value):
        return _planned(query, key, value, starts)
    operation: Any = torch.ops.aten._flash_attention_backward
    sums, *random = rest
    found: tuple[Tensor, Tensor, Tensor] = operation(
        *(gradient, query, key, value, mixed, sums, starts, starts, longest, longest, 0.0, True, *random), scale=scaling
    )
    return found


def _planned(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in a plan of memory, made beside the room that the operation takes for itself: sums of the queries' gradient in
    float32, and where heads share keys and values the gradients of these for each head."""
    tokens, heads, size = query.shape
    room = [query.new_empty(tokens + 128 * (len(starts) - 1), heads, -(-size // 32) * 32, dtype=torch.float32)]
    room += [torch.empty_like(query) for _ in range(2) if key.shape[1] != heads]
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    del room
    return found
