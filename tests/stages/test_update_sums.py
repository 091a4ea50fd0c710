"""The metrics of an update of which a minibatch took no step."""

from __future__ import annotations

import math

import pytest
import torch

from quartet.distributed import SingleProcess
from quartet.stages.update_sums import UpdateSums, update_stats


def minibatch(number: float, log_ratio: list[float], norm: float) -> UpdateSums:
    """Sums over as many tokens as there are ratios; every other sum is `number` a token."""
    sums, ratios = UpdateSums(), torch.tensor([log_ratio])
    mask = torch.ones_like(ratios, dtype=torch.bool)
    counts = {name: mask.float() for name in ("tokens", "value_tokens", "entropy_tokens")}
    names = ("policy_loss", "policy_clipped", "entropy", "value_loss", "value_clipped", "kl")
    sums.add(**counts, **{name: torch.full_like(ratios, number) for name in names})
    sums.see(ratios, mask)
    sums.norms.append(torch.tensor(norm))
    return sums


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, 9.0])
def test_a_step_that_was_not_taken_counts_in_no_metric(spoiled: float) -> None:
    sums, good, bad = UpdateSums(), torch.tensor(False), torch.tensor(True)
    sums.merge(minibatch(0.5, [0.1, -0.3], 2.0), good)
    sums.merge(minibatch(spoiled, [spoiled, 5.0, 1.0], spoiled), bad)
    sums.merge(minibatch(1.5, [0.2, 0.4], 5.0), good)
    stats = update_stats(SingleProcess(), sums, steps=3, skipped=1, in_a_row=0)
    means = ("policy/loss", "policy/clip_fraction", "policy/entropy", "value/loss", "value/clip_fraction", "kl/update")
    expected: dict[str, float] = dict.fromkeys(means, 1.0) | {
        "ratio/max_log": 0.4,
        "gradient/norm": 3.5,
        "gradient/skipped_steps": 1,
        # Before any step: (0.1 + 0.3) / 2 of the first minibatch.
        "rollout/logprob_gap": 0.2,
    }
    assert stats.metrics == pytest.approx(expected, rel=1e-6)
    assert (stats.optimizer_steps, stats.tokens) == (2, 4)


def test_the_gap_is_that_of_the_first_minibatch_though_it_took_no_step() -> None:
    """Its ratios are there before the step, which may be bad for another reason."""
    sums = UpdateSums()
    sums.merge(minibatch(math.nan, [0.5, -1.5], 2.0), torch.tensor(True))
    sums.merge(minibatch(1.0, [0.1, 0.1], 4.0), torch.tensor(False))
    metrics = update_stats(SingleProcess(), sums, steps=2, skipped=1, in_a_row=0).metrics
    assert metrics["rollout/logprob_gap"] == pytest.approx(1.0)
    assert (metrics["ratio/max_log"], metrics["gradient/norm"]) == pytest.approx((0.1, 4.0))
