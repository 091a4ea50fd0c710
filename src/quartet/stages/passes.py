"""The passes of the update over a microbatch: what they compute, and the losses that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quartet.config import PPOConfig
from quartet.ops.losses import approx_kl, clipped_policy_loss, clipped_value_loss, policy_clipped, value_clipped
from quartet.records import Advantaged, Sequences
from quartet.stages.update_sums import UpdateSums

ALL = "all"


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass and the losses that come of it."""

    losses: Callable[[Tensor, Sequences, UpdateSums], Tensor]
    """From row numbers and their sequences to the losses `[n]` of these rows; adds to the sums."""
    trunk: str | None
    """The frozen layers whose states it starts from: by the name of their backbone, none, or all."""


class Losses:
    """The losses of policy and value, as a trained pair computes them."""

    def __init__(self, trained: nn.Module, ppo: PPOConfig, *, temperature: float, one_module: bool) -> None:
        """
        Args:
            trained: called as a `TrainedPair` is.
            one_module: policy and value are called together, as the process engine has them.
        """
        self._trained: Any = trained
        self._ppo = ppo
        self._temperature = temperature
        self._together = one_module or self._trained.one_pass

    def passes(
        self, batch: Advantaged, policy_tokens: Tensor, value_tokens: Tensor, *, with_entropy: bool
    ) -> list[Pass]:
        """What gives the losses of a microbatch's rows, to be added up: the policy's, then the value's.

        One comes after the other, so that the activations of one model are in memory and not of two, or they run at the same
        time. Where both look at the same states, or are one module of the process engine, there is one pass for both.

        Args:
            policy_tokens, value_tokens: of the minibatch, in all processes.
        """
        trained = self._trained
        rollout_mask, all_value_mask = batch.scored.rollout.response_mask, batch.scored.value_mask
        wanted = {
            "temperature": self._temperature,
            "with_entropy": with_entropy,
            "entropy_grad": self._ppo.entropy_coef > 0,
        }

        def both(part: Tensor, sequences: Sequences, sums: UpdateSums) -> Tensor:
            logprobs, entropy, values = trained(sequences, rollout_mask[part], all_value_mask[part], **wanted)
            policy = self._policy_loss(batch, part, logprobs, entropy, sums) / policy_tokens
            return policy + self._value_loss(batch, part, values, sums) / value_tokens

        def of_policy(part: Tensor, sequences: Sequences, sums: UpdateSums) -> Tensor:
            logprobs, entropy = trained.policy(sequences, rollout_mask[part], **wanted)
            return self._policy_loss(batch, part, logprobs, entropy, sums) / policy_tokens

        def of_value(part: Tensor, sequences: Sequences, sums: UpdateSums) -> Tensor:
            values = trained.value(sequences, all_value_mask[part])
            return self._value_loss(batch, part, values, sums) / value_tokens

        if self._together:
            return [Pass(both, ALL)]
        return [Pass(of_policy, trained.policy.backbone.trunk), Pass(of_value, trained.value.backbone.trunk)]

    def _policy_loss(
        self, batch: Advantaged, part: Tensor, logprobs: Tensor, entropy: Tensor | None, sums: UpdateSums
    ) -> Tensor:
        """Clipped loss less the entropy bonus, summed over the tokens of each row: `[n]`."""
        ppo, rollout = self._ppo, batch.scored.rollout
        mask, old, advantages = rollout.response_mask[part], rollout.logprobs[part], batch.advantages[part]
        high = ppo.clip if ppo.clip_high is None else ppo.clip_high
        loss = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=ppo.clip, clip_high=high)
        with torch.no_grad():
            sums.see((logprobs - old).where(mask, 0.0), mask)
            sums.add(
                tokens=mask,
                policy_loss=loss,
                kl=approx_kl(logprobs, old, mask),
                policy_clipped=policy_clipped(logprobs, old, advantages, mask, clip_low=ppo.clip, clip_high=high),
            )
            if entropy is not None:
                sums.add(entropy=entropy, entropy_tokens=mask)
        if ppo.entropy_coef and entropy is not None:
            loss = loss - ppo.entropy_coef * entropy
        return loss.sum(-1)

    def _value_loss(self, batch: Advantaged, part: Tensor, values: Tensor, sums: UpdateSums) -> Tensor:
        """Clipped loss times its weight, summed over the tokens of each row: `[n]`."""
        ppo, scored = self._ppo, batch.scored
        mask, old, returns = scored.value_mask[part], scored.values[part], batch.returns[part]
        loss = clipped_value_loss(values, old, returns, mask, clip=ppo.value_clip)
        with torch.no_grad():
            clipped = value_clipped(values, old, returns, mask, clip=ppo.value_clip)
            sums.add(value_tokens=mask, value_loss=loss, value_clipped=clipped)
        return ppo.value_coef * loss.sum(-1)
