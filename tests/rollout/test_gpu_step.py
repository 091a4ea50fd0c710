"""Decoding steps by kernels for GPUs: they give what the layers give. On a CPU Triton's interpreter runs them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import pytest
import torch
from transformers import GraniteConfig, LlamaConfig

from gpu_kernels import DEVICE
from quartet.kernels import gpu
from quartet.models.roles import LanguageView
from quartet.rollout import static_decoder
from quartet.rollout.copies import as_one
from quartet.rollout.gpu_step import GpuStep, gpu_step
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_decoder import Decoder, generating
from quartet.rollout.steps import Picked
from rollout_policies import FAMILIES, GROUPED, assert_engine_decodes_by, make_policy, make_prompts, settings

KNOWN = ["llama", "mistral-window", "qwen2", "qwen2-window", "qwen3"]
FLOAT, HALF = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("without_kernels")  # of the CPU


def policy_of(
    config: Any, dtype: torch.dtype = FLOAT, held: torch.dtype = FLOAT, *, lora: bool = False
) -> LanguageView:
    """Weights that are held in float32 are trained; biases and norms are none that would not show."""
    policy = make_policy(config, lora=lora, trainable=held == FLOAT and not lora, dtype=dtype)
    model = policy.backbone.model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(DEVICE, held)
    return policy


def step_of(policy: LanguageView, *, merged: bool = False) -> GpuStep | None:
    """What a decoder finds for a cache that holds prompts."""
    decoder = Decoder(policy)
    with generating(policy, merged=merged):
        cache = decoder.new_cache(4, 12)
        ids, lengths = torch.ones(4, 2, dtype=torch.int64), torch.full((4,), 2)
        decoder.prefill(cache, 0, ids.to(DEVICE), lengths.to(DEVICE))
        return gpu_step(policy.backbone.transformer, decoder._patterns, cache, policy.backbone.dtype)


def steps(policy: LanguageView, *, by_kernels: bool, merged: bool = False) -> torch.Tensor:
    """States of four steps of rows of unequal length, beyond every window."""
    decoder = Decoder(policy)
    decoder.compiles = by_kernels
    ids = (torch.arange(3 * 9).reshape(3, 9) * 5 % 67).to(DEVICE)
    lengths = torch.tensor([6, 2, 4], device=DEVICE)
    with torch.no_grad(), generating(policy, merged=merged):
        cache = decoder.new_cache(3, 16)
        decoder.prefill(cache, 0, ids[:, :6], lengths)
        found = [decoder.step(cache, ids[:, step], lengths + step, 16) for step in range(4)]
        assert isinstance(decoder._compiled(cache), GpuStep) == by_kernels
    return torch.stack(found)


def assert_like(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(error.max()) < (1e-5 if dtype == FLOAT else 0.1)


@pytest.mark.parametrize(
    ("dtype", "held", "adapter"),
    [
        (FLOAT, FLOAT, "none"),
        (FLOAT, FLOAT, "apart"),
        (HALF, FLOAT, "none"),
        (HALF, HALF, "apart"),
        (HALF, HALF, "merged"),
    ],
)
@pytest.mark.parametrize("family", KNOWN)
def test_a_step_gives_what_the_layers_give(family: str, dtype: torch.dtype, held: torch.dtype, adapter: str) -> None:
    policy, merged = policy_of(FAMILIES[family](), dtype, held, lora=adapter != "none"), adapter == "merged"
    expected, found = (steps(policy, by_kernels=kernels, merged=merged) for kernels in (False, True))
    assert_like(found, expected, dtype)


def test_rows_that_are_computed_along_write_where_no_row_is() -> None:
    policy = policy_of(FAMILIES["llama"]())
    decoder = Decoder(policy)
    ids = (torch.arange(2 * 6).reshape(2, 6) * 5 % 67).to(DEVICE)
    lengths = torch.tensor([6, 3, 0, 0], device=DEVICE)
    found = []
    for rows in (2, 4):
        with torch.no_grad(), generating(policy):
            cache = decoder.new_cache(5, 16)
            decoder.prefill(cache, 0, ids, lengths[:2])
            tokens = torch.tensor([7, 9, 5, 5], device=DEVICE)  # 0 is padding, whose keys are zeros
            found.append(decoder.step(cache, tokens[:rows], lengths[:rows], 16)[:2])
            for layer in cache.layers:
                for store in (layer.keys, layer.values):
                    assert store is not None
                    assert bool(store[2:4, :, :1].any()) == (rows == 4)
                    assert not store[2:, :, 1:].any()
                    assert not store[4].any()
    assert torch.isfinite(found[1]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_prompts_and_steps_share_copies_that_end_with_the_rollout(lora: bool) -> None:
    """Copies are there where weights are converted or merged: queries, keys and values in one matrix, gate and up in one."""
    policy = policy_of(FAMILIES["qwen2"](), HALF, HALF if lora else FLOAT, lora=lora)
    decoder, whole = Decoder(policy), policy.backbone.transformer.layers[1]
    with torch.no_grad(), generating(policy, merged=True):
        cache = decoder.new_cache(2, 16)
        decoder.prefill(
            cache, 0, torch.ones(2, 3, dtype=torch.int64, device=DEVICE), torch.full((2,), 3, device=DEVICE)
        )
        step = decoder._compiled(cache)
        assert isinstance(step, GpuStep)
        layer = step._layers[1]
        for group, modules in (
            (layer.projections, [whole.self_attn.q_proj, whole.self_attn.k_proj, whole.self_attn.v_proj]),
            (layer.gates, [whole.mlp.gate_proj, whole.mlp.up_proj]),
        ):
            copies = [module.__dict__["forward"].layer.weight for module in modules]
            ((matrix, _),) = group._products
            assert as_one(copies) is not None
            assert torch.equal(matrix, torch.cat(copies))
            assert matrix.data_ptr() == copies[0].data_ptr()
        gone = ref(matrix.untyped_storage()), ref(step)
        del cache, step, layer, group, matrix, copies
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert not any("forward" in vars(module) for module in policy.backbone.model.modules())


def test_weights_in_the_dtype_of_the_computation_are_not_copied() -> None:
    policy = policy_of(FAMILIES["qwen2"](), HALF, HALF)
    step, layer = step_of(policy), policy.backbone.transformer.layers[0]
    assert step is not None
    theirs = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    ours = [weight.data_ptr() for weight, _ in step._layers[0].projections._products]
    assert ours == [module.weight.data_ptr() for module in theirs]


def test_weights_lie_together_or_apart() -> None:
    whole = torch.randn(6, 4)
    first, second = whole.split([2, 4])
    assert as_one([first, second]).data_ptr() == whole.data_ptr()  # type: ignore[union-attr]
    assert torch.equal(as_one([first, second]), whole)  # type: ignore[arg-type]
    assert as_one([second, first]) is None
    assert as_one([first, second.clone()]) is None
    assert as_one([whole[:2, :2], whole[2:, :2]]) is None


def test_an_engine_decodes_by_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert_engine_decodes_by(GpuStep, policy_of(FAMILIES["llama"]()), monkeypatch, caplog)


class Recorder:
    """Runs again what it was given, over the same results."""

    recording = False

    def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
        Recorder.recording = True
        result = work()
        Recorder.recording = False

        def play() -> None:
            for kept, fresh in zip(result, work(), strict=True):
                kept.copy_(fresh)

        return play, result

    def refusing(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_step_is_made_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rollout records its first step; rows that fill up to a power of two are among what is computed."""
    made: list[bool] = []

    def making(*given: Any) -> GpuStep | None:
        made.append(Recorder.recording)
        return gpu_step(*given)

    monkeypatch.setattr(static_decoder, "gpu_step", making)
    policy = policy_of(FAMILIES["llama"]())
    engine = StaticEngine(policy, settings(batch_rows=3, response_length=6))
    engine.record_with(Recorder)
    found = [engine.generate(make_prompts()) for _ in range(2)]
    assert len(made) >= 4
    assert not any(made)
    monkeypatch.setattr(static_decoder, "gpu_step", lambda *_: None)
    expected = StaticEngine(policy, settings(batch_rows=3, response_length=6)).generate(make_prompts())
    for one in found:
        assert torch.equal(one.tokens, expected.tokens)
        torch.testing.assert_close(one.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_compute_the_same_are_known(family: str, merged: bool, dtype: torch.dtype) -> None:
    policy = policy_of(FAMILIES[family](), dtype, dtype, lora=True)
    assert (step_of(policy, merged=merged) is not None) == (family in KNOWN)


def test_what_is_more_or_elsewhere_is_computed_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_of(policy_of(GraniteConfig(**GROUPED, residual_multiplier=0.5))) is None  # scales what it adds
    assert step_of(policy_of(LlamaConfig(**GROUPED, hidden_act="gelu"))) is None
    policy = policy_of(FAMILIES["llama"]())
    layer: Any = policy.backbone.transformer.layers[0]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert step_of(policy) is None
    handle.remove()
    assert step_of(policy) is not None
    layer.mlp.down_proj.forward = layer.mlp.down_proj.forward  # another library's
    assert step_of(policy) is None
    del layer.mlp.down_proj.forward
    monkeypatch.setattr(gpu, "usable", lambda _: False)
    assert step_of(policy) is None


def test_frozen_weights_of_another_dtype_are_left_to_autocast() -> None:
    """It keeps copies of trained ones only: others would be a second policy in memory."""
    policy = make_policy(FAMILIES["llama"](), dtype=HALF)
    policy.backbone.model.to(DEVICE)
    assert step_of(policy) is None
