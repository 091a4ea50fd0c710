"""Drawing tokens: the distribution, its edges, and the streams of random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from quartet.rollout.sampling import episode_uniforms, sample

PROBABILITIES = torch.tensor([0.05, 0.3, 0.0, 0.15, 0.4, 0.1])
LOGITS = PROBABILITIES.log()
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
"""Evenly spread numbers: each token is drawn as often as its probability says, give or take one."""


def draw(uniform: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return sample(LOGITS.expand(len(uniform), -1), uniform, temperature=temperature, top_p=top_p)


def frequencies(tokens: torch.Tensor) -> torch.Tensor:
    return torch.bincount(tokens, minlength=6).double() / len(tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_frequencies_on_a_grid(temperature: float) -> None:
    expected = PROBABILITIES.double() ** (1.0 / temperature)
    expected /= expected.sum()
    tokens, logprobs = draw(GRID, temperature=temperature)
    assert (frequencies(tokens) - expected).abs().max() < 2.0 / 20_000
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=1e-6, atol=1e-6)


def test_frequencies_of_the_random_stream() -> None:
    """Chi-square over 20,000 episodes at a fixed seed; 5 kept tokens, so 4 degrees of freedom: 18.5 is p = 0.001."""
    uniform = episode_uniforms(7, tuple(range(20_000)), 2)
    for column in uniform.T:
        counts = frequencies(draw(column)[0]) * 20_000
        kept = PROBABILITIES > 0
        expected = PROBABILITIES[kept].double() * 20_000
        assert ((counts[kept] - expected).square() / expected).sum() < 18.5
        assert counts[~kept].sum() == 0


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((1, 9), -math.inf)
    logits[0, 3], logits[0, 5] = 0.0, -1.0
    edges = [0.0, 1e-300, 0.5, 1 - 2.0**-24, 1 - 2.0**-53]
    for top_p in (1.0, 0.9, 0.1):
        uniform = torch.tensor(edges, dtype=torch.float64)
        tokens, logprobs = sample(logits.expand(len(edges), -1), uniform, temperature=1.0, top_p=top_p)
        assert set(tokens.tolist()) <= {3, 5}
        assert logprobs.isfinite().all()


def test_the_last_token_of_a_large_vocabulary_is_within_it() -> None:
    """Rounding of a long float32 sum must not point past the end."""
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    tokens, _ = sample(logits, uniform, temperature=1.0, top_p=1.0)
    assert int(tokens.max()) < 50_000


def test_log_probabilities_over_a_large_vocabulary_are_exact() -> None:
    """In float32, though the sum inside softmax is off there."""
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(4, 256_000, generator=draw)
    tokens, logprobs = sample(logits, torch.rand(4, generator=draw, dtype=torch.float64), temperature=1.0, top_p=1.0)
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [4]), (0.41, [1, 4]), (0.69, [1, 4]), (0.72, [1, 3, 4]), (0.9, [1, 3, 4, 5]), (1.0, [0, 1, 3, 4, 5])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    tokens, logprobs = draw(GRID, top_p=top_p)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[kept] = PROBABILITIES[kept].double()
    assert (frequencies(tokens) - expected / expected.sum()).abs().max() < 2.0 / 20_000
    # The policy's own log-probability, not that of the truncated distribution.
    torch.testing.assert_close(logprobs, LOGITS[tokens], rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_are_computed_on_in_float32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, high = (sample(x, uniform, temperature=0.7, top_p=1.0) for x in (logits, logits.float()))
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])
    assert low[1].dtype == torch.float32


def test_streams_belong_to_episodes() -> None:
    whole = episode_uniforms(3, (10, 11, 12, 13), 5)
    assert torch.equal(whole[1:3], episode_uniforms(3, (11, 12), 5))
    assert torch.equal(whole[:, :3], episode_uniforms(3, (10, 11, 12, 13), 3))
    assert (whole >= 0).all()
    assert (whole < 1).all()
    seen = torch.cat([whole, episode_uniforms(4, (10, 11, 12, 13), 5), episode_uniforms(3, (-1, -2), 5)])
    assert len(seen.flatten().unique()) == seen.numel()


def test_neighbouring_seeds_and_episodes_are_unrelated() -> None:
    first = torch.stack([episode_uniforms(seed, tuple(range(500)), 1).flatten() for seed in range(3)])
    assert abs(torch.corrcoef(first)[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([first[0, 1:], first[0, :-1]]))[0, 1]) < 0.15
    assert abs(first.mean() - 0.5) < 0.03


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_nan_gives_a_token_of_the_vocabulary(top_p: float) -> None:
    """And NaN as its log-probability, which scoring refuses; an index past the end would be an error of the device."""
    logits = torch.stack([LOGITS, torch.full((6,), math.nan)])
    tokens, logprobs = sample(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), temperature=1.0, top_p=top_p)
    assert 0 <= int(tokens[1]) < 6
    assert logprobs.isfinite().tolist() == [True, False]
