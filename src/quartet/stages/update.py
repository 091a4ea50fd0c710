"""Stage 4: clipped policy and value losses over epochs, minibatches and microbatches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quartet.config import PPOConfig
from quartet.distributed import ProcessEngine
from quartet.errors import TrainingError
from quartet.models.roles import TrainedPair
from quartet.ops.losses import approx_kl, clipped_policy_loss, clipped_value_loss, policy_clipped, value_clipped
from quartet.records import Advantaged, Sequences, UpdateStats
from quartet.stages.batching import SequenceTable, microbatches
from quartet.stages.trunks import with_trunks


@dataclass
class _Sums:
    """Sums over response tokens, kept on the device until the update is over."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    max_log_ratio: Tensor | None = None
    norms: list[Tensor] = field(default_factory=list)
    gap: Tensor | None = None
    """[sum of |new - old| log-probability, tokens] of the first minibatch, before any step moved the weights."""

    def add(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            total = tensor.detach().sum()
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def see(self, log_ratio: Tensor, mask: Tensor) -> None:
        if not self.norms:
            gap = torch.stack([log_ratio.abs().sum(), mask.sum()]).detach()
            self.gap = gap if self.gap is None else self.gap + gap
        largest = log_ratio.detach().abs().max()
        self.max_log_ratio = largest if self.max_log_ratio is None else torch.maximum(self.max_log_ratio, largest)


class Updater:
    """Runs the update stage.

    The losses of a minibatch are divided by its number of response tokens (all processes together), so the gradient does
    not depend on `microbatch_rows`. There is one optimizer step for each minibatch.
    """

    def __init__(
        self,
        trained: TrainedPair,
        optimizer: torch.optim.Optimizer,
        engine: ProcessEngine,
        ppo: PPOConfig,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self._trained = trained
        self._optimizer = optimizer
        self._engine = engine
        self._ppo = ppo
        self._temperature = temperature
        self._seed = seed
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def update(self, batch: Advantaged, *, iteration: int) -> UpdateStats:
        """`epochs` passes over the batch.

        Raises:
            TrainingError: a loss or gradient that is not finite, before the optimizer step; the weights are as they were
                after the last good step.
        """
        ppo, table = self._ppo, SequenceTable.of(batch.scored.rollout)
        lengths, sums, steps = table.lengths(), _Sums(), 0
        count = len(lengths) // ppo.minibatches
        for epoch in range(ppo.epochs):
            order = self._permutation(len(lengths), iteration, epoch)
            for start in range(0, len(order), count):
                self._minibatch(batch, table, lengths, order[start : start + count], sums)
                steps += 1
        return _stats(self._engine, sums, steps)

    def _permutation(self, count: int, iteration: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + iteration) * 1_009 + epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _minibatch(
        self, batch: Advantaged, table: SequenceTable, lengths: list[int], rows: list[int], sums: _Sums
    ) -> None:
        scored, ppo = batch.scored, self._ppo
        device = table.input_ids.device
        chosen = torch.tensor(rows, device=device)
        counts = torch.stack([scored.rollout.response_mask[chosen].sum(), scored.value_mask[chosen].sum()])
        policy_tokens, value_tokens = self._engine.sum(counts)
        losses: list[tuple[Tensor, Tensor]] = []
        self._optimizer.zero_grad(set_to_none=True)
        for part, plain in microbatches(table, lengths, rows, ppo.microbatch_rows):
            sequences = with_trunks(plain, scored.trunks, part)
            policy, value, bonus = self._losses(batch, part, sequences, sums)
            row_loss = policy.sum(-1) / policy_tokens + ppo.value_coef * value.sum(-1) / value_tokens
            if ppo.entropy_coef and bonus is not None:
                row_loss = row_loss - ppo.entropy_coef * bonus.sum(-1) / policy_tokens
            self._engine.backward(row_loss.sum())
            losses.append((part, row_loss.detach()))
        norm = self._engine.clip_gradients(self._parameters, ppo.max_grad_norm)
        if not bool(norm.isfinite()):
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(_culprit(batch, losses))
        self._optimizer.step()
        sums.norms.append(norm.detach())

    def _losses(
        self, batch: Advantaged, part: Tensor, sequences: Sequences, sums: _Sums
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Per-token policy loss, value loss and entropy of a microbatch, each `[n, T]`."""
        ppo, scored = self._ppo, batch.scored
        mask, value_mask = scored.rollout.response_mask[part], scored.value_mask[part]
        old_logprobs, old_values = scored.rollout.logprobs[part], scored.values[part]
        logprobs, entropy, values = self._trained(
            sequences,
            mask,
            value_mask,
            temperature=self._temperature,
            with_entropy=True,
            entropy_grad=ppo.entropy_coef > 0,
        )
        high = ppo.clip if ppo.clip_high is None else ppo.clip_high
        policy = clipped_policy_loss(
            logprobs, old_logprobs, batch.advantages[part], mask, clip_low=ppo.clip, clip_high=high
        )
        value = clipped_value_loss(values, old_values, batch.returns[part], value_mask, clip=ppo.value_clip)
        with torch.no_grad():
            sums.see((logprobs - old_logprobs).where(mask, 0.0), mask)
            sums.add(
                tokens=mask,
                value_tokens=value_mask,
                policy_loss=policy,
                value_loss=value,
                kl=approx_kl(logprobs, old_logprobs, mask),
                policy_clipped=policy_clipped(
                    logprobs, old_logprobs, batch.advantages[part], mask, clip_low=ppo.clip, clip_high=high
                ),
                value_clipped=value_clipped(values, old_values, batch.returns[part], value_mask, clip=ppo.value_clip),
                entropy=entropy if entropy is not None else torch.zeros_like(logprobs),
            )
        return policy, value, entropy


def _stats(engine: ProcessEngine, sums: _Sums, steps: int) -> UpdateStats:
    names = list(sums.totals)
    reduced = engine.sum(torch.stack([sums.totals[name].double() for name in names])).tolist()
    total = dict(zip(names, reduced, strict=True))
    tokens, value_tokens = total["tokens"], total["value_tokens"]
    metrics = {
        "policy/loss": total["policy_loss"] / tokens,
        "policy/clip_fraction": total["policy_clipped"] / tokens,
        "policy/entropy": total["entropy"] / tokens,
        "value/loss": total["value_loss"] / value_tokens,
        "value/clip_fraction": total["value_clipped"] / value_tokens,
        "kl/update": total["kl"] / tokens,
        "ratio/max_log": 0.0 if sums.max_log_ratio is None else sums.max_log_ratio.item(),
        "gradient/norm": torch.stack(sums.norms).mean().item(),
        "rollout/logprob_gap": _gap(engine, sums),
    }
    return UpdateStats(metrics, steps, int(tokens))


def _gap(engine: ProcessEngine, sums: _Sums) -> float:
    """Mean |log-probability at sampling - in training| over the first minibatch's tokens, nats; rounding alone, ideally."""
    assert sums.gap is not None
    total, tokens = engine.sum(sums.gap).tolist()
    return float(total / tokens)


def _culprit(batch: Advantaged, losses: list[tuple[Tensor, Tensor]]) -> str:
    prompts = batch.scored.rollout.prompts
    for part, row_loss in losses:
        bad = (~row_loss.isfinite()).nonzero().flatten().tolist()
        if bad:
            row = int(part[bad[0]])
            return (
                f"the loss of episode {prompts.episodes[row]} is {row_loss[bad[0]].item()} "
                f"(prompt {prompts.texts[row][:80]!r}); the step was not taken, lower ppo.learning_rate or use "
                "models.dtype=float32"
            )
    return (
        "the gradient is not finite although every loss is; the step was not taken, lower ppo.learning_rate or use "
        "models.dtype=float32"
    )
