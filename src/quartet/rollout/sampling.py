"""Drawing tokens: in float32, keyed by episode, so that neither batching nor ranks change what is sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def episode_uniforms(seed: int, episodes: tuple[int, ...], length: int) -> Tensor:
    """Uniform numbers that decide each episode's tokens.

    The stream of an episode depends on the run's seed and the episode's running number only.

    Returns:
        float64 `[B, length]` in [0, 1), on the CPU.
    """
    rows = []
    for episode in episodes:
        generator = torch.Generator().manual_seed(_mix(seed, episode))
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


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
    normaliser = scaled.logsumexp(-1, keepdim=True)
    if top_p < 1.0:
        tokens = _inverse_top_p((scaled - normaliser).exp_(), uniform, top_p)
    else:
        tokens = _inverse((scaled - normaliser).exp_().cumsum_(-1), uniform)
    logprobs = (scaled.gather(-1, tokens[:, None]) - normaliser).squeeze(-1)
    return tokens, logprobs


def _inverse(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative probability exceeds u times the total, so that p = 0 is never drawn."""
    target = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    # A product rounded up to the total itself would point past the last token that has a probability.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
    # NaN compares as larger than all: without the clamp it would point past the vocabulary.
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1).squeeze(-1)


def _inverse_top_p(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    choice = _inverse(kept.cumsum(-1), uniform)
    return index.gather(-1, choice[:, None]).squeeze(-1)


def _mix(seed: int, episode: int) -> int:
    """One 63-bit seed from two numbers (SplitMix64's finaliser), so that neighbours are unrelated."""
    state = (seed * 0x9E3779B97F4A7C15 + episode + 1) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 31)) >> 1
