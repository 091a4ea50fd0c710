"""Log-probabilities and entropy of tokens, with logits held for one chunk of tokens at a time.

The logits `[tokens, vocabulary]` are the largest tensor of PPO. `chunked_logprobs` makes them chunk by chunk, reuses
the memory of one chunk for the next, and leaves nothing of that size for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`log softmax(logits / temperature)` at the given tokens.

    Args:
        logits: `[N, V]`.
        tokens: int64 `[N]`.
        temperature: divisor of the logits, above 0.

    Returns:
        `[N]`, nats, float32 or float64.
    """
    log_softmax = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    return log_softmax.gather(-1, tokens[:, None]).squeeze(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of `softmax(logits / temperature)`; a logit of -inf adds nothing.

    Args:
        logits: `[N, V]`.
        temperature: divisor of the logits, above 0.

    Returns:
        `[N]`, nats, float32 or float64.
    """
    log_softmax = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    finite = log_softmax.clamp(min=torch.finfo(log_softmax.dtype).min)
    return -(log_softmax.exp() * finite).sum(-1)


def chunked_logprobs(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
    head_trainable: bool,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` and `entropy` of `head(hidden)`, never holding the logits of more than one chunk.

    How gradients come about depends on what needs them. Nothing: a plain loop. Only `hidden`, and only through the
    log-probabilities: each row's log-probability depends on that row of `hidden` alone, so the forward pass takes its
    derivative at once and keeps that, `[N, H]`, instead of logits; two matrix products of the head in all. Otherwise
    (`head_trainable`, or `entropy_grad`): each chunk is recomputed in the backward pass, one matrix product more.

    Args:
        hidden: `[N, H]`, last hidden states; float.
        head: maps `[n, H]` to logits `[n, V]`, each row by itself. Autocast applies to it as outside.
        tokens: int64 `[N]`.
        temperature: divisor of the logits, above 0.
        chunk_tokens: most rows of logits at once; changes memory and speed, not the numbers.
        with_entropy: compute the entropy too.
        head_trainable: the head has parameters that need gradients.
        entropy_grad: the entropy needs gradients.

    Returns:
        (log-probabilities `[N]`, entropy `[N]` or None), nats, float32 or float64. The entropy carries a gradient only
        with `entropy_grad`.
    """
    assert hidden.ndim == 2, f"hidden {tuple(hidden.shape)}, not [tokens, features]"
    assert tokens.shape == hidden.shape[:1], f"tokens {tuple(tokens.shape)}, hidden {tuple(hidden.shape)}"
    assert chunk_tokens >= 1, f"chunk_tokens={chunk_tokens}"
    if not (torch.is_grad_enabled() and (hidden.requires_grad or head_trainable)):
        logprobs, entropies = _without_gradient(hidden, head, tokens, temperature, chunk_tokens, with_entropy)
    elif head_trainable or (with_entropy and entropy_grad):
        logprobs, entropies = _recomputing(hidden, head, tokens, temperature, chunk_tokens, with_entropy)
    else:
        apply: Callable[..., tuple[Tensor, Tensor]] = _FrozenHead.apply
        logprobs, entropies = apply(hidden, tokens, head, temperature, chunk_tokens, with_entropy)
    if not with_entropy:
        return logprobs, None
    return logprobs, entropies if entropy_grad else entropies.detach()


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


class _Workspace:
    """Two `[chunk, V]` tensors that every chunk uses again.

    Fresh memory of this size comes from the system page by page, which takes longer than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._shifted: Tensor | None = None
        self._probabilities: Tensor | None = None

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of the shape of `logits`, float32 at least, holding anything; the first call has the most rows."""
        if self._shifted is None or self._probabilities is None:
            self._shifted = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
            self._probabilities = torch.empty_like(self._shifted)
        return self._shifted[: len(logits)], self._probabilities[: len(logits)]


@torch.no_grad()
def _softmax_at(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, workspace: _Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities `[n]`, entropy `[n]` or `[0]`, probabilities `[n, V]` within the workspace).

    One pass of exponentials serves all three: the largest logit, shifted to 0, has probability `1 / Z`, so that
    `log Z` is read off the probabilities.
    """
    shifted, probabilities = workspace.of(logits)
    top = logits.amax(-1, keepdim=True).to(shifted.dtype)
    torch.sub(logits, top, out=shifted)
    if temperature != 1.0:
        shifted.div_(temperature)
    torch.softmax(shifted, -1, out=probabilities)
    log_normaliser = -probabilities.amax(-1).log()
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(-1) - log_normaliser
    if not with_entropy:
        return logprobs, logprobs.new_empty(0), probabilities
    # A logit of -inf has probability 0, and 0 times -inf would be NaN.
    weighted = shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(probabilities)
    return logprobs, log_normaliser - weighted.sum(-1), probabilities


def _chunks(hidden: Tensor, tokens: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for start in range(0, len(tokens), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(tokens)))
        yield rows, hidden[rows], tokens[rows]


def _results(hidden: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    return logprobs, torch.empty(len(hidden) if with_entropy else 0, dtype=dtype, device=hidden.device)


@torch.no_grad()
def _without_gradient(
    hidden: Tensor, head: Head, tokens: Tensor, temperature: float, chunk_tokens: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    logprobs, entropies = _results(hidden, with_entropy)
    workspace = _Workspace()
    for rows, states, chosen in _chunks(hidden, tokens, chunk_tokens):
        logprobs[rows], entropies[rows], _ = _softmax_at(head(states), chosen, temperature, with_entropy, workspace)
    return logprobs, entropies


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities whose derivative by the hidden states is taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, head: Head, temperature: float, chunk_tokens: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = _results(hidden, with_entropy)
        jacobian = torch.empty_like(hidden)
        workspace = _Workspace()
        for rows, states, chosen in _chunks(hidden, tokens, chunk_tokens):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                logits = head(states)
            assert rows.start > 0 or not _reaches_another_leaf(logits, states), (
                "the head has parameters that need gradients: head_trainable must be True"
            )
            logprobs[rows], entropies[rows], probabilities = _softmax_at(
                logits.detach(), chosen, temperature, with_entropy, workspace
            )
            # d logprob / d logits = (one-hot - softmax) / temperature.
            slope = probabilities.neg_().scatter_add_(
                1, chosen[:, None], torch.ones_like(chosen[:, None], dtype=probabilities.dtype)
            )
            if temperature != 1.0:
                slope.div_(temperature)
            (jacobian[rows],) = torch.autograd.grad(logits, states, slope.to(logits.dtype))
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return (grad_logprobs[:, None] * jacobian).to(jacobian.dtype), None, None, None, None, None


def _reaches_another_leaf(output: Tensor, leaf: Tensor) -> bool:
    """Whether gradients of `output` would flow to any leaf of its graph besides `leaf`."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            return True
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def _recomputing(
    hidden: Tensor, head: Head, tokens: Tensor, temperature: float, chunk_tokens: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    apply: Callable[..., tuple[Tensor, Tensor]] = _SoftmaxAt.apply

    def of_chunk(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return apply(head(states), chosen, temperature, with_entropy)

    # An empty batch still runs one (empty) chunk, so that its result is part of the graph.
    parts = [
        checkpoint(of_chunk, states, chosen, use_reentrant=False, preserve_rng_state=False)
        for states, chosen in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])


class _SoftmaxAt(torch.autograd.Function):
    """`_softmax_at` with its gradient by the logits in closed form, from the probabilities alone."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, probabilities = _softmax_at(logits, tokens, temperature, with_entropy, _Workspace())
        ctx.save_for_backward(probabilities, tokens, entropies)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        probabilities, tokens, entropies = ctx.saved_tensors
        by_logprob = torch.zeros_like(probabilities[:, 0]) if grad_logprobs is None else grad_logprobs / ctx.temperature
        slope = probabilities * -by_logprob[:, None]
        slope.scatter_add_(1, tokens[:, None], by_logprob[:, None])
        if grad_entropies is not None and len(entropies):
            # d entropy / d logit = -p * (log p + entropy) / temperature.
            information = torch.xlogy(probabilities, probabilities).addcmul_(probabilities, entropies[:, None])
            slope.addcmul_(information, -grad_entropies[:, None] / ctx.temperature)
        return slope.to(ctx.dtype), None, None, None
