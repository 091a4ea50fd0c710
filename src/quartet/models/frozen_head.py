"""Log-probabilities under a frozen LM head that is one linear layer, with their derivatives by the states.

A log-probability depends on one row of the states alone, so its derivative `sum_v (1[v = token] - p_v) W_v / temperature` is
taken in the forward pass: two products with the head in all. What costs time besides is traffic over logits. They are written
once, in the dtype of the products; blocks of them that fit into a cache become exponentials, written over them; and the
normaliser is divided out after the second product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.linear_head import IMPOSSIBLE
from quartet.models.linears import Weights
from quartet.models.products import by_transposed, computed_in, has_onednn, linear_product, product_into

TILE = 256
"""Tokens whose logits exist at once."""
BLOCK = 1024
"""Logits of a token that are worked on at once (with 256 tokens, of 64 to 512, the fastest or nearly, measured on the CPU in
float32 and bfloat16 at vocabularies of 8192 and 32000)."""


def frozen_logprobs(
    hidden: Tensor, head: Weights, tokens: Tensor, *, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`log softmax(logits / temperature)` at the given tokens and the entropy, with `logits = hidden W^T + b`.

    Args:
        hidden: `[N, H]`, last hidden states; under autocast the products are computed in its dtype.
        head: W `[V, H]` and b `[V]` or None, none of which needs a gradient.
        tokens: int64 `[N]`.
        temperature: divisor of the logits, above 0.
        with_entropy: compute the entropy too.

    Returns:
        (log-probabilities `[N]`, entropy `[N]` or None), nats, float32 or float64. The entropy carries no gradient.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _FrozenLogprobs.apply
    logprobs, entropy = apply(hidden, head.weight, head.bias, tokens, temperature, with_entropy)
    return logprobs, entropy if with_entropy else None


class _FrozenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        states = hidden.to(computed_in(hidden))
        weight, bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        logprobs = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        entropies = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        slopes = torch.empty_like(hidden)
        rooms = _Rooms(min(len(states), TILE), weight, logprobs.dtype)
        places = torch.arange(min(len(states), TILE), device=states.device)
        for start in range(0, len(states), TILE):
            rows = slice(start, min(start + TILE, len(states)))
            logits, chosen = rooms.logits(states[rows], weight, bias), tokens[rows]
            logit = logits.gather(1, chosen[:, None]).squeeze(1)
            top, total, weighted = rooms.exponentials(logits, temperature, with_entropy)
            shifted = (logit - top) / temperature
            log_total = total.log()
            logprobs[rows] = shifted - log_total
            if with_entropy:
                entropies[rows] = log_total - weighted / total
            # The token's own part as a difference: where its probability is nearly 1, rounding first would leave nothing of it.
            own = (shifted.exp() - total).to(logits.dtype)
            logits.index_put_((places[: len(chosen)], chosen), own)  # `scatter_` widens all of them first in bfloat16
            slope = by_transposed(logits, weight).to(total.dtype)
            slopes[rows] = slope.div_(-(total * temperature)[:, None]).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (by_logprob[:, None] * slopes).to(slopes.dtype), None, None, None, None, None


class _Rooms:
    """Memory that every tile uses again."""

    def __init__(self, tokens: int, weight: Tensor, wide: torch.dtype) -> None:
        own = weight.dtype == torch.float32 and has_onednn(weight)  # oneDNN's product brings memory of its own
        self._logits = None if own else weight.new_empty(tokens, len(weight))
        self._block = tokens, min(len(weight), BLOCK)
        self._wide = wide
        self._others: tuple[Tensor, Tensor] | None = None

    def logits(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + b`, `[n, V]`."""
        if self._logits is None:
            return linear_product(states, weight, bias)
        return product_into(self._logits[: len(states)], states, weight.t(), bias)

    def exponentials(self, logits: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Write `e = exp((logit - largest) / temperature)` over the logits.

        Returns:
            `[n]` each: the largest logits, the sums of e, and those of `e log e` or anything.
        """
        top = logits.new_full((len(logits),), torch.finfo(self._wide).min, dtype=self._wide)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)
        if kernels.exponentials(logits, top, total, weighted if with_entropy else None, temperature, written=True):
            return top, total, weighted
        top = logits.amax(1).to(self._wide)
        if self._others is None:
            self._others = (
                logits.new_empty(self._block, dtype=self._wide),
                logits.new_empty(self._block, dtype=self._wide),
            )
        for start in range(0, logits.shape[1], BLOCK):
            block = logits[:, start : start + BLOCK]
            count, width = block.shape
            shifted = torch.sub(block, top[:, None], out=self._others[0][:count, :width])
            if temperature != 1.0:
                shifted.div_(temperature)
            if with_entropy:
                found = torch.exp(shifted.clamp_(min=IMPOSSIBLE), out=self._others[1][:count, :width])
                weighted += shifted.mul_(found).sum(1)
            else:
                found = shifted.exp_()
            total += found.sum(1)
            block.copy_(found)
        return top, total, weighted
