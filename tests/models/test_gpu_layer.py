"""A decoder layer in one pass on a GPU: by Triton's interpreter and a plain attention where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decoder_layers import TRAINED, fast, in_parts, layout, model_of, run, states
from gpu_kernels import DEVICE
from quartet.kernels import flash, gpu_training
from quartet.models import gpu_check, gpu_layer
from quartet.models.as_in_training import as_in_training
from quartet.models.gradients import IN_PLACE
from quartet.models.precision import planned_for

NEAR = 0.05
"""Norm of the error over that of what is expected: some roundings to bfloat16, of 0.004 each at the most. Gradients that come
of large numbers which cancel out may be off by more, but not by much more than those of the layer's parts in bfloat16."""


def attended(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float) -> Tensor:
    """Token by token as the formula says, in float64."""
    found = []
    for first, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (one[first:end].double().transpose(0, 1) for one in (query, key, value))
        k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
        future = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
        shares = (q @ k.transpose(1, 2) * scaling).masked_fill(future, float("-inf")).softmax(-1)
        found.append((shares @ v).transpose(0, 1))
    return torch.cat(found)


def attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float
) -> tuple[Tensor, list[Tensor]]:
    assert starts.dtype == torch.int32
    assert longest == max(b - a for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False))
    return attended(query, key, value, starts, scaling).to(query.dtype), [torch.zeros(1)] * 3


def attention_gradient(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, _, starts, _, scaling = given
    leaves = [one.detach().clone().requires_grad_() for one in (query, key, value)]
    with torch.enable_grad():
        found = attended(*leaves, starts, scaling)
    by_query, by_key, by_value = torch.autograd.grad(found, leaves, gradient.double())
    return by_query, by_key, by_value


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    monkeypatch.setattr(flash, "attention", attention)
    monkeypatch.setattr(flash, "attention_gradient", attention_gradient)
    with planned_for("cuda"):
        yield


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys() == parts.keys()
    for name, right in exact.items():
        off, in_parts_off = (float((one[name].double() - right).norm() / right.norm()) for one in (found, parts))
        assert off <= max(NEAR, 2 * in_parts_off), f"{name}: {off}, in parts {in_parts_off}"


@pytest.mark.parametrize(
    ("family", "trained", "last"),
    [
        *(("llama", trained, last) for trained in TRAINED for last in (False, True)),
        *((family, trained, True) for family in ("qwen2", "qwen3", "biased") for trained in ("full", "lora")),
        ("qwen3", "full", False),
    ],
)
def test_numbers_are_the_librarys_in_float64(family: str, trained: str, last: bool, taken: list[bool]) -> None:
    plain = model_of(family, trained).to(DEVICE)
    model = fast(plain, last=last)
    found = run(model, layout(device=DEVICE), trained, torch.bfloat16)
    assert taken == [True] * 3
    with in_parts():
        parts = run(model, layout(device=DEVICE), trained, torch.bfloat16)
    assert_near(found, run(plain.double(), layout(packed=False, device=DEVICE), trained), parts)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_gradients_added_in_place(trained: str) -> None:
    """Of two microbatches, the second time in the memory of the first."""
    model = fast(model_of("llama", trained).to(DEVICE), last=True)
    once = run(model, layout(device=DEVICE), trained, torch.bfloat16)
    weight, places = model.model.layers[1].mlp.up_proj, set()
    with IN_PLACE.added():
        for reset in range(2):
            IN_PLACE.reset(model.parameters(), reuse=True)
            for count in (1, 2):
                found = states(model, layout(device=DEVICE), trained, torch.bfloat16)
                torch.manual_seed(3)
                (found * torch.randn(found.shape).to(DEVICE)).sum().backward()
                gradients = {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}
                assert once.keys() == {"", *gradients}, (reset, count)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(gradient, once[name], rtol=0, atol=0.01 * float(once[name].abs().max()))
                if trained == "full":
                    places.add(weight.weight.grad.data_ptr())
    assert len(places) == (trained == "full")


def test_adapters_on_weights_of_bfloat16() -> None:
    plain = model_of("llama", "lora").to(DEVICE)
    model = fast(plain, last=True)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        if not other.requires_grad:
            other.data = other.data.bfloat16()
        one.data = other.data.double()
    found = run(model, layout(device=DEVICE), "lora", torch.bfloat16)
    with in_parts():
        parts = run(model, layout(device=DEVICE), "lora", torch.bfloat16)
    assert_near(found, run(plain.double(), layout(packed=False, device=DEVICE), "lora"), parts)


def test_without_gradients_the_same_numbers(taken: list[bool]) -> None:
    model = fast(model_of("llama").to(DEVICE), last=True)
    found = run(model, layout(device=DEVICE), "full", torch.bfloat16)[""]
    with torch.no_grad(), as_in_training():
        again = states(model, layout(device=DEVICE), "full", torch.bfloat16)
    assert taken == [True] * 6
    assert torch.equal(again, found)


def test_others_are_computed_part_by_part(taken: list[bool]) -> None:
    model = fast(model_of("gelu").to(DEVICE), last=False)
    found = run(model, layout(device=DEVICE), "full", torch.bfloat16)
    assert taken == [False] * 3
    with in_parts():
        parts = run(model, layout(device=DEVICE), "full", torch.bfloat16)
    assert all(torch.equal(found[name], parts[name]) for name in parts)


def test_float32_is_left_alone(taken: list[bool]) -> None:
    run(fast(model_of("llama").to(DEVICE), last=False), layout(device=DEVICE), "full")
    assert taken == [False] * 3


def test_every_linear_layer_is_in_a_group() -> None:
    assert sorted(number for group in gpu_layer.TOGETHER for number in group) == list(range(7))


def test_the_pass_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device(DEVICE)
    gpu_check.works.cache_clear()
    assert gpu_check.works(device)
    assert caplog.messages == []

    def half(*given: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        by_states, by_weight = gradient(*given, **kwargs)
        return by_states / 2, by_weight

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nhere")

    gradient = gpu_training.rms_norm_gradient
    for broken, reason in ((half, "its numbers are off by"), (fails, "it fails with RuntimeError: no compiler here")):
        monkeypatch.setattr(gpu_training, "rms_norm_gradient", broken)
        gpu_check.works.cache_clear()
        assert not gpu_check.works(device)
        assert reason in caplog.messages[-1]
    gpu_check.works.cache_clear()


def test_a_pass_that_is_computed_again_may_be_the_first_to_ask() -> None:
    """The trial's saved tensors are none of the checkpoint's."""
    device, weight = torch.device(DEVICE), torch.randn(4, 4, device=DEVICE, requires_grad=True)
    gpu_check.works.cache_clear()
    found: Tensor = checkpoint(lambda x: (x @ weight).sin() * gpu_check.works(device), weight, use_reentrant=False)
    found.sum().backward()
    assert weight.grad is not None
    assert gpu_check.works(device)
