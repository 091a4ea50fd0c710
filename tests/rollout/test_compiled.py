"""Which transformers decode by one kernel, and that they give what their layers give."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig, Ministral3Config

from quartet import kernels
from quartet.models.roles import LanguageView
from quartet.rollout import static_decoder
from quartet.rollout.compiled import CompiledStep, compiled_step
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_cache import NotDrivable
from quartet.rollout.static_decoder import Decoder, generating
from rollout_policies import FAMILIES, GROUPED, assert_engine_decodes_by, make_policy, make_prompts, settings

KNOWN = ["llama", "mistral-window", "qwen2", "qwen2-window", "qwen3"]
needs_kernels = pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")


def step_of(policy: LanguageView, rows: int = 4, *, merged: bool = False) -> CompiledStep | None:
    """What a decoder finds for a cache that holds prompts."""
    decoder = Decoder(policy)
    with generating(policy, merged=merged):
        cache = decoder.new_cache(rows, 12)
        decoder.prefill(cache, 0, torch.ones(rows, 2, dtype=torch.int64), torch.full((rows,), 2))
        return compiled_step(policy.backbone.transformer, decoder._patterns, cache, policy.backbone.dtype)


def steps(policy: LanguageView, *, compiled: bool, merged: bool = False) -> torch.Tensor:
    """States of seven steps of rows of unequal length, beyond every window."""
    decoder = Decoder(policy)
    decoder.compiles = compiled
    ids = torch.arange(3 * 9).reshape(3, 9) * 5 % 67
    lengths = torch.tensor([6, 2, 4])
    with torch.no_grad(), generating(policy, merged=merged):
        cache = decoder.new_cache(3, 16)
        decoder.prefill(cache, 0, ids[:, :6], lengths)
        found = [decoder.step(cache, ids[:, step], lengths + step, 16) for step in range(7)]
    return torch.stack(found)


@needs_kernels
@pytest.mark.parametrize("adapter", ["none", "apart", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_a_compiled_step_gives_what_the_layers_give(family: str, dtype: torch.dtype, adapter: str) -> None:
    policy = make_policy(FAMILIES[family](), lora=adapter != "none", dtype=dtype)
    policy.backbone.model.to(dtype)
    merged = adapter == "merged"
    assert step_of(policy, merged=merged) is not None
    expected, found = (steps(policy, compiled=compiled, merged=merged) for compiled in (False, True))
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(error.max()) < (1e-5 if dtype == torch.float32 else 0.1)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_compute_the_same_are_known(family: str, merged: bool, dtype: torch.dtype) -> None:
    """In bfloat16 over float32 weights only where oneDNN would convert them too; that is not so of layers this small."""
    held = make_policy(FAMILIES[family](), lora=True, dtype=dtype)
    if dtype == torch.bfloat16:
        held.backbone.model.to(dtype)
    assert (step_of(held, merged=merged) is not None) == (family in KNOWN)


@needs_kernels
def test_an_engine_decodes_by_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where steps are not taken in a row."""
    monkeypatch.setattr(CompiledStep, "stretch", lambda *_: None)
    assert_engine_decodes_by(CompiledStep, make_policy(FAMILIES["llama"]()), monkeypatch, caplog)


@needs_kernels
def test_an_engine_that_cannot_drive_a_model_says_so_with_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise NotDrivable("it fails")

    monkeypatch.setattr(static_decoder.Decoder, "step", failing)
    with pytest.raises(NotDrivable, match="it fails"):
        StaticEngine(make_policy(FAMILIES["llama"]()), settings())


@needs_kernels
def test_what_is_more_than_the_kernel_computes_is_computed_by_layers() -> None:
    assert step_of(make_policy(GraniteConfig(**GROUPED, residual_multiplier=0.5))) is None  # scales what it adds
    assert step_of(make_policy(LlamaConfig(**GROUPED, hidden_act="gelu"))) is None
    growing = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    growing |= {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert step_of(make_policy(Ministral3Config(**GROUPED, head_dim=8, rope_parameters=growing))) is None
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}  # its angles change with the longest row
    assert step_of(make_policy(LlamaConfig(**GROUPED, rope_parameters=scaled))) is None
    assert step_of(make_policy(LlamaConfig(**GROUPED)), rows=kernels.FEW + 1) is None


@needs_kernels
def test_layers_of_unlike_shapes_are_not_taken_for_like_ones() -> None:
    policy = make_policy(FAMILIES["llama"]())
    whole: Any = policy.backbone.transformer
    mlp, hidden = whole.layers[1].mlp, 32
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(hidden, 80, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(80, hidden, bias=False)
    assert step_of(policy) is None


@needs_kernels
def test_a_forward_inside_another_librarys_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(FAMILIES["llama"]())
    whole: Any = policy.backbone.transformer
    kind = type(whole.layers[0].mlp)
    theirs = kind.forward

    @functools.wraps(theirs)
    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * theirs(self, x)

    monkeypatch.setattr(kind, "forward", doubled)
    assert step_of(policy) is None


@needs_kernels
def test_what_waits_for_a_layers_call_is_not_passed_over() -> None:
    policy = make_policy(FAMILIES["llama"]())
    whole: Any = policy.backbone.transformer
    handle = whole.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert step_of(policy) is None
    handle.remove()
    assert step_of(policy) is not None
    whole.layers[0].mlp.forward = whole.layers[0].mlp.forward  # another library's
    assert step_of(policy) is None


@needs_kernels
def test_a_forward_of_ones_own_is_not_taken_for_the_librarys() -> None:
    policy = make_policy(FAMILIES["llama"]())
    whole: Any = policy.backbone.transformer
    layer = whole.layers[0]

    class Doubled(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer.mlp.__class__ = Doubled
    assert step_of(policy) is None


def test_without_kernels_all_is_computed_by_layers(without_kernels: None) -> None:
    assert step_of(make_policy(FAMILIES["llama"]())) is None


@needs_kernels
def test_weights_of_now_are_used_in_every_rollout() -> None:
    policy = make_policy(FAMILIES["llama"]())
    engine, prompts = StaticEngine(policy, settings()), make_prompts()
    before = engine.generate(prompts)
    with torch.no_grad():
        for parameter in policy.backbone.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    after = engine.generate(prompts)
    assert not torch.equal(after.tokens, before.tokens)
    fresh = StaticEngine(policy, settings()).generate(prompts)
    assert torch.equal(after.tokens, fresh.tokens)
    assert torch.equal(after.logprobs, fresh.logprobs)
