"""Small policies of many families, prompts of unequal length, and sampling settings, for tests of generation."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from quartet.config import LoraConfig
from quartet.models import adapters
from quartet.models.backbone import Backbone
from quartet.models.heads import LogitHead
from quartet.models.plan import AdapterSpec, BackboneSpec
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout, Sequences
from quartet.rollout import SamplingSettings
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.static import StaticEngine

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2-window": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, layer_types=WINDOWS),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral-window": lambda: MistralConfig(**GROUPED, sliding_window=5),
    "gpt2": lambda: GPT2Config(**SIZES, n_inner=48),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, layer_types=WINDOWS),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, layer_types=WINDOWS),
}
LENGTHS = (3, 9, 5, 1, 7, 9, 2)


def make_policy(
    config: Any, *, lora: bool = False, trainable: bool = False, dtype: torch.dtype = torch.float32
) -> LanguageView:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(trainable)
    specs: tuple[AdapterSpec, ...] = ()
    if lora:
        adapters.attach_fresh(model, "policy", LoraConfig(r=4, alpha=8), seed=0)
        specs = (AdapterSpec("policy", True, None),)
        for _, parameter in adapters.adapter_parameters(model, "policy"):
            torch.nn.init.normal_(parameter, std=0.2)  # B starts at zero, where an adapter left out would not show
    spec = BackboneSpec("sft", "none", "language_model", trainable=trainable, adapters=specs)
    backbone = Backbone(spec, model, dtype=dtype)
    return LanguageView(backbone, "policy" if lora else None, LogitHead(model))


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> Prompts:
    generator = torch.Generator().manual_seed(11)
    tokens = tuple(torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths)
    return Prompts(tuple(range(100, 100 + len(lengths))), ("",) * len(lengths), tokens)


def settings(**changes: Any) -> SamplingSettings:
    start = SamplingSettings(
        response_length=12, temperature=0.8, top_p=1.0, stop_id=None, pad_id=0, batch_rows=3, seed=5
    )
    return replace(start, **changes)


def with_stops(policy: LanguageView, *, greedy: bool) -> SamplingSettings:
    """Settings whose stop token ends some responses early, at different steps, and not others."""
    tokens = DynamicEngine(policy, settings()).generate(make_prompts(), greedy=greedy).tokens
    for candidate in tokens.unique().tolist():
        hits = tokens == candidate
        firsts = {int(row.int().argmax()) for row in hits if row.any()}
        if 2 <= hits.any(-1).sum() < len(tokens) and len(firsts) > 1:
            return settings(stop_id=candidate)
    raise AssertionError("no token ends some responses and not others")


def full_logprobs(policy: LanguageView, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities of the sampled tokens by one plain forward pass over prompt and response."""
    prompts, lengths = rollout.prompts.tokens, rollout.response_mask.sum(-1)
    rows = [torch.cat([p, r[:n]]) for p, r, n in zip(prompts, rollout.tokens, lengths, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sequences = Sequences(ids, torch.tensor([len(p) for p in prompts]), lengths)
    with torch.no_grad():
        logprobs, _ = policy(sequences, rollout.response_mask, temperature=temperature)
    return logprobs


def assert_engine_decodes_by(
    kind: Any, policy: LanguageView, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By steps of this kind; and by layers where it gives something else, which the engine's own check finds and says."""
    prompts, calls, theirs = make_prompts(), [], kind.__call__

    def noting(self: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        calls.append(len(tokens))
        found: Tensor = theirs(self, tokens, positions)
        return found

    monkeypatch.setattr(kind, "__call__", noting)
    engine = StaticEngine(policy, settings())
    calls.clear()
    expected = engine.generate(prompts)
    assert len(calls) == expected.decode_steps
    monkeypatch.setattr(kind, "__call__", lambda *given: theirs(*given) * 1.01)
    with caplog.at_level(logging.WARNING, "quartet"):
        engine = StaticEngine(policy, settings())
    assert "The compiled decoding step is not used" in caplog.text
    found = engine.generate(prompts)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
