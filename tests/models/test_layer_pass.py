"""A decoder layer in one pass: the numbers of its parts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from decoder_layers import (
    FAMILIES,
    PROMPTS,
    RESPONSES,
    TRAINED,
    fast,
    in_parts,
    layout,
    model_of,
    needs_kernels,
    run,
    states,
)
from quartet.kernels import library, multiplying, waiting
from quartet.models import layer_pass
from quartet.models.adapters import AdapterSwitch
from quartet.models.as_in_training import as_in_training
from quartet.models.gradients import IN_PLACE


@pytest.fixture(params=["kernels", "some", "mkl"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All products by kernels, so that all of a layer waits; the larger ones; none."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: request.param != "mkl")
    monkeypatch.setattr(multiplying, "SMALLEST", 0 if request.param == "kernels" else 36 * 32 * 20)
    by: str = request.param
    return by


@needs_kernels
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_the_parts_bit_for_bit(
    family: str, trained: str, products: str, taken: list[bool]
) -> None:
    model = fast(model_of(family, trained), last=False)
    found = run(model, layout(), trained)
    assert taken == [True] * 3
    with in_parts():
        expected = run(model, layout(), trained)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@needs_kernels
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("trained", ["full", "lora", "late"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_the_librarys_in_float64(
    family: str, trained: str, multiple: int, products: str, taken: list[bool]
) -> None:
    """One sequence a row there. The last layer computes nothing after its attention of what is not read."""
    plain = model_of(family, trained)
    found = run(fast(plain, last=True), layout(multiple=multiple), trained)
    assert taken == [True] * 3
    exact = run(plain.double(), layout(packed=False), trained)
    assert found.keys() == exact.keys()
    for name, right in exact.items():
        torch.testing.assert_close(found[name].double(), right, rtol=0, atol=2e-5 * right.abs().max().item())


@needs_kernels
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "biased"])
def test_in_bfloat16_too(family: str, trained: str, taken: list[bool]) -> None:
    model = fast(model_of(family, trained), last=False)
    found = run(model, layout(multiple=8), trained, torch.bfloat16)
    assert taken == [True] * 3
    with in_parts():
        expected = run(model, layout(multiple=8), trained, torch.bfloat16)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@needs_kernels
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_gradients_added_in_place(trained: str, products: str) -> None:
    model = fast(model_of("llama", trained), last=False)

    def twice() -> dict[str, Tensor]:
        with IN_PLACE.added():
            IN_PLACE.reset(model.parameters(), reuse=True)
            for _ in range(2):
                found = states(model, layout(), trained)
                torch.manual_seed(3)
                (found * torch.randn(found.shape)).sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = twice()
    with in_parts():
        expected = twice()
    assert found
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@needs_kernels
def test_two_calls_of_kernels_a_layer_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    names: list[str] = []

    def kernel(name: str) -> Callable[..., None] | None:
        function = library.kernel(name)
        return function and (lambda *given: (names.append(name), function(*given))[1])

    for module in (multiplying, waiting):
        monkeypatch.setattr(module, "kernel", kernel)
    model = fast(model_of("llama", "lora"), last=False)
    run(model, layout(), "lora")
    of_final_norm = ["rms_norm_f32", "rms_norm_gradient_f32"]
    assert names == ["run"] * 6 + of_final_norm + ["run"] * 6


@needs_kernels
@pytest.mark.parametrize("family", ["biased", "qwen3"])
def test_one_tensor_alone_is_trained(family: str, taken: list[bool]) -> None:
    """Whatever has no gradient before it and beside it: the one of the two layers' tensors gets its own."""
    model = fast(model_of(family), last=False)
    layers = [(name, one) for name, one in model.named_parameters() if "layers.0" in name or "layers.1" in name]
    assert len(layers) > 20
    for name, one in layers:
        model.requires_grad_(False)
        one.requires_grad_(True)
        found = run(model, layout(), "full")
        with in_parts():
            expected = run(model, layout(), "full")
        assert found.keys() == expected.keys() == {"", name}
        assert torch.equal(found[name], expected[name]), name
    assert all(taken)


@needs_kernels
def test_whoever_gets_what_a_layer_gives_may_write_into_it(taken: list[bool]) -> None:
    for last in (False, True):
        model = fast(model_of("llama"), last=last)
        hook = lambda _, __, given: given.mul_(0.5)  # noqa: E731
        for one in model.model.layers:
            one.register_forward_hook(hook)
        found = run(model, layout(), "full")
        with in_parts():
            expected = run(model, layout(), "full")
        for name, right in expected.items():
            torch.testing.assert_close(found[name], right, rtol=0, atol=2e-6 * right.abs().max().item())
    assert all(taken)


class Seen(NamedTuple):
    """A part's forward pass."""

    name: str
    given: list[Any]
    kept: int


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The forward passes of all parts."""
    found: list[Seen] = []
    there = layer_pass._There.__call__

    def noted(self: Any, function: Any, own: Any, *given: Any) -> Any:
        result = there(self, function, own, *given)
        found.append(Seen(function.__name__, list(given), len(self.parts[-1][1].saved_tensors)))
        return result

    monkeypatch.setattr(layer_pass._There, "__call__", noted)
    return found


@needs_kernels
def test_the_last_layer_computes_what_is_read_alone(seen: list[Seen]) -> None:
    """From each prompt's last token on, after its attention; the sum of the residual states is that of the norm."""
    states(fast(model_of("llama"), last=True), layout(), "full")
    tokens, read = sum(PROMPTS) + sum(RESPONSES), len(PROMPTS) + sum(RESPONSES)
    rows = [(part.name, part.given[0].shape[-2]) for part in seen if part.name in ("LinearPass", "GatedMLP")]
    assert rows == [("LinearPass", tokens), ("GatedMLP", tokens)] * 2 + [("LinearPass", read), ("GatedMLP", read)]
    norms = [len(part.given) for part in seen if part.name == "_Norm"]
    assert norms == [3, 4] * 3


@needs_kernels
def test_without_gradients_nothing_is_kept(taken: list[bool], seen: list[Seen]) -> None:
    model = fast(model_of("llama"), last=True)
    expected = states(model, layout(), "full")
    assert all(part.kept for part in seen)
    del seen[:]
    with torch.no_grad(), as_in_training():
        found = states(model, layout(), "full")
    assert taken == [True] * 6
    assert seen
    assert not any(part.kept for part in seen)
    assert torch.equal(found, expected.detach())
    assert not found.requires_grad
    with torch.no_grad():
        states(model, layout(), "full")
    assert taken[6:] == [False] * 3


@needs_kernels
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_activations_computed_again(trained: str, taken: list[bool]) -> None:
    plain = model_of("llama", trained)
    expected = run(fast(plain, last=True), layout(), trained)
    del taken[:]
    model = fast(plain, last=True)
    laid_out = layout()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": lambda: (laid_out.active(), again())})
    model.enable_input_require_grads()
    model.train()

    @contextmanager
    def again() -> Iterator[None]:
        with laid_out.active(), AdapterSwitch(model).on("one" if TRAINED[trained] else None):
            yield

    found = run(model, laid_out, trained)
    assert taken == [True] * 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_kernels
def test_a_second_backward_pass_finds_that_memory_was_reused() -> None:
    model = fast(model_of("llama"), last=False)
    total = states(model, layout(), "full").sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
