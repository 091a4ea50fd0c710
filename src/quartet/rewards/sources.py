"""Reward sources beside the reward model: what one is, building them from the configuration, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from quartet.config.schema import RewardSourceConfig
from quartet.errors import RewardError
from quartet.rewards.function import FunctionReward
from quartet.rewards.http import HttpReward


class RewardSource(Protocol):
    """Rates episodes, given as text."""

    name: str
    """What messages call it."""
    weight: float
    """Its factor in the sum."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number per episode, not yet weighted; raises RewardError if there is none."""


def build_sources(entries: Sequence[RewardSourceConfig]) -> list[RewardSource]:
    """The sources of the configuration's `rewards`, in order; raises RewardError for one that cannot be used."""
    return [_build(entry) for entry in entries]


def _build(entry: RewardSourceConfig) -> RewardSource:
    if entry.function is not None:
        return FunctionReward(entry.function, weight=entry.weight, timeout=entry.timeout)
    assert entry.url is not None
    return HttpReward(entry.url, weight=entry.weight, timeout=entry.timeout)


def combine(sources: Sequence[RewardSource], prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Weighted sum over the sources, one float per episode: sum_s weight_s * score_s; zeros without sources.

    Raises RewardError if a source fails or the sum overflows.
    """
    assert len(prompts) == len(responses)
    totals = [0.0] * len(responses)
    for source in sources:
        scores = source.score(prompts, responses)
        totals = [total + source.weight * score for total, score in zip(totals, scores, strict=True)]
        if not all(math.isfinite(total) for total in totals):
            raise RewardError(
                f"{source.name} with weight {source.weight:g} makes the reward overflow; lower the weight"
            )
    return totals
