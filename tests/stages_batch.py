"""A batch of ragged episodes for the update, and comparing gradients."""

from __future__ import annotations

import dataclasses

import torch

from checkpoints import VOCABULARY
from pipeline import Pipeline, rollout_of
from quartet.records import Advantaged
from quartet.stages.batching import SequenceTable

LENGTHS = [(3, 6), (1, 2), (9, 1), (4, 5), (2, 6), (7, 3), (5, 4), (3, 1)]
"""Prompt and response tokens of each episode: ragged on purpose."""


def batch_of(pipeline: Pipeline, *, placement: str = "stop") -> Advantaged:
    """Eight episodes with drawn tokens, old log-probabilities near the policy's, and drawn advantages and returns."""
    draw = torch.Generator().manual_seed(11)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=draw).tolist()

    rollout = rollout_of([tokens(p) for p, _ in LENGTHS], [tokens(r) for _, r in LENGTHS])
    mask = rollout.response_mask
    table = SequenceTable.of(rollout)
    sequences = table.rows(list(range(len(mask))))[1]
    temperature = pipeline.config.rollout.temperature
    with torch.no_grad():
        logprobs = pipeline.roles.policy(sequences, mask, temperature=temperature)[0]
        logprobs = (logprobs + 0.15 * torch.randn(mask.shape, generator=draw)).where(mask, 0.0)
    scored = pipeline.score(dataclasses.replace(rollout, logprobs=logprobs))
    advantages, returns = (torch.randn(mask.shape, generator=draw) for _ in range(2))
    rewards = torch.zeros(mask.shape)
    return Advantaged(scored, rewards, advantages.where(mask, 0.0), returns.where(scored.value_mask, 0.0), {})


def assert_same(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-4 of the largest entry of each tensor."""
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (seen[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 1e-7, name
