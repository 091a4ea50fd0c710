"""What an adapter adds to a linear layer, `s x A^T B^T` (arXiv 2106.09685), and its gradients, inside matrix products."""

from __future__ import annotations

from torch import Tensor

from quartet import kernels
from quartet.kernels import Term
from quartet.models.products import add_product, by_transposed, has_kernels, linear_product, product


def with_low_rank(
    states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`x W^T + b + s x A^T B^T`, and the low-rank states `x A^T`, `[tokens, r]`; all in one dtype."""
    if has_kernels(weight):
        flat = states.flatten(0, -2)
        low = product(flat, down.t())
        result = states.new_empty(*states.shape[:-1], weight.shape[0])
        if kernels.multiply(result.flatten(0, -2), Term(flat, weight.t()), Term(low, up.t(), scale), bias=bias):
            return result, low
    result = linear_product(states, weight, bias)
    kernels.caught_up()
    return result, add_low_rank(result, states, down, up, scale)


def add_low_rank(result: Tensor, states: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add `s x A^T B^T` to the layer's result in place; returns the low-rank states `x A^T`, `[tokens, r]`."""
    return add_upright(result, states, upright(down.to(result.dtype)), upright(up.to(result.dtype)), scale)


def add_upright(result: Tensor, states: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The same with `A^T` and `B^T` given in rows of their own, in the result's dtype."""
    low = states.flatten(0, -2).to(result.dtype) @ down
    result.flatten(0, -2).addmm_(low, up, alpha=scale)
    return low


def by_low_rank(gradient: Tensor, up: Tensor, scale: float) -> Tensor:
    """The gradient of the low-rank states, `[tokens, r]`, by that of the layer's result."""
    return product(gradient, transposed(up).t(), scale)


def through(gradient: Tensor, weight: Tensor, adapter: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient of x by that of the layer's result.

    Args:
        adapter: A, and the gradient of the low-rank states; None without an adapter.
    """
    if adapter is None:
        return by_transposed(gradient, weight)
    down, low_gradient = adapter
    if has_kernels(weight):
        result = gradient.new_empty(*gradient.shape[:-1], weight.shape[1])
        terms = Term(gradient.flatten(0, -2), weight), Term(low_gradient, down)
        if kernels.multiply(result.flatten(0, -2), *terms):
            return result
    result = by_transposed(gradient, weight)
    add_product(result.flatten(0, -2), low_gradient, down)
    return result


def low_rank_gradients(
    gradient: Tensor, low_gradient: Tensor, states: Tensor, low: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, where `add_low_rank` gave `low`, by those of the layer's result and of `low`."""
    flat = gradient.flatten(0, -2)
    # With the narrow side upright, and not the wide one, a product takes a fifth to a quarter less.
    by_up = product(low.t(), flat, scale).t()
    return product(low_gradient.t(), states.flatten(0, -2)), by_up


def transposed(matrix: Tensor) -> Tensor:
    """The transposed matrix of an adapter, in memory as products with it, or with what it was made of, are fast."""
    return matrix.t() if has_kernels(matrix) else upright(matrix)


def upright(matrix: Tensor) -> Tensor:
    """The transposed matrix in rows of its own: MKL multiplies narrow matrices of that form up to three times faster."""
    return matrix.t().contiguous()
