"""`rollout.correct_rollout`: the update starts at a ratio of exactly 1, and the gap is still told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import Pipeline
from quartet.records import Prompts, Rollout
from quartet.rollout.static import StaticEngine
from quartet.stages.batching import SequenceTable, microbatches
from quartet.stages.correction import corrected
from quartet.trainer import train
from tiny import TinyRun


def test_wrong_logprobs_are_replaced_by_the_policys(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run())
    rollout = pipeline.rollout()
    off = replace(rollout, logprobs=(rollout.logprobs - 0.5).where(rollout.response_mask, 0.0))
    found, gap = corrected(off, pipeline.roles, temperature=1.0, rows=3)
    torch.testing.assert_close(found.logprobs, rollout.logprobs, rtol=1e-4, atol=1e-5)
    assert (found.logprobs[~rollout.response_mask] == 0).all()
    assert (gap[0] / gap[1]).item() == pytest.approx(0.5, abs=1e-4)
    assert gap[1] == rollout.response_mask.sum()


@pytest.mark.parametrize("correct", [False, True])
def test_an_engine_that_is_off_is_put_right(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correct: bool
) -> None:
    generate = StaticEngine.generate

    def off(engine: StaticEngine, prompts: Prompts, **options: Any) -> Rollout:
        rollout = generate(engine, prompts, **options)
        return replace(rollout, logprobs=(rollout.logprobs + 0.25).where(rollout.response_mask, 0.0))

    monkeypatch.setattr(StaticEngine, "generate", off)
    once = {"ppo.epochs": 1, "ppo.minibatches": 1, "ppo.learning_rate": 1e-9}
    run = train(tiny_run(**once, **{"rollout.correct_rollout": correct, "rollout.engine": "static"}))
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["rollout/logprob_gap"] == pytest.approx(0.25, abs=1e-3)
    assert metrics["ratio/max_log"] == pytest.approx(0.0 if correct else 0.25, abs=1e-3)


@pytest.mark.parametrize("plan", [{}, {"models.lora": {"r": 4}}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_too_the_update_starts_from_its_own_numbers(tiny_run: TinyRun, family: str, plan: Any) -> None:
    """Log-probabilities and values: without gradients attention would take another kernel, and round otherwise."""
    pipeline = Pipeline(tiny_run(family, **plan, **{"models.dtype": "bfloat16", "models.device": "cpu"}))
    rollout = pipeline.rollout()
    found, _ = corrected(rollout, pipeline.roles, temperature=1.0, rows=len(rollout.tokens))
    scored = pipeline.score(found)
    mask, table = rollout.response_mask, SequenceTable.of(rollout)
    for chosen, sequences in microbatches(table, range(len(mask)), len(mask)):
        logprobs, _ = pipeline.roles.policy(sequences, mask[chosen], temperature=1.0)
        values = pipeline.roles.value(sequences, scored.value_mask[chosen])
        assert logprobs.requires_grad
        torch.testing.assert_close(found.logprobs[chosen], logprobs, rtol=0, atol=1e-3)
        torch.testing.assert_close(scored.values[chosen], values, rtol=0, atol=1e-3)
