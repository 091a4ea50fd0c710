"""Causal attention of sequences side by side: tensors looked at, memory handed over."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quartet.kernels.library import DTYPES, are_real, fit, kernel
from quartet.kernels.threads import threads_now
from quartet.kernels.waiting import call, keep

SIDE = 16
"""Tokens are filled up to a multiple of so many, of which the numbers of a head have to be one too (`SIDE` in few_rows.h)."""
LONGEST = 512
"""Tokens of a sequence: a thread's room grows with their square."""
HEAD_ROOMS = 9
"""Of a sequence's tokens under one head, in a thread's room (`attention_numbers` in sequences.h)."""
_WHOLE = ("sequences", "tokens", "heads", "shared", "size", "longest", "threads")
_STRIDES = [
    f"{name}_{of}"
    for name in ("query", "key", "value", "mixed", "by_query", "by_key", "by_value")
    for of in ("token", "head")
]


class _Attention(ctypes.Structure):
    """`attention` in sequences.h."""

    _fields_ = [
        *((name, ctypes.c_long) for name in (*_WHOLE, *_STRIDES)),
        ("first", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
    ]


def attention_fits(query: Tensor, key: Tensor, value: Tensor, longest: int) -> bool:
    """Whether there are kernels for these tensors, of which the longest sequence has so many tokens."""
    tensors, dtype = (query, key, value), query.dtype
    size, heads = query.shape[-1], query.shape[1]
    alike = all(t.ndim == 4 and t.dtype == dtype and t.shape[-1] == size and t.stride(3) == 1 for t in tensors)
    known = dtype in DTYPES and alike and fit(*tensors) and size % SIDE == 0 and heads % key.shape[1] == 0
    known = known and key.shape == value.shape and key.shape[2] == query.shape[2] and len(query) == 1
    return known and 0 < longest <= LONGEST and kernel(f"attention_{DTYPES[dtype]}") is not None


def attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, longest: int, scaling: float) -> Tensor:
    """softmax(q k^T * scaling) v of each token over those of its sequence up to itself.

    Args:
        query: `[1, heads, tokens, size]`, in any order in memory but for the size.
        key, value: `[1, key heads, tokens, size]`; each serves `heads / key heads` query heads.
        first: int64 `[sequences + 1]`: the place of each sequence's first token, and after the last sequence's last.
        longest: tokens of the longest.

    Returns:
        `[1, tokens, heads, size]`, zeros for tokens of no sequence.
    """
    mixed = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    asked, room = _asked(query, key, value, mixed, first, longest, scaling)
    _call("attention", (query, key, value, mixed), asked, (room, first))
    return mixed


def attention_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    by_mixed: Tensor,
    first: Tensor,
    longest: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, the heads of a token side by side.

    Args:
        mixed: what `attention` gave.
        by_mixed: its gradient, in the same order.
    """
    # Of an order of their own: what is given may lie apart in memory, or be a part of something wider.
    shapes = [t.transpose(1, 2).shape for t in (query, key, value)]
    by_query, by_key, by_value = (query.new_empty(shape).transpose(1, 2) for shape in shapes)
    found = by_query, by_key, by_value
    asked, room = _asked(query, key, value, mixed, first, longest, scaling, found)
    _call("attention_gradient", (query, key, value, mixed, by_mixed, *found), asked, (room, first))
    return found


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    first: Tensor,
    longest: int,
    scaling: float,
    gradients: tuple[Tensor, ...] = (),
) -> tuple[_Attention, Tensor]:
    """What the kernels are told, and the memory in which they work."""
    threads, size, side = threads_now(), query.shape[3], -(-longest // SIDE) * SIDE
    room = query.new_empty(threads * side * (HEAD_ROOMS * size + 2 * side), dtype=torch.float32)
    real = are_real(query)
    strides = [t.stride(axis) for t in (query, key, value, mixed.transpose(1, 2), *gradients) for axis in (2, 1)]
    strides += [0] * (len(_STRIDES) - len(strides))
    asked = _Attention(
        len(first) - 1, query.shape[2], query.shape[1], key.shape[1], size, longest, threads, *strides,
        first.data_ptr() if real else 0, room.data_ptr() if real else 0, scaling,
    )  # fmt: skip
    return asked, room


def _call(name: str, tensors: tuple[Tensor, ...], asked: _Attention, more: tuple[Tensor, ...]) -> None:
    kept = (asked, *more, *tensors)
    if are_real(*tensors):
        given = ctypes.addressof(asked), *(t.data_ptr() for t in tensors)
        call(f"{name}_{DTYPES[tensors[0].dtype]}", given, kept)
    else:
        keep(kept)
