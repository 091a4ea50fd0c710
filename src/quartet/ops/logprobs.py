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

from quartet.ops.chunk_softmax import Workspace, logprobs_of_chunk, softmax_of_chunk, to_entropy_slope, to_logprob_slope

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

    How gradients come about depends on what needs them. Nothing: a plain loop. Only `hidden` (a frozen head): the
    result of a row depends on that row of `hidden` alone, so the forward pass takes its derivative at once and keeps
    that, `[N, H]`, instead of logits; two matrix products of the head in all, one more with `entropy_grad`. A trainable
    head: each chunk is recomputed in the backward pass, four matrix products in all.

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
    elif head_trainable:
        logprobs, entropies = _recomputing(hidden, head, tokens, temperature, chunk_tokens, with_entropy)
    else:
        apply: Callable[..., tuple[Tensor, Tensor]] = _FrozenHead.apply
        entropy_slope = with_entropy and entropy_grad
        logprobs, entropies = apply(hidden, tokens, head, temperature, chunk_tokens, with_entropy, entropy_slope)
    if not with_entropy:
        return logprobs, None
    return logprobs, entropies if entropy_grad else entropies.detach()


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


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
    workspace = Workspace()
    for rows, states, chosen in _chunks(hidden, tokens, chunk_tokens):
        if not with_entropy:
            logprobs[rows] = logprobs_of_chunk(head(states), chosen, temperature, workspace)
            continue
        softmax = softmax_of_chunk(head(states), chosen, temperature, with_entropy, workspace)
        logprobs[rows], entropies[rows] = softmax.logprobs, softmax.entropies
    return logprobs, entropies


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies whose derivatives by the hidden states are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tokens: Tensor,
        head: Head,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = _results(hidden, with_entropy)
        by_logprob = torch.empty_like(hidden)
        by_entropy = torch.empty_like(hidden) if entropy_grad else hidden.new_empty(0)
        workspace = Workspace()
        for rows, states, chosen in _chunks(hidden, tokens, chunk_tokens):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                logits = head(states)
            assert rows.start > 0 or not _reaches_another_leaf(logits, states), (
                "the head has parameters that need gradients: head_trainable must be True"
            )
            softmax = softmax_of_chunk(logits.detach(), chosen, temperature, with_entropy, workspace)
            logprobs[rows], entropies[rows] = softmax.logprobs, softmax.entropies
            scale = torch.full_like(softmax.logprobs, 1.0 / temperature)
            if entropy_grad:
                slope = to_entropy_slope(softmax.weighted, softmax.probabilities, scale).to(logits.dtype)
                (by_entropy[rows],) = torch.autograd.grad(logits, states, slope, retain_graph=True)
            slope = to_logprob_slope(softmax.probabilities, chosen, scale).to(logits.dtype)
            (by_logprob[rows],) = torch.autograd.grad(logits, states, slope)
        ctx.save_for_backward(by_logprob, by_entropy)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprob, by_entropy = ctx.saved_tensors
        grad = None if grad_logprobs is None else grad_logprobs[:, None] * by_logprob
        if grad_entropies is not None:
            entropy_part = grad_entropies[:, None] * by_entropy
            grad = entropy_part if grad is None else grad + entropy_part
        return (None if grad is None else grad.to(by_logprob.dtype)), None, None, None, None, None, None


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
    workspace = Workspace()

    def of_chunk(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return apply(head(states), chosen, temperature, with_entropy, workspace)

    # `split` gives one empty chunk for an empty batch, so that its result is part of the graph too.
    parts = [
        checkpoint(of_chunk, states, chosen, use_reentrant=False, preserve_rng_state=False)
        for states, chosen in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True)
    ]
    # The backward pass asks for the memory again; until then the rest of the model needs it.
    workspace.clear()
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])


class _SoftmaxAt(torch.autograd.Function):
    """Log-probabilities and entropies of one chunk of logits, with the gradient in closed form.

    Only for use under `checkpoint`: what is saved lies in the workspace and is overwritten by the next chunk, which is
    right because a chunk is recomputed just before its backward, and is used up there.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, workspace: Workspace
    ) -> tuple[Tensor, Tensor]:
        softmax = softmax_of_chunk(logits, tokens, temperature, with_entropy, workspace)
        ctx.save_for_backward(softmax.probabilities, softmax.weighted, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return softmax.logprobs, softmax.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        probabilities, weighted, tokens = ctx.saved_tensors
        # In this order: the slope of the log-probability is written over the probabilities.
        slope = None
        if grad_entropies is not None and len(grad_entropies):
            slope = to_entropy_slope(weighted, probabilities, grad_entropies / ctx.temperature)
        if grad_logprobs is not None:
            part = to_logprob_slope(probabilities, tokens, grad_logprobs / ctx.temperature)
            slope = part if slope is None else slope.add_(part)
        return (None if slope is None else slope.to(ctx.dtype)), None, None, None, None
