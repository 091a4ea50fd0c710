"""Matrix products of training passes on a CPU: by compiled kernels or oneDNN where these are faster, by torch anywhere else.

No gradient is asked of anything here. Kernels take the sum of several products in one pass over the result.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quartet import kernels
from quartet.kernels import Term
from quartet.kernels.library import are_real
from quartet.models.precision import on_cpu

SMALLEST_SIDE = 64
"""Features below which a call of oneDNN costs more than it saves."""
SMALLEST_TRANSPOSED = 512
"""Features from which oneDNN beats MKL at a product with the transposed weight."""


@cache
def _widest_vectors() -> bool:
    """Whether the processor has vectors that MKL leaves unused."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not kernels.is_intel()


def is_plain(weight: Tensor) -> bool:
    """Not quantized or sharded, which only looks like a tensor."""
    return type(weight) in (nn.Parameter, Tensor) or not is_traceable_wrapper_subclass(weight)


def has_onednn(weight: Tensor) -> bool:
    """Whether products with this weight are faster through oneDNN."""
    return (
        on_cpu(weight)
        and weight.dtype == torch.float32
        and min(weight.shape) >= SMALLEST_SIDE
        and _widest_vectors()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and is_plain(weight)
    )


def has_kernels(weight: Tensor) -> bool:
    """Whether products with this weight are faster by compiled kernels."""
    return kernels.multiplies(weight.dtype) and on_cpu(weight) and is_plain(weight)


def computed_in(states: Tensor) -> torch.dtype:
    """The dtype of a product with these states, under autocast or not."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """`scale left @ right`, of matrices."""
    if kernels.multiplies_alone(left, right) and on_cpu(left):
        out = left.new_empty(left.shape[0], right.shape[1])
        if kernels.multiply(out, Term(left, right, scale)):
            return out
        del out
    found = left @ right
    return found if scale == 1.0 else found.mul_(scale)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of matrices in bfloat16, as float32: a GPU's sums are not rounded in between."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if not are_real(left):
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    return (left @ right).float()


def product_into(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right`, and a bias for each column, over what `out` holds, of whose memory the others have no part."""
    if kernels.multiply(out, Term(left, right), bias=bias):
        return out
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add `scale left @ right` to a matrix."""
    return out if kernels.multiply(out, Term(left, right, scale), add=True) else out.addmm_(left, right, alpha=scale)


def sum_into(out: Tensor, *terms: Term) -> Tensor:
    """The sum of the terms, the first of which is not scaled, over what `out` holds."""
    first, *others = terms
    assert first.scale == 1.0, f"the first term is scaled by {first.scale}"
    if kernels.multiply(out, *terms):
        return out
    torch.mm(first.left, first.right, out=out)
    for term in others:
        out.addmm_(term.left, term.right, alpha=term.scale)
    return out


def linear_product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, no gradient asked."""
    if states.dtype == weight.dtype == torch.float32 and states.dim() > 1 and has_kernels(weight):
        result = states.new_empty(*states.shape[:-1], weight.shape[0])
        if kernels.multiply(result.flatten(0, -2), Term(states.flatten(0, -2), weight.t()), bias=bias):
            return result
    if states.dtype == torch.float32 and has_onednn(weight):
        by_onednn: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return by_onednn
    return nn.functional.linear(states, weight, bias)


def by_transposed(gradient: Tensor, weight: Tensor) -> Tensor:
    """`g W`, no gradient asked."""
    if gradient.dtype == weight.dtype == torch.float32 and has_kernels(weight):
        return product(gradient.flatten(0, -2), weight).view(*gradient.shape[:-1], weight.shape[1])
    if gradient.dtype == torch.float32 and has_onednn(weight) and min(weight.shape) >= SMALLEST_TRANSPOSED:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        return result
    return gradient @ weight
