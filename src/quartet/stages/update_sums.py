"""What an update adds up on the device, and the metrics that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quartet.distributed import ProcessEngine
from quartet.records import UpdateStats


@dataclass
class UpdateSums:
    """Sums over response tokens, kept on the device until the update is over."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    max_log_ratio: Tensor | None = None
    norms: list[Tensor] = field(default_factory=list)
    gap: Tensor | None = None
    """[sum of |new - old| log-probability, tokens] of the first minibatch, before any step moved the weights."""

    def add(self, **tensors: Tensor) -> None:
        """Add the sum of each tensor to the total of its name."""
        for name, tensor in tensors.items():
            total = tensor.detach().sum()
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def see(self, log_ratio: Tensor, mask: Tensor) -> None:
        """Take in log-probability ratios `[n, T]`, zero outside the mask."""
        gap = torch.stack([log_ratio.abs().sum(), mask.sum()]).detach()
        self.gap = gap if self.gap is None else self.gap + gap
        largest = log_ratio.detach().abs().max()
        self.max_log_ratio = largest if self.max_log_ratio is None else torch.maximum(self.max_log_ratio, largest)

    def join(self, other: UpdateSums) -> None:
        """Take over the sums of another pass over the same minibatch, of which none has the same name."""
        assert not self.totals.keys() & other.totals.keys(), "one sum in two passes"
        assert other.max_log_ratio is None, "log-probability ratios in two passes"
        self.totals |= other.totals

    def merge(self, minibatch: UpdateSums, bad: Tensor) -> None:
        """Add a minibatch's sums, unless its step was not taken: then they may not be finite."""
        self.gap = minibatch.gap if self.gap is None else self.gap
        self.add(**{name: total.where(~bad, 0.0) for name, total in minibatch.totals.items()})
        assert minibatch.max_log_ratio is not None
        largest = minibatch.max_log_ratio.where(~bad, 0.0)
        self.max_log_ratio = largest if self.max_log_ratio is None else torch.maximum(self.max_log_ratio, largest)
        self.norms += [norm.where(~bad, 0.0) for norm in minibatch.norms]


def update_stats(engine: ProcessEngine, sums: UpdateSums, steps: int, skipped: int, in_a_row: int) -> UpdateStats:
    """Means over the response tokens of all processes; every process calls this.

    Args:
        steps: minibatches of the update.
        skipped: how many of them took no step.
        in_a_row: how many took none in a row up to now.
    """
    names = list(sums.totals)
    reduced = engine.sum(torch.stack([sums.totals[name].double() for name in names])).tolist()
    total = dict(zip(names, reduced, strict=True))
    taken = steps - skipped
    # Where no step was taken there is nothing to take the mean of.
    tokens, value_tokens = (total[name] if taken else math.nan for name in ("tokens", "value_tokens"))
    metrics = {
        "policy/loss": total["policy_loss"] / tokens,
        "policy/clip_fraction": total["policy_clipped"] / tokens,
        "policy/entropy": total["entropy"] / total["entropy_tokens"] if total["entropy_tokens"] else math.nan,
        "value/loss": total["value_loss"] / value_tokens,
        "value/clip_fraction": total["value_clipped"] / value_tokens,
        "kl/update": total["kl"] / tokens,
        "ratio/max_log": 0.0 if sums.max_log_ratio is None else engine.maximum(sums.max_log_ratio).item(),
        "gradient/norm": torch.stack(sums.norms).sum().item() / taken if taken else math.nan,
        "gradient/skipped_steps": skipped,
        "rollout/logprob_gap": _gap(engine, sums),
    }
    return UpdateStats(metrics, taken, int(total["tokens"]), in_a_row)


def _gap(engine: ProcessEngine, sums: UpdateSums) -> float:
    """Mean |log-probability at sampling - in training| over the first minibatch's tokens, nats; rounding alone, ideally."""
    assert sums.gap is not None
    total, tokens = engine.sum(sums.gap).tolist()
    return float(total / tokens)
