"""What a decoding step computes between its matrix products on a GPU, in few kernels, written in Triton.

Nothing here waits for the GPU or asks it for a number, so that a step can be recorded as a CUDA graph: a row's length comes
from memory when a kernel runs. Numbers are computed in float32 and rounded once. Importable where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.gpu import jit, power_of_two, tl
from quartet.kernels.gpu_forward import rms_norm

FEWEST_OF_A_TILE = 16
"""Sides of a product of tiles are filled up to so many."""
_BYTES_OF_A_BLOCK = 16384
"""Keys that a program of `attend` reads at once: with as many values, and the next of both on their way, 64 KiB."""


@jit
def _rotate_and_store(
    query, key, value, keys, values, cosines, sines, positions,
    query_norm, key_norm, query_row, key_row, value_row, columns, eps,
    NORMED: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row and head: the heads of queries, then of keys, then of values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row)
    half = SIZE // 2
    place = tl.arange(0, BLOCK)
    inside = place < half
    if head >= HEADS + SHARED:
        head -= HEADS + SHARED
        given = value + row * value_row + head * SIZE + place
        kept = values + ((row * SHARED + head) * columns + position) * SIZE + place
        kind = values.dtype.element_ty
        tl.store(kept, tl.load(given, mask=inside, other=0.0).to(kind), mask=inside)
        tl.store(kept + half, tl.load(given + half, mask=inside, other=0.0).to(kind), mask=inside)
    else:
        given = query + row * query_row + head * SIZE + place
        kept = given
        norm = query_norm
        if head >= HEADS:
            head -= HEADS
            given = key + row * key_row + head * SIZE + place
            kept = keys + ((row * SHARED + head) * columns + position) * SIZE + place
            norm = key_norm
        first = tl.load(given, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(given + half, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            scale = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / SIZE + eps)
            first *= scale * tl.load(norm + place, mask=inside, other=0.0).to(tl.float32)
            second *= scale * tl.load(norm + half + place, mask=inside, other=0.0).to(tl.float32)
        angle = position * SIZE + place
        cosine = tl.load(cosines + angle, mask=inside, other=0.0)
        sine = tl.load(sines + angle, mask=inside, other=0.0)
        turned = first * cosine - second * sine
        tl.store(kept, turned.to(keys.dtype.element_ty), mask=inside)
        cosine = tl.load(cosines + angle + half, mask=inside, other=0.0)
        sine = tl.load(sines + angle + half, mask=inside, other=0.0)
        turned = second * cosine + first * sine
        tl.store(kept + half, turned.to(keys.dtype.element_ty), mask=inside)


@jit
def _attend(
    query, keys, values, positions, out, query_row, columns, scaling,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row and head of keys; the softmax goes along over blocks of columns (arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    shared = tl.program_id(1)
    length = (tl.load(positions + row) + 1).to(tl.int32)
    head = tl.arange(0, SIDE)
    place = tl.arange(0, WIDTH)
    column = tl.arange(0, BLOCK)
    within = (head[:, None] < GROUP) & (place[None, :] < SIZE)
    spot = (shared * GROUP + head[:, None]) * SIZE + place[None, :]
    asked = tl.load(query + row * query_row + spot, mask=within, other=0.0)
    store = (row * SHARED + shared) * columns * SIZE
    most = tl.full([SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE], tl.float32)
    mixed = tl.zeros([SIDE, WIDTH], tl.float32)
    start = length * 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    for base in range(start // BLOCK * BLOCK, length, BLOCK):
        here = base + column
        seen = (here >= start) & (here < length)
        at = store + here[:, None] * SIZE + place[None, :]
        there = seen[:, None] & (place[None, :] < SIZE)
        key = tl.load(keys + at, mask=there, other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        before = tl.exp(most - higher)
        total = total * before + tl.sum(share, axis=1)
        value = tl.load(values + at, mask=there, other=0.0)
        part = tl.dot(share.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * before[:, None] + part
        most = higher
    mixed = mixed / total[:, None]
    result = out + row * (SHARED * GROUP * SIZE) + spot
    tl.store(result, mixed.to(out.dtype.element_ty), mask=within)


def add_norm(states: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add to the residual stream in place; give its RMS norm.

    Args:
        states: `[n, H]` without gaps, in float32 or bfloat16.
        delta: `[n, H]` without gaps; None where there is nothing to add.
        weight: `[H]`.
        dtype: of the result.

    Returns:
        `[n, H]`.
    """
    return rms_norm(states, weight, eps, dtype, also=delta, sums=states)


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Turn queries in place, and put turned keys and the values into the cache.

    Args:
        query: `[n, heads * size]`, which may be columns of a wider matrix, as the next two.
        key: `[n, shared * size]`.
        value: `[n, shared * size]`.
        keys: of the cache: `[rows, shared, columns, size]` without gaps, rows at least n; row i takes part with row i.
        values: like `keys`.
        angles: cosines and sines of every position, float32 `[columns, size]`.
        positions: int32 or int64 `[n]`, the column that each row writes.
        norms: weights `[size]` of the RMS norms of a head of queries and of one of keys, where these have norms.
        eps: of the norms.
    """
    _, shared, columns, size = keys.shape
    heads = query.shape[1] // size
    of_query, of_key = norms or (angles[0], angles[0])
    _rotate_and_store[(len(query), heads + 2 * shared)](
        query, key, value, keys, values, *angles, positions, of_query, of_key,
        query.stride(0), key.stride(0), value.stride(0), columns, eps,
        NORMED=norms is not None, HEADS=heads, SHARED=shared, SIZE=size, BLOCK=power_of_two(size // 2), num_warps=1,
    )  # fmt: skip


def attend(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """Attention of one token a row over its own row of the cache, up to its own column and no further.

    Args:
        query: `[n, heads * size]`, turned; may be columns of a wider matrix.
        keys: of the cache: `[rows, shared, columns, size]` without gaps; heads that share one stand side by side.
        values: like `keys`.
        positions: int32 or int64 `[n]`, the column of each row's token.
        scaling: of the products of queries and keys.
        window: tokens that it looks at; None for all.

    Returns:
        `[n, heads * size]` in the dtype of the query.
    """
    _, shared, columns, size = keys.shape
    group = query.shape[1] // (shared * size)
    width = max(FEWEST_OF_A_TILE, power_of_two(size))
    block = min(128, max(FEWEST_OF_A_TILE, _BYTES_OF_A_BLOCK // (width * keys.element_size())))
    out = query.new_empty(query.shape)
    _attend[(len(query), shared)](
        query, keys, values, positions, out, query.stride(0), columns, scaling,
        WINDOW=window or 0, SHARED=shared, GROUP=group, SIZE=size,
        SIDE=max(FEWEST_OF_A_TILE, power_of_two(group)), WIDTH=width, BLOCK=block, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
