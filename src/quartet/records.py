"""What the stages hand on: Prompts -> Rollout -> Scored -> Advantaged -> UpdateStats.

Shapes: B episodes, T = `rollout.response_length`. All tensors of one record live on one device. A mask is named for what
True means. Positions outside a mask hold zeros (log-probabilities, values, advantages) or the pad token (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of B episodes, tokenized."""

    episodes: tuple[int, ...]
    """Running number of each episode in the run; sampling is keyed by it."""
    texts: tuple[str, ...]
    """The prompts as text, the chat template applied."""
    tokens: tuple[Tensor, ...]
    """B int64 tensors `[prompt tokens]` on the CPU, without padding."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled responses."""

    prompts: Prompts
    tokens: Tensor
    """int64 `[B, T]`: response tokens, the stop token included, then padding."""
    response_mask: Tensor
    """bool `[B, T]`: True where the policy produced the token."""
    logprobs: Tensor
    """float32 `[B, T]`: log-probability of each token as it was sampled, nats."""
    stopped: Tensor
    """bool `[B]`: True where the response ended at the stop token."""
    decode_steps: int
    """Forward passes of this process's decoder after the prompts, summed over groups of rows."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with what the three other roles say of it."""

    rollout: Rollout
    ref_logprobs: Tensor
    """float32 `[B, T]`: the reference's log-probabilities of the same tokens."""
    values: Tensor
    """float32 `[B, T]`: value before token t was produced; where `value_mask` is True."""
    value_mask: Tensor
    """bool `[B, T]`: the response mask, and with `score_placement: after_stop` one step more where there is room."""
    scores: Tensor
    """float32 `[B]`: weighted sum of reward model and reward sources, penalties not yet in."""
    trunks: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """B tensors `[sequence tokens, H]` after the frozen layers of each trained backbone, kept for the update's epochs."""


@dataclass(frozen=True, slots=True)
class Advantaged:
    """A scored rollout with per-token rewards, advantages and returns."""

    scored: Scored
    rewards: Tensor
    """float32 `[B, T]`: KL penalty per token, plus the score where it lands."""
    advantages: Tensor
    """float32 `[B, T]`."""
    returns: Tensor
    """float32 `[B, T]`: targets of the value model."""
    metrics: dict[str, float]
    """What this stage reports."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one update did."""

    metrics: dict[str, float]
    """Means over the update's tokens; names as in metrics.jsonl."""
    optimizer_steps: int
    """Steps taken."""
    tokens: int
    """Response tokens trained on, epochs counted."""
    bad_steps: int = 0
    """Steps in a row up to the update's end that were not taken, because a loss or the gradient was not finite."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """n prompts with their responses, right-padded to the longest."""

    input_ids: Tensor
    """int64 `[n, L]`."""
    prompt_lengths: Tensor
    """int64 `[n]`, at least 1."""
    response_lengths: Tensor
    """int64 `[n]`."""
    trunks: Mapping[str, Tensor] = field(default_factory=dict)
    """States `[n, L, H]` after the frozen layers, by backbone, where they are known already."""
    prompts: tuple[int, ...] | None = None
    """`prompt_lengths` where the host knows them; a GPU is then not waited for."""
    responses: tuple[int, ...] | None = None
    """`response_lengths`, likewise."""
    rows: tuple[int, ...] | None = None
    """Where the sequences stand in their rollout, likewise."""

    def places(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Row and step of every response token that `mask` `[n, T]`, the response mask, selects: int64 `[k]` each."""
        if self.responses is None:
            row, step = mask.nonzero(as_tuple=True)
            return row, step
        row, step = torch.nonzero_static(mask, size=sum(self.responses)).unbind(1)
        return row, step

    def size(self, *, packed: bool) -> int:
        """Tokens that are computed: without padding where sequences lie side by side and the host knows their lengths."""
        if not packed or self.prompts is None or self.responses is None:
            return self.input_ids.numel()
        return sum(self.prompts) + sum(self.responses)

    def response_tokens(self, row: Tensor, step: Tensor) -> Tensor:
        """Response tokens at the given positions."""
        return self.input_ids[row, self.prompt_lengths[row] + step]
