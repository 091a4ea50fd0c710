"""Rollouts whose steps are taken in a row, against those that take them one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig

from quartet import kernels
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout import SamplingSettings, steps
from quartet.rollout.compiled import CompiledStep
from quartet.rollout.static import StaticEngine
from rollout_policies import FAMILIES, GROUPED, make_policy, make_prompts, settings, with_stops

KNOWN = ["llama", "mistral-window", "qwen2", "qwen2-window", "qwen3"]
pytestmark = pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call took."""
    theirs, found = kernels.Stretch.__call__, []

    def noting(self: kernels.Stretch, *given: Any, **named: Any) -> int:
        found.append(theirs(self, *given, **named))
        return found[-1]

    monkeypatch.setattr(kernels.Stretch, "__call__", noting)
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


def test_a_head_that_does_more_is_called_for_every_step(taken: list[int]) -> None:
    """Granite divides its logits; a hook changes them; an adapter is on the head."""
    scaled = make_policy(GraniteConfig(**GROUPED, logits_scaling=3.0))
    hooked = make_policy(FAMILIES["llama"]())
    hooked.backbone.model.lm_head.register_forward_hook(lambda _, __, out: out * 2)
    for policy in (scaled, hooked):
        found = StaticEngine(policy, settings()).generate(make_prompts())
        assert found.response_mask.all()
    assert taken == []


def test_embeddings_that_do_more_are_called_for_every_step(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    policy = make_policy(FAMILIES["llama"]())
    policy.backbone.transformer.embed_tokens.__class__ = Doubled
    agree(*rollouts(policy, settings(), monkeypatch, greedy=False))
    assert taken == []


def test_a_row_that_is_not_finite_says_so(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(FAMILIES["llama"]())
    with torch.no_grad():
        policy.backbone.model.lm_head.weight[5] = torch.nan
    monkeypatch.setattr("quartet.rollout.static.check", lambda *_: None)
    found = StaticEngine(policy, settings()).generate(make_prompts())
    assert taken
    assert found.logprobs.isnan().all()
