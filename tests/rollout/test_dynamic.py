"""The dynamic engine against transformers' `generate` and against recomputed log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoints import EOS, FAMILIES, PAD, STOP, plain_model
from pipeline import Pipeline
from quartet.config import PPOConfig
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.engine import SamplingSettings
from quartet.stages.advantages import compute_advantages
from quartet.stages.batching import SequenceTable
from tiny import TinyRun

LENGTHS = (3, 1, 7, 12, 7)
"""Of the prompts; with windows of 4 tokens some are shorter and some longer than Gemma2's."""


def prompts_of(lengths: tuple[int, ...] = LENGTHS, *, first: int = 0, seed: int = 5) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(torch.randint(0, 256, (length,), generator=generator) for length in lengths)
    episodes = tuple(range(first, first + len(tokens)))
    return Prompts(episodes, tuple(f"prompt {episode}" for episode in episodes), tokens)


def engine_of(policy: LanguageView, **changes: Any) -> DynamicEngine:
    settings: dict[str, Any] = {
        "response_length": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "stop_id": EOS,
        "pad_id": PAD,
        "batch_rows": 8,
        "seed": 3,
    }
    return DynamicEngine(policy, SamplingSettings(**settings | changes))


def recomputed(policy: LanguageView, rollout: Rollout, temperature: float) -> torch.Tensor:
    table = SequenceTable.of(rollout)
    with torch.no_grad():
        rows = table.rows(list(range(len(table))))[1]
        return policy(rows, rollout.response_mask, temperature=temperature)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, tiny_run: TinyRun, library: Any) -> None:
    """Prompts of different lengths in one group, padded on the left, give what each gives alone."""
    policy = Pipeline(tiny_run(family)).roles.policy
    engine, prompts = engine_of(policy, stop_id=None), prompts_of()
    rollout = engine.generate(prompts, greedy=True)
    model: Any = plain_model(library.path(family, "sft"))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for row, tokens in enumerate(prompts.tokens):
        ids = tokens[None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(tokens) :]
        assert torch.equal(rollout.tokens[row], expected)
        alone = Prompts((prompts.episodes[row],), (prompts.texts[row],), (tokens,))
        assert torch.equal(engine.generate(alone, greedy=True).tokens[0], expected)
    torch.testing.assert_close(rollout.logprobs, recomputed(policy, rollout, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_the_recomputed_ones(family: str, temperature: float, tiny_run: TinyRun) -> None:
    policy = Pipeline(tiny_run(family)).roles.policy
    rollout = engine_of(policy, temperature=temperature, batch_rows=2).generate(prompts_of())
    expected = recomputed(policy, rollout, temperature)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)
    assert (rollout.logprobs[rollout.response_mask] < 0).all()
    other = recomputed(policy, rollout, 1.7 - temperature)
    assert (rollout.logprobs - other).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_responses_do_not_depend_on_the_grouping(family: str, tiny_run: TinyRun) -> None:
    policy, prompts = Pipeline(tiny_run(family)).roles.policy, prompts_of((3, 1, 7, 12, 7, 2, 9))
    rollouts = [engine_of(policy, batch_rows=rows).generate(prompts) for rows in (1, 3, 7)]
    for rollout in rollouts[1:]:
        assert torch.equal(rollout.tokens, rollouts[0].tokens)
        assert torch.equal(rollout.stopped, rollouts[0].stopped)
        torch.testing.assert_close(rollout.logprobs, rollouts[0].logprobs, rtol=0, atol=1e-5)
    later = prompts_of((3, 1, 7, 12, 7, 2, 9), first=100)
    assert not torch.equal(engine_of(policy).generate(later).tokens, rollouts[0].tokens)


def early_stops(tiny_run: TinyRun, stop: int | None, *, rows: int = 16) -> Rollout:
    """Forty responses of a policy that stops often."""
    policy = Pipeline(tiny_run()).roles.policy
    with torch.no_grad():
        policy.backbone.model.get_output_embeddings().weight[STOP] = 0.0
        policy.backbone.model.get_output_embeddings().weight[:250] *= 0.2
    return engine_of(policy, stop_id=stop, batch_rows=rows, temperature=2.0).generate(prompts_of((4,) * 400))


def test_a_response_ends_with_its_stop_token(tiny_run: TinyRun) -> None:
    rollout = early_stops(tiny_run, STOP, rows=400)
    lengths = rollout.response_mask.sum(-1)
    assert torch.equal(rollout.response_mask, torch.arange(8) < lengths[:, None])
    stops = (rollout.tokens == STOP) & rollout.response_mask
    assert torch.equal(stops.any(-1), rollout.stopped)
    assert stops.sum(-1).max() == 1
    assert 5 < int(rollout.stopped.sum()) < 400
    last = rollout.tokens.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.equal(last == STOP, rollout.stopped)
    assert (lengths[~rollout.stopped] == 8).all()
    assert (rollout.tokens[~rollout.response_mask] == PAD).all()
    assert (rollout.logprobs[~rollout.response_mask] == 0).all()


def test_without_a_stop_token_all_run_to_the_end(tiny_run: TinyRun) -> None:
    rollout = early_stops(tiny_run, None, rows=400)
    assert rollout.response_mask.all()
    assert not rollout.stopped.any()
    assert (rollout.tokens == STOP).any()


def test_decoding_ends_with_the_longest_response(tiny_run: TinyRun) -> None:
    """One pass over the prompts gives the first token; each later token costs one decode step."""
    policy = Pipeline(tiny_run()).roles.policy
    prompts = prompts_of((4, 4, 4))
    greedy = engine_of(policy, stop_id=None).generate(prompts, greedy=True)
    for place in range(3):
        stop = int(greedy.tokens[0, place])
        rollout = engine_of(policy, stop_id=stop, batch_rows=1).generate(prompts, greedy=True)
        assert rollout.decode_steps == sum(int(length) - 1 for length in rollout.response_mask.sum(-1))
        assert rollout.response_mask[0].sum() == greedy.tokens[0].tolist().index(stop) + 1
        grouped = engine_of(policy, stop_id=stop).generate(prompts, greedy=True)
        assert grouped.decode_steps == int(rollout.response_mask.sum(-1).max()) - 1
        assert torch.equal(grouped.tokens, rollout.tokens)


def penalised(rollout: Rollout, pipeline: Pipeline) -> torch.Tensor:
    """What the missing-EOS penalty takes from each episode's rewards."""
    scored = pipeline.score(rollout)
    free, fined = (
        compute_advantages(scored, PPOConfig(missing_eos_penalty=penalty), kl_coef=0.05) for penalty in (None, 2.5)
    )
    return (free.rewards - fined.rewards).sum(-1)


@pytest.mark.parametrize(("stop", "name"), [("<stop>", STOP), (STOP, STOP), ("eos", EOS)])
def test_the_penalty_is_for_the_missing_stop_token(stop: str | int, name: int, tiny_run: TinyRun) -> None:
    """Whatever token stops; an EOS in the prompt, or in a response that EOS does not stop, counts for nothing."""
    pipeline = Pipeline(tiny_run(**{"rollout.stop": stop, "rollout.batch_size": 64, "rollout.response_length": 16}))
    with torch.no_grad():
        weight = pipeline.roles.policy.backbone.model.get_output_embeddings().weight
        weight[:250] *= 0.2
        weight[EOS], weight[STOP] = weight[4].clone(), weight[5].clone()
    prompts = prompts_of((5,) * 100)
    for tokens in prompts.tokens:
        tokens[2:4] = torch.tensor([EOS, STOP])
    rollout = pipeline.loaded.rollout.generate(prompts)
    ended = ((rollout.tokens == name) & rollout.response_mask).any(-1)
    other = ((rollout.tokens == EOS + STOP - name) & rollout.response_mask).any(-1)
    assert {*zip(ended.tolist(), other.tolist(), strict=True)} >= {(True, False), (False, True), (False, False)}
    expected = torch.where(ended, 0.0, 2.5)
    torch.testing.assert_close(penalised(rollout, pipeline), expected, rtol=0, atol=1e-5)


def test_generating_leaves_the_backbone_as_it_was(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(reward="reward-lora", **{"models.lora": {"r": 5}}))
    backbone = pipeline.roles.policy.backbone
    pipeline.rollout()
    assert backbone.adapters.active is None
    assert not backbone.model.training
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
