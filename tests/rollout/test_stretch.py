"""Rollouts whose steps are taken in a row, against those that take them one by one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quartet import kernels
from quartet.models.heads import LogitHead
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout import SamplingSettings, static_decoder, steps
from quartet.rollout.compiled import CompiledStep
from quartet.rollout.static import StaticEngine
from rollout_policies import FAMILIES, GROUPED, make_policy, make_prompts, settings, with_stops

KNOWN = ["llama", "mistral-window", "qwen2", "qwen2-window", "qwen3"]
pytestmark = pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call took, but for those of an engine's check."""
    theirs, check, found = kernels.Stretch.__call__, static_decoder._check_stretch, list[int]()

    def noting(self: kernels.Stretch, *given: Any, **named: Any) -> int:
        found.append(theirs(self, *given, **named))
        return found[-1]

    def checking(*given: Any) -> None:
        before = len(found)
        check(*given)
        del found[before:]

    monkeypatch.setattr(kernels.Stretch, "__call__", noting)
    monkeypatch.setattr(static_decoder, "_check_stretch", checking)
    return found


def rollouts(
    policy: LanguageView, how: SamplingSettings, monkeypatch: pytest.MonkeyPatch, *, greedy: bool, merged: bool = False
) -> tuple[Rollout, Rollout]:
    """In a row, and one by one."""
    prompts: Prompts = make_prompts()
    found = StaticEngine(policy, how, merged=merged).generate(prompts, greedy=greedy)
    with monkeypatch.context() as patched:
        patched.setattr(CompiledStep, "stretch", lambda *_: None)
        expected = StaticEngine(policy, how, merged=merged).generate(prompts, greedy=greedy)
    return found, expected


def agree(found: Rollout, expected: Rollout, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert torch.equal(found.stopped, expected.stopped)
    assert found.decode_steps == expected.decode_steps
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("adapter", ["none", "apart", "merged"])
@pytest.mark.parametrize("family", KNOWN)
def test_the_same_tokens(
    family: str, adapter: str, greedy: bool, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stop and others take their places."""
    policy = make_policy(FAMILIES[family](), lora=adapter != "none")
    found, expected = rollouts(
        policy, with_stops(policy, greedy=greedy), monkeypatch, greedy=greedy, merged=adapter == "merged"
    )
    agree(found, expected)
    assert found.stopped.any()
    assert not found.stopped.all()
    assert sum(taken) == found.decode_steps > len(taken)


@pytest.mark.parametrize("adapter", ["none", "apart", "merged"])
def test_in_bfloat16_too(adapter: str, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With an LM head that is multiplied by the same kernel in both ways."""
    config = LlamaConfig(**GROUPED | {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4})
    policy = make_policy(config, lora=adapter != "none", dtype=torch.bfloat16)
    policy.backbone.model.to(torch.bfloat16)  # as it is converted where torch multiplies in it
    found, expected = rollouts(policy, settings(), monkeypatch, greedy=False, merged=adapter == "merged")
    agree(found, expected, tolerance=0.0)
    assert sum(taken) == found.decode_steps


@pytest.mark.parametrize(("most", "expected"), [(16, [11]), (4, [4, 4, 3]), (1, [1] * 11)])
def test_no_more_at_once_than_an_interruption_waits_for(
    most: int, expected: list[int], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts = make_policy(FAMILIES["llama"]()), make_prompts()
    how = replace(settings(), batch_rows=len(prompts))
    whole = StaticEngine(policy, how).generate(prompts)
    taken.clear()
    monkeypatch.setattr(steps, "AT_ONCE", most)
    found = StaticEngine(policy, how).generate(prompts)
    assert taken == expected
    assert torch.equal(found.tokens, whole.tokens)
    assert torch.equal(found.logprobs, whole.logprobs)


def test_what_is_drawn_from_fewer_tokens_is_drawn_one_by_one(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(FAMILIES["llama"]())
    how = replace(settings(), top_p=0.5)
    agree(*rollouts(policy, how, monkeypatch, greedy=False))
    assert taken == []
    agree(*rollouts(policy, how, monkeypatch, greedy=True))  # whatever top_p
    assert taken


class Scaled(LlamaForCausalLM):  # type: ignore[misc]
    """Logits that are not just what the LM head gives."""

    def forward(self, **given: Any) -> Any:
        output = super().forward(**given)
        output.logits = 3 * output.logits
        return output


def test_a_head_that_does_more_is_called_for_every_step(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, scaled, hooked = (make_policy(FAMILIES["llama"]()) for _ in range(3))
    scaled.backbone.model.__class__ = Scaled
    scaled.head = LogitHead(scaled.backbone.model)
    hooked.backbone.model.lm_head.register_forward_hook(lambda _, __, out: 3 * out)
    expected = StaticEngine(plain, settings()).generate(make_prompts())
    assert taken
    taken.clear()
    for policy in (scaled, hooked):
        found, other = rollouts(policy, settings(), monkeypatch, greedy=False)
        agree(found, other)
        assert not torch.equal(found.logprobs, expected.logprobs)
    assert taken == []


def test_embeddings_that_do_more_are_called_for_every_step(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    doubled, renormalised = (make_policy(FAMILIES["llama"]()) for _ in range(2))
    doubled.backbone.transformer.embed_tokens.__class__ = Doubled
    renormalised.backbone.transformer.embed_tokens.max_norm = 1.0
    for policy in (doubled, renormalised):
        agree(*rollouts(policy, settings(), monkeypatch, greedy=False))
    assert taken == []


def test_an_engine_that_finds_other_numbers_takes_the_layers(
    taken: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an LM head that gives something else in a row than by itself."""
    policy, prompts = make_policy(FAMILIES["llama"]()), make_prompts()
    expected = StaticEngine(policy, settings()).generate(prompts)
    theirs = kernels.Stretch.__init__

    def another(self: kernels.Stretch, decoding: Any, embeddings: Any, head: kernels.Linear, **named: Any) -> None:
        theirs(self, decoding, embeddings, kernels.Linear(head.weight * 1.1), **named)

    monkeypatch.setattr(kernels.Stretch, "__init__", another)
    with caplog.at_level(logging.WARNING, "quartet"):
        engine = StaticEngine(policy, settings())
    assert "The compiled decoding step is not used" in caplog.text
    assert "in a row" in caplog.text
    taken.clear()
    agree(engine.generate(prompts), expected)
    assert taken == []


def test_a_row_that_is_not_finite_says_so(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(FAMILIES["llama"]())
    with torch.no_grad():
        policy.backbone.model.lm_head.weight[5] = torch.nan
    monkeypatch.setattr("quartet.rollout.static.check", lambda *_: None)
    found = StaticEngine(policy, settings()).generate(make_prompts())
    assert taken
    assert found.logprobs.isnan().all()
