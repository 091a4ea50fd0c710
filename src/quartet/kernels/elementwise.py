"""The kernels on tensors: shapes and dtypes looked at, memory handed over.

A tensor that only stands for one in a plan of memory is left as it is: what a kernel needs is given to it. What a kernel writes
over counts as changed, so that autograd notices where it was saved for a pass that comes again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from quartet.kernels.library import DTYPES, are_real, fit, kernel
from quartet.kernels.threads import threads_now
from quartet.kernels.waiting import call, caught_up, keep


def silu_product(gate: Tensor, up: Tensor, out: Tensor) -> bool:
    """`silu(gate) * up` into `out`: `[rows, columns]` each, in one dtype; `out` may be either of them.

    Returns:
        Whether it was computed.
    """
    tensors = (gate, up, out)
    name = _for_rows(tensors, "silu_product")
    if name is None:
        caught_up()
        return False
    if are_real(*tensors):
        pointers, strides = [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]
        call(name, (*pointers, *gate.shape, *strides, threads_now()), tensors)
    else:
        keep(tensors)
    increment_version(out)
    return True


def silu_gradient(
    by_product: Tensor, gate: Tensor, up: Tensor, by_gate: Tensor, by_up: Tensor, product: Tensor | None
) -> bool:
    """From the gradient of `silu(gate) * up` those of gate and up, and the product itself again where that is asked for.

    Args:
        by_product, gate, up: `[rows, columns]`, in one dtype, as are all that follow.
        by_gate, by_up, product: written to; the first two may be any of what is given.

    Returns:
        Whether it was computed.
    """
    tensors = (by_product, gate, up, by_gate, by_up, *(() if product is None else (product,)))
    name = _for_rows(tensors, "silu_gradient")
    if name is None:
        caught_up()
        return False
    if are_real(*tensors):
        pointers, strides = [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]
        if product is None:
            pointers, strides = [*pointers, 0], [*strides, 0]
        call(name, (*pointers, *gate.shape, *strides, threads_now()), tensors)
    else:
        keep(tensors)
    increment_version(tensors[3:])
    return True


def add(sums: Tensor, states: Tensor) -> bool:
    """Add to `sums`: contiguous both, of one shape and dtype.

    Returns:
        Whether it was computed.
    """
    tensors = (sums, states)
    name = _for_whole(tensors, "add") if sums.shape == states.shape else None
    if name is None:
        caught_up()
        return False
    if are_real(*tensors):
        columns = max(sums.shape[-1], 1)
        numbers = (sums.numel() // columns, columns, threads_now())
        call(name, (*(t.data_ptr() for t in tensors), *numbers), tensors)
    else:
        keep(tensors)
    increment_version(sums)
    return True


def norms(states: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` and its gradient have a kernel for these tensors."""
    known = weight.ndim == 1 and len(weight) > 0 and states.shape[-1:] == weight.shape
    return known and _for_whole((states, weight), "rms_norm") is not None


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, sums: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """`x r w` with `r = 1 / sqrt(mean(x^2) + eps)` of each row, and r.

    Args:
        states: x, `[..., features]`; contiguous and in one dtype, like the weight.
        sums: what the states are added to first, in place, so that x is the sum; like the states.

    Returns:
        Shapes `[..., features]` and `[..., 1]`, the second in float32; None where there is no kernel for these tensors.
    """
    fits = norms(states, weight) and (sums is None or sums.shape == states.shape)
    name = _for_whole((states, weight) if sums is None else (states, weight, sums), "rms_norm") if fits else None
    if name is None:
        caught_up()
        return None
    out, scales = torch.empty_like(states), states.new_empty(*states.shape[:-1], 1, dtype=torch.float32)
    tensors = (states, weight, sums, out, scales)
    if are_real(states, weight):
        pointers, columns = [0 if t is None else t.data_ptr() for t in tensors], len(weight)
        call(name, (*pointers, states.numel() // columns, columns, eps, threads_now()), tensors)
    else:
        keep(tensors)
    if sums is not None:
        increment_version(sums)
    return out, scales


def rms_norm_gradient(
    gradient: Tensor, states: Tensor, weight: Tensor, scales: Tensor, *, of_weight: bool, also: Tensor | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Gradients of what `rms_norm` was given.

    Args:
        gradient, states: `[..., features]`, contiguous and in one dtype, like the weight.
        scales: the second that `rms_norm` gave.
        of_weight: whether the weight's is asked for; each of torch's threads sums up its rows' part.
        also: added to the gradient of the states, and like it.

    Returns:
        The gradient of the states and that of the weight; None where there is no kernel for these tensors.
    """
    fits = norms(states, weight) and gradient.shape == states.shape and scales.shape == (*states.shape[:-1], 1)
    fits = fits and fit(scales) and scales.dtype == torch.float32 and scales.is_contiguous()
    fits = fits and (also is None or also.shape == states.shape)
    given = (gradient, states, weight) if also is None else (gradient, states, weight, also)
    name = _for_whole(given, "rms_norm_gradient") if fits else None
    if name is None:
        caught_up()
        return None
    # Another number of parts would be summed up otherwise.
    by_states, threads = torch.empty_like(states), torch.get_num_threads() if of_weight else threads_now()
    parts = weight.new_zeros(threads, len(weight), dtype=torch.float32) if of_weight else None
    tensors = (gradient, states, weight, scales, also, by_states, parts)
    if are_real(gradient, states):
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        call(name, (*pointers, scales.numel(), len(weight), threads), tensors)
    else:
        keep(tensors)
    return by_states, None if parts is None else parts[0].to(weight.dtype)


def rotary_fits(states: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    """Whether `rotary` has a kernel for these tensors."""
    if states.ndim != 4 or cosines.ndim != 3 or not fit(states, cosines, sines):
        return False
    n, _, tokens, width = states.shape
    return (
        width % 2 == 0
        and len(cosines) in (1, n)
        and cosines.shape[1:] == (tokens, width)
        and cosines.shape == sines.shape
        and cosines.stride() == sines.stride()
        and cosines.dtype == sines.dtype
        and states.stride(3) == cosines.stride(2) == 1
        and _turning(states, cosines) is not None
    )


def rotary(states: Tensor, cosines: Tensor, sines: Tensor, *, back: bool) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of halves: `x cos + (-x2, x1) sin` with x = (x1, x2).

    Args:
        states: x, `[n, heads, tokens, width]`, in any order in memory but for the width.
        cosines, sines: `[n or 1, tokens, width]`, in float32 or the dtype of `states`, of one layout.
        back: turn back: the gradient's way.

    Returns:
        Shape, dtype and order of `states`.

    Raises:
        ValueError: there is no kernel for these tensors.
    """
    name = _turning(states, cosines) if rotary_fits(states, cosines, sines) else None
    if name is None:
        raise ValueError(f"no kernel turns {tuple(states.shape)} in {states.dtype} by {tuple(cosines.shape)} angles")
    out = torch.empty_like(states)
    if are_real(states, cosines):
        n, heads, tokens, width = states.shape
        strides = [t.stride(axis) for t in (states, out) for axis in (0, 2, 1)]
        angles = [0 if len(cosines) == 1 else cosines.stride(0), cosines.stride(1)]
        pointers = [t.data_ptr() for t in (states, cosines, sines, out)]
        numbers = (n, tokens, heads, width, *strides, *angles, back, threads_now())
        call(name, (*pointers, *numbers), (states, cosines, sines, out))
    else:
        keep((states, cosines, sines, out))
    return out


def _for_rows(tensors: tuple[Tensor, ...], name: str) -> str | None:
    first = tensors[0]
    if first.dtype not in DTYPES or first.ndim != 2 or not fit(*tensors):
        return None
    alike = all(t.dtype == first.dtype and t.shape == first.shape and t.stride(1) == 1 for t in tensors)
    return _named(name, first.dtype) if alike else None


def _for_whole(tensors: tuple[Tensor, ...], name: str) -> str | None:
    dtype = tensors[0].dtype
    alike = dtype in DTYPES and fit(*tensors) and all(t.dtype == dtype and t.is_contiguous() for t in tensors)
    return _named(name, dtype) if alike else None


def _turning(states: Tensor, angles: Tensor) -> str | None:
    dtypes = (states.dtype, angles.dtype)
    known = all(dtype in DTYPES for dtype in dtypes) and dtypes != (torch.float32, torch.bfloat16)
    return _named("rotary", *dtypes) if known else None


def _named(name: str, *dtypes: torch.dtype) -> str | None:
    """A kernel's whole name; None where there is none."""
    whole = "_".join((name, *(DTYPES[dtype] for dtype in dtypes)))
    return None if kernel(whole) is None else whole
