"""Log-probabilities under a trained LM head that is one linear layer, in blocks of the vocabulary.

A trained head is multiplied four times: for the logits, for the logits again in the backward pass, and for the gradients of
states and weight. Chunks of tokens would make the weight's gradient, as large as the weight, once for each chunk. Blocks of the
vocabulary make each part of it once for many tokens, and nothing of the vocabulary's size is held besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet.models.gradients import IN_PLACE, add_narrow_product
from quartet.models.linears import Weights
from quartet.models.products import add_product, by_transposed, computed_in, linear_product, product_into

BLOCK = 2048
"""Logits of a token at once (of 512 to 4096 the fastest, measured on the CPU in float32 and bfloat16)."""
TILE = 512
"""Tokens at once."""
IMPOSSIBLE = -1e4
"""Where logarithms of probabilities are cut off: the exponential is 0 in float64 too, and products with 0 stay finite."""


def linear_logprobs(
    hidden: Tensor, head: Weights, tokens: Tensor, *, temperature: float, with_entropy: bool, entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`log softmax(logits / temperature)` at the given tokens and the entropy, with `logits = hidden W^T + b`.

    The maximum and the normaliser are carried from block to block (arXiv 1805.02867), likewise the sum that the entropy needs.

    Args:
        hidden: `[N, H]`, last hidden states; under autocast the products are computed in its dtype.
        head: W `[V, H]` and b `[V]` or None.
        tokens: int64 `[N]`.
        temperature: divisor of the logits, above 0.
        with_entropy: compute the entropy too.
        entropy_grad: the entropy needs gradients.

    Returns:
        (log-probabilities `[N]`, entropy `[N]` or None), nats, float32 or float64. The entropy carries a gradient only
        with `entropy_grad`.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _LinearLogprobs.apply
    entropies = with_entropy or entropy_grad
    logprobs, entropy = apply(hidden, head.weight, head.bias, tokens, temperature, entropies, entropy_grad)
    return logprobs, entropy if with_entropy else None


class _Blocks:
    """The logits of a tile of tokens in a block of the vocabulary, one after the other."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> None:
        self._states, self._weight, self._bias, self._tokens = states, weight, bias, tokens
        self.wide = torch.promote_types(states.dtype, torch.float32)
        self._rooms = [states.new_empty(min(len(states), TILE) * min(len(weight), BLOCK), dtype=self.wide)]

    def room(self, like: Tensor, number: int = 0) -> Tensor:
        """Memory in the shape of a block's logits, float32 or float64, holding anything."""
        if number == len(self._rooms):
            self._rooms.append(torch.empty_like(self._rooms[0]))
        return self._rooms[number][: like.numel()].view_as(like)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Iterator[tuple[slice, Tensor, Tensor, Tensor]]]]:
        """Columns, their part of the weight, and for each tile: rows, logits, the tokens' places among the columns, and which
        tokens are among them."""
        for start in range(0, len(self._weight), BLOCK):
            columns = slice(start, min(start + BLOCK, len(self._weight)))
            part = self._weight[columns].to(self._states.dtype)
            yield columns, part, self._tiles(columns, part)

    def _tiles(self, columns: slice, part: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        bias = None if self._bias is None else self._bias[columns].to(part.dtype)
        for start in range(0, len(self._states), TILE):
            rows = slice(start, min(start + TILE, len(self._states)))
            place = self._tokens[rows] - columns.start
            inside = (place >= 0) & (place < len(part))
            yield rows, linear_product(self._states[rows], part, bias), place.clamp(0, len(part) - 1)[:, None], inside


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        states = hidden.to(computed_in(hidden))
        blocks = _Blocks(states, weight, bias, tokens)
        top = states.new_full((len(states),), torch.finfo(blocks.wide).min, dtype=blocks.wide)
        chosen, total, weighted = (torch.zeros_like(top) for _ in range(3))
        for _, _, tiles in blocks:
            for rows, logits, place, inside in tiles:
                found = logits.gather(1, place).squeeze(1).to(blocks.wide)
                chosen[rows] = found.where(inside, chosen[rows])
                before, top[rows] = top[rows].clone(), torch.maximum(top[rows], logits.amax(1).to(blocks.wide))
                shifted = torch.sub(logits, top[rows, None], out=blocks.room(logits))
                if temperature != 1.0:
                    shifted.div_(temperature)
                lower = ((before - top[rows]) / temperature).clamp_(min=IMPOSSIBLE)
                shrunk = lower.exp()
                if with_entropy:
                    weighted[rows] = shrunk * (weighted[rows] + total[rows] * lower)
                    exponentials = torch.exp(shifted.clamp_(min=IMPOSSIBLE), out=blocks.room(logits, 1))
                    weighted[rows] += shifted.mul_(exponentials).sum(1)
                else:
                    exponentials = shifted.exp_()
                total[rows] = total[rows] * shrunk + exponentials.sum(1)
        log_total = total.log()
        logprobs = (chosen - top) / temperature - log_total
        entropy = log_total - weighted / total if with_entropy else logprobs.new_empty(0)
        ctx.save_for_backward(states, weight, bias, tokens, top, log_total, entropy)
        ctx.weight, ctx.temperature, ctx.dtype = weight, temperature, hidden.dtype
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, tokens, top, log_total, entropy = ctx.saved_tensors
        if by_logprob is None and by_entropy is None:
            return (None,) * 7
        by_logprob = torch.zeros_like(top) if by_logprob is None else by_logprob / ctx.temperature
        blocks = _Blocks(states, weight, bias, tokens)
        by_states = states.new_zeros(states.shape, dtype=blocks.wide)
        by_bias = None if bias is None else torch.zeros_like(bias)
        place = IN_PLACE.place(ctx.weight)
        by_weight, filled = (torch.empty_like(weight), False) if place is None else place
        if not len(states) and not filled:
            by_weight.zero_()
        for columns, part, tiles in blocks:
            into = by_weight[columns]
            for rows, logits, spot, inside in tiles:
                slope = _log_probabilities(logits, top[rows, None], log_total[rows, None], ctx.temperature, blocks)
                if by_entropy is None:
                    slope.exp_().mul_(-by_logprob[rows, None])
                else:
                    # d entropy / d logit = -p (log p + entropy), over the temperature.
                    probabilities = torch.exp(slope, out=blocks.room(logits, 1))
                    slope.clamp_(min=IMPOSSIBLE).add_(entropy[rows, None])
                    slope.mul_(-by_entropy[rows, None] / ctx.temperature).sub_(by_logprob[rows, None]).mul_(
                        probabilities
                    )
                slope.scatter_add_(1, spot, by_logprob[rows].where(inside, 0.0)[:, None])
                narrow = slope if slope.dtype == logits.dtype else logits.copy_(slope)
                by_states[rows] += by_transposed(narrow, part)
                more = filled or rows.start > 0
                if narrow.dtype != into.dtype:
                    add_narrow_product(into, narrow.t(), states[rows], filled=more)
                elif more:
                    add_product(into, narrow.t(), states[rows])
                else:
                    product_into(into, narrow.t(), states[rows])
                if by_bias is not None:
                    by_bias[columns] += slope.sum(0)
        return by_states.to(ctx.dtype), None if place is not None else by_weight, by_bias, None, None, None, None


def _log_probabilities(logits: Tensor, top: Tensor, log_total: Tensor, temperature: float, blocks: _Blocks) -> Tensor:
    """`log softmax(logits / temperature)` of a block, from each token's `[n, 1]` largest logit and logarithm of the sum."""
    room = blocks.room(logits)
    if temperature == 1.0:
        return torch.sub(logits, top + log_total, out=room)
    return torch.sub(logits, top, out=room).div_(temperature).sub_(log_total)
