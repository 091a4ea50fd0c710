"""What forward passes of training and decoding steps on a GPU have in common: RMS norms and gated products, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.gpu import jit, power_of_two, tl
from quartet.kernels.library import are_real


@jit
def _norm(
    states,
    also,
    sums,
    weight,
    out,
    scales,
    eps,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = row * SIZE + column
    found = tl.load(states + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        found += tl.load(also + place, mask=inside, other=0.0).to(tl.float32)
        kept = found.to(sums.dtype.element_ty)
        tl.store(sums + place, kept, mask=inside)
        found = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(found * found, axis=0) / SIZE + eps)
    found *= scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)
    if KEEPS:
        tl.store(scales + row, scale)


@jit
def _silu_product(gate, up, out, gate_row, up_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    found = tl.load(gate + row * gate_row + place, mask=inside, other=0.0).to(tl.float32)
    found = found / (1.0 + tl.exp(-found))
    found *= tl.load(up + row * up_row + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + place, found.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    states: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    also: Tensor | None = None,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """`x w / sqrt(mean(x^2) + eps)` of each row (arXiv 1910.07467); no row where the tensors stand for such in a plan.

    Args:
        states: x, `[rows, features]` without gaps, in float32 or bfloat16.
        weight: w, `[features]`.
        dtype: of the result.
        also: added to x first, of its shape and without gaps; x is then the sum.
        sums: where the sum goes, like the states, and may be these.
        scales: float32 `[rows]`, where the factors of x w go.

    Returns:
        `[rows, features]`.
    """
    out, (rows, size) = torch.empty_like(states, dtype=dtype), states.shape
    if rows and are_real(states):
        block = power_of_two(size)
        others = [states if other is None else other for other in (also, sums)]
        _norm[(rows,)](
            *(states, *others, weight, out, out if scales is None else scales, eps),
            ADDS=also is not None,
            KEEPS=scales is not None,
            SIZE=size,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate: `[rows, features]`, which may be columns of a wider matrix.
        up: like `gate`.

    Returns:
        `[rows, features]` without gaps, in the dtype of the gate.
    """
    out, (rows, size) = gate.new_empty(gate.shape), gate.shape
    if rows and are_real(gate, up):
        block = min(1024, power_of_two(size))
        grid = rows, -(-size // block)
        _silu_product[grid](gate, up, out, gate.stride(0), up.stride(0), SIZE=size, BLOCK=block)
    return out


def warps(block: int) -> int:
    """Groups of 32 threads for a row of so many numbers."""
    return min(16, max(1, block // 256))
