"""The interface behind which responses are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quartet.records import Prompts, Rollout


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample."""

    response_length: int
    """Most tokens of a response, T."""
    temperature: float
    top_p: float
    stop_id: int | None
    """Token that ends a response; None never ends one early."""
    pad_id: int
    """Fills the places after the end; never seen by a model."""
    batch_rows: int
    """Rows decoded at once."""
    seed: int
    """Of the run; with an episode's number it decides the episode's tokens."""


class RolloutEngine(Protocol):
    """Generates responses with the policy as it is now."""

    def generate(self, prompts: Prompts, *, greedy: bool = False) -> Rollout:
        """Sample one response for each prompt (or take the most likely tokens).

        The log-probabilities are those of the sampled tokens under the policy at the settings' temperature, kept as they
        were sampled. Decoding stops as soon as every row has stopped.
        """
        ...
