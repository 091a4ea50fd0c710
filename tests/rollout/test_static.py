"""The static engine against transformers' own generation, the dynamic engine and a plain forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    GPTNeoConfig,
)

from quartet import kernels
from quartet.errors import ConfigError
from quartet.kernels import attending, multiplying
from quartet.models import attention
from quartet.models.attention import use_own_attention
from quartet.models.fused import use_fused_layers
from quartet.models.linears import use_fast_linears
from quartet.models.roles import LanguageView
from quartet.rollout.choose import make_engine
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.sampling import sample
from quartet.rollout.static import StaticEngine
from questions import Questions
from rollout_policies import (
    FAMILIES,
    LENGTHS,
    VOCABULARY,
    full_logprobs,
    make_policy,
    make_prompts,
    settings,
    with_stops,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family: str) -> None:
    policy = make_policy(FAMILIES[family]())
    prompts = make_prompts()
    rollout = StaticEngine(policy, settings()).generate(prompts, greedy=True)
    for row, tokens in enumerate(prompts.tokens):
        alone = policy.backbone.model.generate(
            tokens[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert rollout.tokens[row].tolist() == alone[0, len(tokens) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_steps_of_grouped_heads_equal_the_librarys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose attention copies keys and values for each head in some versions; ours is seen to be what a step runs."""
    policy, prompts = make_policy(FAMILIES[family]()), make_prompts()
    expected = StaticEngine(policy, settings()).generate(prompts, greedy=True)
    use_own_attention(policy.backbone.model)
    seen: list[tuple[int, bool]] = []
    theirs = attention.sdpa_attention_forward

    def noting(module: Any, query: torch.Tensor, *given: Any, **named: Any) -> Any:
        seen.append((query.shape[2], given[2] is not None))
        return theirs(module, query, *given, **named)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noting)
    found = StaticEngine(policy, settings()).generate(prompts, greedy=True)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)
    assert (9, False) in seen  # a prompt
    assert (1, True) not in seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2-window"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_prompts_are_computed_by_the_kernels_of_training(
    family: str, lora: bool, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they multiply; a layer's product and its adapter's in one go. Tokens are too many for the kernels of few rows."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    if not kernels.multiplies():
        pytest.skip("no kernels were compiled")
    config = FAMILIES[family]()
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 96, 100
    config.head_dim, config.num_key_value_heads, config.initializer_range = 16, config.num_attention_heads, 0.1
    policy, prompts = make_policy(config, lora=lora), make_prompts((44, 39, 41, 28, 43))
    model = policy.backbone.model
    expected = full_logprobs(policy, rollout := DynamicEngine(policy, settings()).generate(prompts), 0.8)
    use_fast_linears(model)
    use_fused_layers(model)
    use_own_attention(model)
    engine = StaticEngine(policy, settings(batch_rows=5), merged=merged)
    terms, names = Counter[int](), Counter[str]()
    multiply, find = kernels.multiply, attending.kernel
    monkeypatch.setattr(
        kernels, "multiply", lambda out, *given, **how: terms.update([len(given)]) or multiply(out, *given, **how)
    )
    monkeypatch.setattr(attending, "kernel", lambda name: names.update([name]) or find(name))
    found = engine.generate(prompts)
    assert torch.equal(found.tokens, rollout.tokens)
    torch.testing.assert_close(found.logprobs, expected, atol=1e-4, rtol=0)
    layers = 2 * 7
    assert terms == ({1: layers, 2: layers} if lora and not merged else {1: layers})
    at_all = 1 if family == "qwen2-window" else 2  # layers that look at all tokens
    assert names["attention_f32"] == at_all


@pytest.mark.parametrize("greedy", [True, False])
def test_a_step_reads_which_rows_stopped_and_asks_nothing_else(greedy: bool) -> None:
    """What is read has the same shape whatever is in it; where its shape depends on that, the host waits once more."""
    policy = make_policy(FAMILIES["llama"]())
    engine = StaticEngine(policy, with_stops(policy, greedy=greedy))
    with Questions() as questions:
        found = engine.generate(make_prompts(), greedy=greedy)
    assert questions.seen == []
    assert found.stopped.any()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_refilled_rows_with_early_stops_equal_the_dynamic_engine(family: str, greedy: bool) -> None:
    policy = make_policy(FAMILIES[family]())
    chosen = with_stops(policy, greedy=greedy)
    expected = DynamicEngine(policy, chosen).generate(make_prompts(), greedy=greedy)
    found = StaticEngine(policy, chosen).generate(make_prompts(), greedy=greedy)
    assert 0 < expected.stopped.sum() < len(LENGTHS)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert torch.equal(found.stopped, expected.stopped)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_as_sampled_are_those_of_a_full_forward(family: str) -> None:
    policy = make_policy(FAMILIES[family]())
    rollout = StaticEngine(policy, with_stops(policy, greedy=False)).generate(make_prompts())
    torch.testing.assert_close(rollout.logprobs, full_logprobs(policy, rollout, 0.8), atol=1e-4, rtol=0)


