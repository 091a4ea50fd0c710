"""Log-probabilities of a rollout as training computes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quartet.models.as_in_training import as_in_training
from quartet.models.roles import Roles
from quartet.records import Rollout
from quartet.stages.batching import SequenceTable, microbatches


@torch.no_grad()
def corrected(rollout: Rollout, roles: Roles, *, temperature: float, rows: int) -> tuple[Rollout, Tensor]:
    """Put the policy's own log-probabilities in place of those that were kept while sampling.

    The ratio of the update is then exactly 1 before its first step, whatever precision or engine sampled the responses.

    Args:
        temperature: that of the rollout.
        rows: sequences computed at once.

    Returns:
        The rollout, and `[2]`: the sum of |log-probability at sampling - in training| in nats, and the number of tokens.
    """
    mask, table = rollout.response_mask, SequenceTable.of(rollout)
    exact = torch.zeros_like(rollout.logprobs)
    roles.use("policy")
    for chosen, plain in microbatches(table, range(len(mask)), rows):
        with as_in_training():
            exact[chosen] = roles.policy(plain, mask[chosen], temperature=temperature)[0]
    gap = torch.stack([(exact - rollout.logprobs).abs().where(mask, 0.0).sum(), mask.sum()])
    return replace(rollout, logprobs=exact), gap
