"""A gated MLP in one pass, against its formula and against separate layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from quartet.models import gated_mlp as module
from quartet.models.gated_mlp import GatedMLP, gated_mlp
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER
from quartet.models.linears import FastLinear

ACTIVATIONS = [nn.SiLU(), torch.relu, torch.sigmoid, nn.functional.gelu]
pytestmark = pytest.mark.usefixtures("computed_by")
HIDDEN, BETWEEN, RANK, SCALE = 3, 7, 2, 1.5


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def layer(out: int, features: int, *, bias: bool, adapter: bool, trained: bool = False) -> list[Tensor | None]:
    """Weight, bias, A and B; the adapter has gradients, and all else where it is trained."""
    return [
        random(out, features, grad=trained),
        random(out, grad=trained) if bias else None,
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
@pytest.mark.parametrize("trained", [(False,) * 3, (True,) * 3, (False, True, False), (False, False, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keeping", [False, True])
def test_the_formula_and_its_gradients(
    activation: Callable[[Tensor], Tensor],
    adapters: tuple[bool, bool, bool],
    trained: tuple[bool, bool, bool],
    bias: bool,
    keeping: bool,
) -> None:
    torch.manual_seed(0)
    shapes = [(BETWEEN, HIDDEN), (BETWEEN, HIDDEN), (HIDDEN, BETWEEN)]
    layers = [
        layer(*shape, bias=bias, adapter=adapter, trained=one)
        for shape, adapter, one in zip(shapes, adapters, trained, strict=True)
    ]
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


def layers(*, trained: bool, hidden: int = HIDDEN, between: int = BETWEEN) -> Iterator[FastLinear]:
    for out, features in ((between, hidden), (between, hidden), (hidden, between)):
        yield FastLinear(features, out, bias=False).requires_grad_(trained)


def saved(states: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> str:
    """The name of the pass that the result comes from."""
    return type(gated_mlp(states, gate, up, nn.SiLU(), down).grad_fn).__name__


def test_only_plain_layers_go_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_onednn", lambda weight: False)
    states = torch.randn(2, 4, HIDDEN, requires_grad=True)
    for trained in (False, True):
        assert saved(states, *layers(trained=trained)) == "GatedMLPBackward"
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
    monkeypatch.setattr(module, "has_onednn", lambda weight: True)
    assert saved(states, gate, up, down) == "_GatedDownBackward"
    with torch.autocast("cpu", torch.bfloat16):  # oneDNN multiplies in bfloat16 whoever asks
        assert saved(states, gate, up, down) == "GatedMLPBackward"
    half = [one.bfloat16() for one in layers(trained=False)]
    with pytest.raises(RuntimeError, match="dtype"):  # as torch's own layers do, rather than converting unasked
        saved(states, *half)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_in_bfloat16_it_is_as_near_the_exact_result_as_separate_layers(
    monkeypatch: pytest.MonkeyPatch, trained: bool, wide: bool
) -> None:
    """Of states in float32 (`wide`, as full fine-tuning has them) and in bfloat16."""
    torch.manual_seed(0)
    both = list(layers(trained=trained, hidden=64, between=192))
    given = torch.randn(1, 40, 64)
    slope = torch.randn(1, 40, 64)

    def of(states: Tensor, one_pass: bool) -> list[Tensor]:
        for one in both:
            one.weight.grad = None
        monkeypatch.setattr(module, "in_one_pass", lambda *_: one_pass)
        leaf = states.detach().clone().requires_grad_()
        result = gated_mlp(leaf, both[0], both[1], nn.SiLU(), both[2])
        result.backward(slope.to(result.dtype))
        found = [result, leaf.grad, *(one.weight.grad for one in both)]
        return [tensor.detach().double() for tensor in found if tensor is not None]

    exact = of(given, one_pass=False)
    with torch.autocast("cpu", torch.bfloat16):
        states = given if wide else given.bfloat16()
        separate, found = of(states, one_pass=False), of(states, one_pass=True)
    assert len(found) == len(exact) == (5 if trained else 2)
    for one, other, right in zip(found, separate, exact, strict=True):
        assert (one - right).norm() < 1.1 * (other - right).norm()
        assert (other - right).norm() < 0.02 * right.norm()


def test_trained_weights_get_their_gradient_in_place() -> None:
    torch.manual_seed(0)
    both = list(layers(trained=True))
    states = torch.randn(1, 6, HIDDEN)

    def gradients() -> list[Tensor]:
        for one in both:
            one.weight.grad = None
        for number in (1.0, 2.0):
            gated_mlp(number * states, both[0], both[1], nn.SiLU(), both[2]).sum().backward()
        return [one.weight.grad.clone() for one in both if one.weight.grad is not None]

    expected = gradients()
    with IN_PLACE.added():
        found = gradients()
        assert all(id(one.weight) in IN_PLACE._placed for one in both)
    torch.testing.assert_close(found, expected)


def test_the_gradients_lie_in_the_memory_of_what_they_are_gradients_of(computed_by: str) -> None:
    """Two rooms of a block, or three, and the two that are kept, forward and backward, whatever was there before."""
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
        assert (
            sorted(block.numel() for block in kept)
            == [6 * 3] * (3 if computed_by == "torch" else 2) + [6 * BETWEEN] * 2
        )
