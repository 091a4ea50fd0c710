"""Kernels of training passes on a GPU, in Triton: what lies between the matrix products of a decoder layer.

Numbers are computed in float32 and rounded once. A tensor that only stands for one in a plan of memory is left as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from quartet.kernels import gpu_forward
from quartet.kernels.gpu import jit, power_of_two, tl
from quartet.kernels.library import are_real

ROW_LIMIT = 16384
"""Numbers of a row that one program holds."""
PARTS = 256
"""Programs that share the rows of a norm's gradient, where each sums up the weight's."""
BLOCK = 1024
"""Numbers that a program of the gated product takes."""


def norm_fits(states: Tensor) -> bool:
    """Whether a row of these states is within a program's reach."""
    return states.shape[-1] <= ROW_LIMIT


def rms_norm(
    states: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, also: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`x r w` with `r = 1 / sqrt(mean(x^2) + eps)` of each row (arXiv 1910.07467), x, and r.

    Args:
        states: x, `[rows, features]`, contiguous.
        weight: w, `[features]`.
        dtype: of the result.
        also: added to x first, like the states but for the dtype; x is then the sum, in the dtype of `states`.

    Returns:
        `[rows, features]` twice, and float32 `[rows]`.
    """
    sums = states if also is None else torch.empty_like(states)
    scales = states.new_empty(len(states), dtype=torch.float32)
    out = gpu_forward.rms_norm(states, weight, eps, dtype, also=also, sums=sums, scales=scales)
    return out, sums, scales


def rms_norm_gradient(
    gradient: Tensor, states: Tensor, weight: Tensor, scales: Tensor, *, of_weight: bool, also: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what `rms_norm` was given: of the states, in their dtype, and of the weight.

    Args:
        gradient, states: `[rows, features]`, contiguous.
        scales: r.
        also: added to the gradient of the states, and like it.
    """
    rows, features = states.shape
    by_states = torch.empty_like(states)
    programs = min(rows, PARTS) if of_weight else rows
    parts = weight.new_zeros(programs, features, dtype=torch.float32) if of_weight else None
    if rows and are_real(states, gradient):
        block = power_of_two(features)
        _norm_gradient[(programs,)](
            *(gradient, states, weight, scales, states if also is None else also, by_states),
            *(by_states if parts is None else parts, rows, features),
            ADDS=also is not None,
            SUMS=of_weight,
            BLOCK=block,
            num_warps=gpu_forward.warps(block),
        )
    return by_states, None if parts is None else parts.sum(0).to(weight.dtype)


def turn(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, *, back: bool) -> None:
    """Rotary position embedding (arXiv 2104.09864) of halves, in place: `x cos + (-x2, x1) sin` with x = (x1, x2).

    Args:
        query, key: `[tokens, heads, width]`, each token's numbers contiguous.
        cosines, sines: `[tokens, width]`, contiguous, in any dtype.
        back: turn back: the gradient's way.
    """
    tokens, _, width = query.shape
    if tokens and are_real(query, key, cosines):
        for heads in (query, key):
            _turn[(tokens,)](
                *(heads, cosines, sines, heads.stride(0), heads.shape[1], width // 2),
                BACK=back,
                HEADS=power_of_two(heads.shape[1]),
                HALF=power_of_two(width // 2),
            )
    increment_version((query, key))


def silu_gradient(by_product: Tensor, gate: Tensor, up: Tensor) -> None:
    """From the gradient of `silu(gate) * up` those of gate and up, over these, and the product again, over its gradient.

    All contiguous and of one shape and dtype.
    """
    if gate.numel() and are_real(gate, up, by_product):
        count = gate.numel()
        _silu_gradient[(-(-count // BLOCK),)](by_product, gate, up, count, BLOCK=BLOCK)
    increment_version((by_product, gate, up))


@jit
def _norm_gradient(
    gradient,
    states,
    weight,
    scales,
    also,
    by_states,
    parts,
    rows,
    features,
    ADDS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < features
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    by_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    place = first.to(tl.int64) * features + column
    for row in range(first, rows, tl.num_programs(0)):
        g = tl.load(gradient + place, mask=real, other=0.0).to(tl.float32)
        x = tl.load(states + place, mask=real, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normal = x * scale
        slope = g * w
        along = tl.sum(slope * normal, 0) / features
        found = (slope - normal * along) * scale
        if ADDS:
            found += tl.load(also + place, mask=real, other=0.0).to(tl.float32)
        tl.store(by_states + place, found.to(by_states.dtype.element_ty), mask=real)
        if SUMS:
            by_weight += g * normal
        place += tl.num_programs(0) * features
    if SUMS:
        tl.store(parts + first.to(tl.int64) * features + column, by_weight, mask=real)


@jit
def _turn(
    states,
    cosines,
    sines,
    stride,
    heads,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    there = column < half
    real = (head < heads) & there
    angle = token * 2 * half + column
    cos1 = tl.load(cosines + angle, mask=there, other=0.0).to(tl.float32)
    cos2 = tl.load(cosines + angle + half, mask=there, other=0.0).to(tl.float32)
    sin1 = tl.load(sines + angle, mask=there, other=0.0).to(tl.float32)
    sin2 = tl.load(sines + angle + half, mask=there, other=0.0).to(tl.float32)
    place = states + token * stride + head * 2 * half + column
    first = tl.load(place, mask=real, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=real, other=0.0).to(tl.float32)
    if BACK:
        turned1, turned2 = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2
    tl.store(place, turned1.to(states.dtype.element_ty), mask=real)
    tl.store(place + half, turned2.to(states.dtype.element_ty), mask=real)


@jit
def _silu_gradient(by_product, gate, up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    by = tl.load(by_product + place, mask=real, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=real, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    active = g * share
    slope = share + active * (1.0 - share)
    tl.store(gate + place, (by * u * slope).to(gate.dtype.element_ty), mask=real)
    tl.store(up + place, (by * active).to(up.dtype.element_ty), mask=real)
    tl.store(by_product + place, (active * u).to(by_product.dtype.element_ty), mask=real)
