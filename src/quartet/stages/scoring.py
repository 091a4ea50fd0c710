"""Stage 2: reference log-probabilities, values and scores of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quartet.errors import TrainingError
from quartet.models.as_in_training import as_in_training
from quartet.models.roles import Roles
from quartet.ops.rewards import ScorePlacement, value_mask
from quartet.records import Rollout, Scored, Sequences
from quartet.stages.batching import SequenceTable, microbatches
from quartet.stages.trunks import TrunkStates, with_trunks

Scorer = Callable[[Rollout], list[float]]
"""Further reward sources: one number an episode."""


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    roles: Roles,
    *,
    temperature: float,
    placement: ScorePlacement,
    rows: int,
    extra: Scorer | None = None,
) -> Scored:
    """What reference, value and reward model say of the responses.

    Args:
        temperature: that of the rollout.
        placement: `ppo.score_placement`; decides at which tokens values are needed.
        rows: sequences computed at once.
        extra: what is added to the reward model's score.

    Raises:
        TrainingError: a log-probability or score that is not finite; names the episode.
        RewardError: from `extra`.
    """
    mask = rollout.response_mask
    values_at = value_mask(mask, placement)
    table = SequenceTable.of(rollout)
    ref_logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    scores = torch.zeros(len(mask), device=mask.device)
    trunks = _trunks(table, roles, rows)

    def batches() -> Iterator[tuple[Tensor, Sequences]]:
        for chosen, plain in microbatches(table, range(len(mask)), rows):
            yield chosen, with_trunks(plain, trunks)

    # Role by role, so that only one role's weights need to be on the device.
    roles.use("reference")
    for chosen, sequences in batches():
        ref_logprobs[chosen] = roles.reference(sequences, mask[chosen], temperature=temperature)[0]
    roles.use("value")
    for chosen, sequences in batches():
        with as_in_training():  # the update clips its values around these
            values[chosen] = roles.value(sequences, values_at[chosen])
    roles.use("reward")
    for chosen, sequences in batches():
        scores[chosen] = roles.reward.scores(sequences)
    # After the forward passes: under an engine that cuts weights, all processes take part in each of them.
    _refuse_not_finite(rollout.logprobs.sum(-1), rollout, "policy", "models.sft")
    _refuse_not_finite(scores, rollout, "reward model", "models.reward")
    _refuse_not_finite(values.sum(-1), rollout, "value model", "ppo.value_learning_rate")
    _refuse_not_finite(ref_logprobs.sum(-1), rollout, "reference", "models.sft")
    if extra is not None:
        scores += torch.tensor(extra(rollout), device=scores.device)
        _refuse_not_finite(scores, rollout, "weighted sum of rewards", "rewards")
    return Scored(rollout, ref_logprobs, values, values_at, scores, trunks)


def _trunks(table: SequenceTable, roles: Roles, rows: int) -> dict[str, tuple[Tensor, ...]]:
    """States after the frozen layers, for both roles of each pair and for the epochs of the update."""
    kept = TrunkStates(len(table))
    roles.use("policy", "value")
    for _, plain in microbatches(table, range(len(table)), rows):
        kept.keep(plain, table.length, roles.trunk_states(plain))
    return kept.rows()


def _refuse_not_finite(numbers: Tensor, rollout: Rollout, giver: str, key: str) -> None:
    bad = (~numbers.isfinite()).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        episode = rollout.prompts.episodes[row]
        # Those of the evaluation count down from -1.
        which = f"episode {episode}" if episode >= 0 else f"evaluation prompt {-episode}"
        raise TrainingError(
            f"the {giver} gave {numbers[row].item()} to {which} "
            f"(prompt {rollout.prompts.texts[row][:80]!r}); look at {key}, or compute in float32 (models.dtype=float32)"
        )
