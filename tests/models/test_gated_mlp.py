"""A gated MLP over frozen weights in one pass, against its formula and against separate layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from quartet.models import gated_mlp as module
from quartet.models.gated_mlp import GatedMLP, gated_mlp
from quartet.models.lending import LENDER
from quartet.models.linears import FastLinear

ACTIVATIONS = [nn.SiLU(), torch.relu, torch.sigmoid, nn.functional.gelu]
HIDDEN, BETWEEN, RANK, SCALE = 3, 7, 2, 1.5


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def layer(out: int, features: int, *, bias: bool, adapter: bool) -> list[Tensor | None]:
    """Weight, bias, A and B; the adapter has gradients."""
    return [
        random(out, features),
        random(out) if bias else None,
        random(RANK, features, grad=True) if adapter else None,
        random(out, RANK, grad=True) if adapter else None,
    ]


def applied(states: Tensor, tensors: list[Tensor | None]) -> Tensor:
    weight, bias, down, up = tensors
    assert weight is not None
    low = 0.0 if down is None or up is None else SCALE * states @ down.t() @ up.t()
    return states @ weight.t() + (0.0 if bias is None else bias) + low


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "adapters", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keeping", [False, True])
def test_the_formula_and_its_gradients(
    activation: Callable[[Tensor], Tensor], adapters: tuple[bool, bool, bool], bias: bool, keeping: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(BETWEEN, HIDDEN), (BETWEEN, HIDDEN), (HIDDEN, BETWEEN)]
    layers = [layer(*shape, bias=bias, adapter=adapter) for shape, adapter in zip(shapes, adapters, strict=True)]
    gate, up, down = layers
    tensors = [tensor for one in layers for tensor in one]
    with LENDER.keeping() if keeping else nullcontext():
        for tokens in (5, 4, 6):  # memory of other shapes in between
            states = random(2, tokens, HIDDEN, grad=True)
            leaves = [states, *(t for t in tensors if t is not None and t.requires_grad)]
            expected = applied(activation(applied(states, gate)) * applied(states, up), down)
            found = GatedMLP.apply(states, activation, [SCALE] * 3, *tensors)
            torch.testing.assert_close(found, expected)
            slope = random(*expected.shape)
            by_formula = torch.autograd.grad(expected, leaves, slope)
            for one, other in zip(torch.autograd.grad(found, leaves, slope), by_formula, strict=True):
                torch.testing.assert_close(one, other)


def layers(*, trained: bool) -> Iterator[FastLinear]:
    for out, features in ((BETWEEN, HIDDEN), (BETWEEN, HIDDEN), (HIDDEN, BETWEEN)):
        yield FastLinear(features, out, bias=False).requires_grad_(trained)


def saved(states: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> str:
    """The name of the pass that the result comes from."""
    return type(gated_mlp(states, gate, up, nn.SiLU(), down).grad_fn).__name__


def test_only_plain_frozen_layers_go_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_onednn", lambda weight: False)
    states = torch.randn(2, 4, HIDDEN, requires_grad=True)
    assert saved(states, *layers(trained=False)) == "GatedMLPBackward"
    assert saved(states, *layers(trained=True)) == "_GatedDownBackward"
    gate, up, down = layers(trained=False)
    assert saved(states, gate, up, nn.Linear(BETWEEN, HIDDEN)) != "GatedMLPBackward"
    seen: list[int] = []
    handle = up.register_forward_hook(lambda *_: seen.append(1))
    assert saved(states, gate, up, down) == "_GatedDownBackward"
    assert seen == [1]
    handle.remove()
    down.register_full_backward_hook(lambda *_: seen.append(2))
    gated_mlp(states, gate, up, nn.SiLU(), down).sum().backward()
    assert seen == [1, 2]
    gate, up, down = layers(trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved(states, gate, up, down) == "_GatedDownBackward"
    monkeypatch.setattr(module, "has_onednn", lambda weight: True)
    assert saved(states, gate, up, down) == "_GatedDownBackward"


def test_the_gradients_lie_in_the_memory_of_what_they_are_gradients_of() -> None:
    """Three rooms of a block and the two that are kept, forward and backward, whatever the number of tokens before."""
    torch.manual_seed(0)
    gate, up, down = layers(trained=False)
    with LENDER.keeping():
        for _ in range(2):
            states = torch.randn(1, 6, HIDDEN, requires_grad=True)
            GatedMLP.apply(
                states, nn.SiLU(), [1.0] * 3, *(t for one in (gate, up, down) for t in (one.weight, None, None, None))
            ).sum().backward()
        kept = LENDER._free
        assert kept is not None
        assert sorted(block.numel() for block in kept) == [6 * 3] * 3 + [6 * BETWEEN] * 2
