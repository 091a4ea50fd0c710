"""Drawing tokens: in float32, keyed by episode, so that neither batching nor ranks change what is sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet import kernels

_BLOCK = 128
"""Tokens whose probabilities are summed before one is looked for among them."""


def episode_uniforms(seed: int, episodes: tuple[int, ...], length: int) -> Tensor:
    """Uniform numbers that decide each episode's tokens.

    The stream of an episode depends on the run's seed and the episode's running number only.

    Returns:
        float64 `[B, length]` in [0, 1), on the CPU.
    """
    rows = []
    for episode in episodes:
        generator = torch.Generator().manual_seed(episode_seed(seed, episode))
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def pick(logits: Tensor, uniform: Tensor | None, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """`sample`, or where there are no random numbers the most likely tokens, with log-probabilities as there.

    On a CPU a kernel draws from the whole distribution, where there is one: the same tokens, but where rounding decides.
    """
    found = kernels.draw(logits, uniform, temperature) if uniform is None or top_p == 1.0 else None
    if found is not None:
        return found
    if uniform is not None:
        return sample(logits, uniform, temperature=temperature, top_p=top_p)
    scaled = logits.float() / temperature
    tokens = scaled.argmax(-1)
    return tokens, scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: `[n, vocabulary]`, any float dtype; computed on in float32.
        uniform: `[n]` in [0, 1).
        temperature: divides the logits.
        top_p: the smallest set of most likely tokens whose probability reaches top_p is drawn from.

    Returns:
        int64 `[n]` tokens, and float32 `[n]` their log-probabilities under softmax(logits / temperature), *not* under
        the truncated distribution: they are the policy's, which is what training compares with.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    probabilities = scaled.softmax(-1)  # passes over [n, vocabulary] are what sampling costs; few are made
    tokens = _inverse_top_p(probabilities, uniform, top_p) if top_p < 1.0 else _inverse(probabilities, uniform)
    # Over a large vocabulary softmax's own sum is off by 1e-5; this one is pairwise.
    total = probabilities.sum(-1)
    return tokens, (probabilities.gather(-1, tokens[:, None]).squeeze(-1) / total).log()


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index at which the running sum of the weights `[n, m]` exceeds u times their total.

    First the block is found, from the sums of blocks, then the place in it: one pass over the weights instead of a
    running sum over all of them, and less rounding.
    """
    size = weights.shape[-1]
    whole = size // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    upto = sums.cumsum(-1)
    target = uniform.to(upto.dtype)[:, None] * upto[:, -1:]
    block = _first_above(upto, target)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0.0)
    before = (upto - sums).gather(-1, block)
    place = _first_above(inside.cumsum(-1), (target - before).clamp_(min=0.0))
    return (block * _BLOCK + place).clamp_(max=size - 1).squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index `[n, 1]` whose running sum exceeds the target, so that a weight of 0 is never drawn."""
    # A target rounded up to the total itself would point past the last entry that has a weight.
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # Past the end points only a row of NaN, whose log-probability says so.
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _inverse_top_p(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    choice = _inverse(ordered.masked_fill_(before >= top_p, 0.0), uniform)
    return index.gather(-1, choice[:, None]).squeeze(-1)


def episode_seed(seed: int, episode: int) -> int:
    """One 63-bit seed from two numbers (SplitMix64's finaliser), so that neighbours are unrelated."""
    state = (seed * 0x9E3779B97F4A7C15 + episode + 1) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 31)) >> 1