def test_the_policy_adapter_is_on_while_decoding_and_the_state_before_comes_back() -> None:
    policy = make_policy(FAMILIES["llama"](), lora=True)
    rollout = StaticEngine(policy, settings()).generate(make_prompts())
    assert policy.backbone.adapters.active is None
    torch.testing.assert_close(rollout.logprobs, full_logprobs(policy, rollout, 0.8), atol=1e-4, rtol=0)
    bare = LanguageView(policy.backbone, None, policy.head)
    assert (rollout.logprobs - full_logprobs(bare, rollout, 0.8)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("trained", ["adapter", "weights"])
def test_bfloat16_stays_near_a_full_forward(family: str, trained: str) -> None:
    config = FAMILIES[family]()
    config.initializer_range = 0.1
    policy = make_policy(config, lora=trained == "adapter", trainable=trained == "weights", dtype=torch.bfloat16)
    rollout = StaticEngine(policy, settings()).generate(make_prompts())
    assert (rollout.logprobs - full_logprobs(policy, rollout, 0.8)).abs().mean() < 0.02


def test_a_rollout_leaves_no_converted_weights_that_would_swallow_gradients() -> None:
    """A copy that autocast made without gradients, met again inside the caller's autocast, has no way back."""
    policy = make_policy(FAMILIES["gpt2"](), trainable=True, dtype=torch.bfloat16)
    engine = StaticEngine(policy, settings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = engine.generate(make_prompts())
        rows = [torch.cat([p, r]) for p, r in zip(rollout.prompts.tokens, rollout.tokens, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        policy.backbone.model(input_ids=ids).logits.square().mean().backward()
    assert [n for n, p in policy.backbone.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_batching_does_not_change_what_is_sampled(batch_rows: int) -> None:
    policy = make_policy(FAMILIES["qwen3"]())
    chosen = replace(with_stops(policy, greedy=False), top_p=0.9)
    one = StaticEngine(policy, replace(chosen, batch_rows=2)).generate(make_prompts())
    other = StaticEngine(policy, replace(chosen, batch_rows=batch_rows)).generate(make_prompts())
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.response_mask, other.response_mask)


def test_rows_that_stop_are_refilled() -> None:
    """Seven responses of lengths 12, 1, ...: three rows at once need far fewer steps than groups of three in turn."""
    policy = make_policy(FAMILIES["llama"]())
    free = StaticEngine(policy, settings()).generate(make_prompts())
    stop = int(free.tokens[1, 0])
    chosen = settings(stop_id=stop)
    rollout = StaticEngine(policy, chosen).generate(make_prompts())
    lengths = rollout.response_mask.sum(-1)
    assert lengths[1] == 1
    work = int((lengths - 1).sum())
    assert -(-work // 3) <= rollout.decode_steps <= work // 3 + 12
    assert (
        StaticEngine(policy, replace(chosen, batch_rows=7)).generate(make_prompts()).decode_steps == lengths.max() - 1
    )


def test_logprobs_over_a_large_vocabulary_are_exact() -> None:
    """softmax adds up 150,000 float32 numbers with an error of about 1e-5."""
    logits = 3 * torch.randn(16, 150_001, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0.02, 0.98, 16, dtype=torch.float64)
    tokens, logprobs = sample(logits, uniform, temperature=1.0, top_p=1.0)
    expected = logits.double().log_softmax(-1)
    assert (logprobs - expected.gather(-1, tokens[:, None]).squeeze(-1)).abs().max() < 2e-6
    running = expected.exp().cumsum(-1)
    exact = torch.searchsorted(running, uniform[:, None])
    assert (running.gather(-1, tokens[:, None]) - running.gather(-1, exact)).abs().max() < 1e-5


def test_weights_and_training_state_are_untouched() -> None:
    policy = make_policy(FAMILIES["llama"](), lora=True)
    model = policy.backbone.model
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needs = [p.requires_grad for p in model.parameters()]
    forwards = {name for name, module in model.named_modules() if "forward" in vars(module)}
    StaticEngine(policy, settings()).generate(make_prompts())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert needs == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in model.modules())
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == forwards


def test_gradient_checkpointing_does_not_take_the_cache_away() -> None:
    plain, policy = (make_policy(FAMILIES["llama"](), lora=True) for _ in range(2))
    policy.backbone.enable_checkpointing()
    policy.backbone.model.train()
    found = StaticEngine(policy, settings()).generate(make_prompts(), greedy=True)
    assert torch.equal(found.tokens, StaticEngine(plain, settings()).generate(make_prompts(), greedy=True).tokens)


NOT_DRIVABLE = {
    "no position_ids": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "takes no position_ids",
    ),
    "windows of its own": (
        lambda: GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
        "window_size",
    ),
}


@pytest.mark.parametrize("case", NOT_DRIVABLE)
def test_auto_falls_back_with_a_notice_and_static_refuses(case: str) -> None:
    config, reason = NOT_DRIVABLE[case]
    policy = make_policy(config())
    said: list[str] = []
    engine = make_engine("auto", policy, settings(), said.append)
    assert isinstance(engine, DynamicEngine)
    (notice,) = said
    assert reason in notice
    assert "\n" not in notice
    with pytest.raises(ConfigError, match=r"rollout\.engine=static .*" + reason):
        make_engine("static", policy, settings(), said.append)
    assert engine.generate(make_prompts(), greedy=True).response_mask.all()


def test_a_model_that_loses_the_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(FAMILIES["llama"]())
    transformer = policy.backbone.transformer
    forward = type(transformer).forward

    def without_cache(self: Any, position_ids: Any = None, past_key_values: Any = None, **arguments: Any) -> Any:
        arguments.pop("attention_mask", None)
        return forward(self, position_ids=position_ids, **arguments | {"use_cache": False})

    monkeypatch.setattr(type(transformer), "forward", without_cache)
    said: list[str] = []
    assert isinstance(make_engine("auto", policy, settings(), said.append), DynamicEngine)
    assert len(said) == 1
    assert "changes its hidden states" in said[0]


def test_auto_takes_the_static_engine_without_a_word_and_dynamic_can_be_asked_for() -> None:
    policy = make_policy(FAMILIES["llama"]())
    said: list[str] = []
    assert isinstance(make_engine("auto", policy, settings(), said.append), StaticEngine)
    assert isinstance(make_engine("static", policy, settings(), said.append), StaticEngine)
    assert isinstance(make_engine("dynamic", policy, settings(), said.append), DynamicEngine)
    assert said == []
