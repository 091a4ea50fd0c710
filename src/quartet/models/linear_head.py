"""Log-probabilities under a trained LM head that is one linear layer, in blocks of the vocabulary.

A trained head is multiplied four times: for the logits, for the logits again in the backward pass, and for the gradients of
states and weight. Chunks of tokens would make the weight's gradient, as large as the weight, once for each chunk. Blocks of the
vocabulary make each part of it once for many tokens, and nothing of the vocabulary's size is held besides, but for the weight
in the dtype of the products where copies are kept for all microbatches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.converted import CONVERTED
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
        self._rooms: list[Tensor] = []

    def room(self, like: Tensor, number: int = 0) -> Tensor:
        """Memory in the shape of a block's logits, float32 or float64, holding anything; the second once there is a first."""
        if number == len(self._rooms):
            size = min(len(self._states), TILE) * min(len(self._weight), BLOCK)
            self._rooms.append(self._states.new_empty(size, dtype=self.wide))
        return self._rooms[number][: like.numel()].view_as(like)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Iterator[tuple[slice, Tensor, Tensor]]]]:
        """Columns, their part of the weight, and for each tile: rows, logits, and the tokens' places, counted from the first of
        the columns: of some tokens among them, of the others not."""
        for start in range(0, len(self._weight), BLOCK):
            columns = slice(start, min(start + BLOCK, len(self._weight)))
            part = CONVERTED.rows(self._weight, columns, self._states.dtype)
            yield columns, part, self._tiles(columns, part)

    def _tiles(self, columns: slice, part: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        bias = None if self._bias is None else self._bias[columns].to(part.dtype)
        for start in range(0, len(self._states), TILE):
            rows = slice(start, min(start + TILE, len(self._states)))
            yield rows, linear_product(self._states[rows], part, bias), self._tokens[rows] - columns.start


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
        for _, part, tiles in blocks:
            for rows, logits, place in tiles:
                found = logits.gather(1, place.clamp(0, len(part) - 1)[:, None]).squeeze(1).to(blocks.wide)
                chosen[rows] = found.where(_inside(place, len(part)), chosen[rows])
                _carry_on(logits, top[rows], total[rows], weighted[rows] if with_entropy else None, temperature, blocks)
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
        by_entropy = None if by_entropy is None else by_entropy / ctx.temperature
        blocks = _Blocks(states, ctx.weight, bias, tokens)
        by_states = states.new_zeros(states.shape, dtype=blocks.wide)
        by_bias = None if bias is None else torch.zeros_like(bias)
        kept = IN_PLACE.place(ctx.weight)
        by_weight, filled = (torch.empty_like(weight), False) if kept is None else kept
        if not len(states) and not filled:
            by_weight.zero_()
        for columns, part, tiles in blocks:
            into = by_weight[columns]
            for rows, logits, place in tiles:
                weights = by_logprob[rows], None if by_entropy is None else by_entropy[rows]
                known = top[rows], log_total[rows], entropy[rows]
                slope = _slope(logits, place, weights, known, ctx.temperature, blocks)
                by_states[rows] += by_transposed(slope, part)
                more = filled or rows.start > 0
                if slope.dtype != into.dtype:
                    add_narrow_product(into, slope.t(), states[rows], filled=more)
                elif more:
                    add_product(into, slope.t(), states[rows])
                else:
                    product_into(into, slope.t(), states[rows])
                if by_bias is not None:
                    by_bias[columns] += slope.sum(0, dtype=blocks.wide)
        return by_states.to(ctx.dtype), None if kept is not None else by_weight, by_bias, None, None, None, None


def _inside(place: Tensor, columns: int) -> Tensor:
    """Which tokens are among so many columns."""
    return (place >= 0) & (place < columns)


def _carry_on(
    logits: Tensor, top: Tensor, total: Tensor, weighted: Tensor | None, temperature: float, blocks: _Blocks
) -> None:
    """Add a block to the largest logits `[n]` and the sums of `e = exp((logit - largest) / temperature)` and of `e log e`."""
    if kernels.exponentials(logits, top, total, weighted, temperature, written=False):
        return
    before = top.clone()
    torch.maximum(top, logits.amax(1).to(top.dtype), out=top)
    shifted = torch.sub(logits, top[:, None], out=blocks.room(logits))
    if temperature != 1.0:
        shifted.div_(temperature)
    lower = ((before - top) / temperature).clamp_(min=IMPOSSIBLE)
    shrunk = lower.exp()
    if weighted is None:
        exponentials = shifted.exp_()
    else:
        weighted.add_(total * lower).mul_(shrunk)
        exponentials = torch.exp(shifted.clamp_(min=IMPOSSIBLE), out=blocks.room(logits, 1))
        weighted += shifted.mul_(exponentials).sum(1)
    total.mul_(shrunk).add_(exponentials.sum(1))


def _slope(
    logits: Tensor,
    place: Tensor,
    weights: tuple[Tensor, Tensor | None],
    known: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    blocks: _Blocks,
) -> Tensor:
    """The gradient of a weighted sum of log-probabilities and entropies by a block's logits, in their dtype; they are lost.

    Args:
        place: int64 `[n]`: the tokens' among the block's columns.
        weights: `[n]` each, over the temperature; None for no entropy.
        known: `[n]` each: largest logit, logarithm of the sum, entropy.
    """
    (by_logprob, by_entropy), (top, log_total, entropy) = weights, known
    if kernels.slopes(logits, top, log_total, place, by_logprob, by_entropy, entropy, temperature):
        return logits
    slope = blocks.room(logits)
    if temperature == 1.0:
        torch.sub(logits, (top + log_total)[:, None], out=slope)
    else:
        torch.sub(logits, top[:, None], out=slope).div_(temperature).sub_(log_total[:, None])
    if by_entropy is None:
        slope.exp_().mul_(-by_logprob[:, None])
    else:
        # d entropy / d logit = -p (log p + entropy), over the temperature.
        probabilities = torch.exp(slope, out=blocks.room(logits, 1))
        slope.clamp_(min=IMPOSSIBLE).add_(entropy[:, None])
        slope.mul_(-by_entropy[:, None]).sub_(by_logprob[:, None]).mul_(probabilities)
    width = logits.shape[1]
    own = by_logprob.where(_inside(place, width), 0.0)
    slope.scatter_add_(1, place.clamp(0, width - 1)[:, None], own[:, None])
    return slope if slope.dtype == logits.dtype else logits.copy_(slope)
