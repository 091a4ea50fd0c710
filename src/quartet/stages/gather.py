"""Episodes over processes: each samples and scores its share, then all of them know all episodes.

A scored episode is a few numbers for each token, next to nothing beside the weights, so every process holds the whole
batch: advantages, whitening and metrics are then computed by the same code from the same numbers as in one process.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quartet.distributed import ProcessEngine
from quartet.records import Prompts, Rollout, Scored


def own_share(prompts: Prompts, engine: ProcessEngine) -> Prompts:
    """The prompts of this process: as many for each, in order; where they do not divide, the first ones come again."""
    if engine.world_size == 1:
        return prompts
    each = -(-len(prompts) // engine.world_size)
    places = [place % len(prompts) for place in range(engine.rank * each, (engine.rank + 1) * each)]
    return Prompts(
        episodes=tuple(prompts.episodes[i] for i in places),
        texts=tuple(prompts.texts[i] for i in places),
        tokens=tuple(prompts.tokens[i] for i in places),
    )


def everyones(scored: Scored, prompts: Prompts, engine: ProcessEngine) -> Scored:
    """The episodes of all processes in the order of `prompts`, from each one's share of them.

    States of frozen layers stay behind: they are large, and the update computes them again.
    """
    if engine.world_size == 1:
        return scored

    def rows(tensor: Tensor) -> Tensor:
        return engine.rows(tensor)[: len(prompts)]

    own = scored.rollout
    rollout = Rollout(
        prompts=prompts,
        tokens=rows(own.tokens),
        response_mask=rows(own.response_mask),
        logprobs=rows(own.logprobs),
        stopped=rows(own.stopped),
        decode_steps=own.decode_steps,
    )
    return replace(
        scored,
        rollout=rollout,
        ref_logprobs=rows(scored.ref_logprobs),
        values=rows(scored.values),
        value_mask=rows(scored.value_mask),
        scores=rows(scored.scores),
        trunks={},
    )
