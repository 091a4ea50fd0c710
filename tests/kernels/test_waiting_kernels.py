"""Calls of kernels that wait for each other compute what they compute one by one."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet import kernels
from quartet.kernels import Term, library, multiplying, waiting
from quartet.models.gated_mlp import GatedMLP
from quartet.models.linears import lora_linear
from quartet.models.projections import Projections

pytestmark = pytest.mark.skipif(library.kernel("run") is None, reason="no compiler at installation")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by kernels on every processor, and at every size."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> Iterator[None]:
    """Note the kernels that are called."""

    def kernel(name: str) -> Callable[..., None] | None:
        function = library.kernel(name)
        return function and (lambda *given: (names.append(name), function(*given))[1])

    with monkeypatch.context() as patch:
        for module in (multiplying, waiting, kernels.elementwise):
            patch.setattr(module, "kernel", kernel)
        yield


def chain(block: AbstractContextManager[None]) -> list[Tensor]:
    """A gated product and its gradient, of intermediates that nobody keeps."""
    torch.manual_seed(0)
    states, weights = torch.randn(70, 40), [torch.randn(90, 40) for _ in range(2)]
    with block:
        gate, up = (torch.empty(70, 90) for _ in range(2))
        assert kernels.multiply(gate, Term(states, weights[0].t()))
        assert kernels.multiply(up, Term(states, weights[1].t(), 0.5), bias=torch.ones(90))
        product, again, out = torch.empty(70, 90), torch.empty(70, 90), torch.empty(70, 40)
        assert kernels.silu_product(gate, up, product)
        assert kernels.multiply(out, Term(product, weights[0]))
        assert kernels.multiply(out, Term(torch.ones(70, 90), weights[1]), add=True)
        assert kernels.silu_gradient(product, gate, up, gate, up, again)
        assert kernels.silu_gradient(product, gate, up, gate, up, None)
        del product
    return [gate, up, again, out]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_chain(generation: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    names: list[str] = []
    with counted(monkeypatch, names):
        found = chain(kernels.together(True))
    assert names == ["run"]
    assert all(map(torch.equal, found, chain(nullcontext())))


def layer(block: AbstractContextManager[None]) -> list[Tensor]:
    """What stands around products in a layer, and its gradients, each of what the one before gave."""
    torch.manual_seed(0)
    states, weight = torch.randn(1, 70, 64), torch.randn(64)
    cosines, sines = torch.randn(1, 70, 32), torch.randn(1, 70, 32)
    bounds = torch.tensor([0, 30, 67])
    with block:
        sums = torch.ones(1, 70, 64)
        found = kernels.rms_norm(states, weight, 1e-3, sums=sums)
        assert found is not None
        normal, scales = found
        heads = kernels.rotary(normal.view(1, 70, 2, 32).transpose(1, 2), cosines, sines, back=False)
        mixed = kernels.attention(heads, heads, heads, bounds, 37, 0.2)
        assert kernels.add(mixed.flatten(2), sums)
        by = kernels.attention_gradient(heads, heads, heads, mixed, mixed, bounds, 37, 0.2)
        by_heads = kernels.rotary(by[0], cosines, sines, back=True).transpose(1, 2).flatten(2)
        gradients = kernels.rms_norm_gradient(by_heads, sums, weight, scales, of_weight=True, also=mixed.flatten(2))
        assert gradients is not None
        del by_heads, heads
    return [sums, normal, scales, mixed, *by, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_stands_around_products(generation: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    names: list[str] = []
    with counted(monkeypatch, names):
        found = layer(kernels.together(True))
    assert names == ["run"]
    with counted(monkeypatch, names):
        expected = layer(nullcontext())
    assert names[1:] == [
        *("rms_norm_f32", "rotary_f32_f32", "attention_f32", "add_f32"),
        *("attention_gradient_f32", "rotary_f32_f32", "rms_norm_gradient_f32"),
    ]
    assert all(map(torch.equal, found, expected))


def test_nothing_waits_where_it_is_not_wanted_and_an_inner_block_waits_for_the_outer() -> None:
    out, left = torch.zeros(8, 8), torch.ones(8, 8)
    with kernels.together(False):
        assert kernels.multiply(out, Term(left, left))
        assert (out == 8).all()
    with kernels.together(True):
        with kernels.together(True):
            assert kernels.multiply(out, Term(left, left, 2.0))
        assert (out == 8).all()
        kernels.caught_up()
        assert (out == 16).all()
        assert kernels.multiply(out, Term(left, left, 3.0))
        assert (out == 16).all()
    assert (out == 24).all()


@pytest.mark.parametrize(
    "refused",
    [
        lambda: kernels.multiply(torch.zeros(2, 2, dtype=torch.float64), Term(torch.zeros(2, 2), torch.zeros(2, 2))),
        lambda: kernels.silu_product(*(torch.zeros(2, 2).t()[:, :1] for _ in range(2)), torch.zeros(3, 3)),
        lambda: kernels.silu_gradient(*(torch.zeros(2, 2) for _ in range(4)), torch.zeros(3, 3), None),
        lambda: not kernels.silu_product(*(torch.zeros(2, 2, dtype=torch.bfloat16) for _ in range(3))),
        lambda: kernels.add(torch.zeros(2, 2), torch.zeros(3, 2)),
        lambda: kernels.rms_norm(torch.zeros(2, 2), torch.zeros(3), 1e-6),
        lambda: kernels.rms_norm_gradient(*(torch.zeros(2, 2) for _ in range(4)), of_weight=True),
        lambda: not kernels.rms_norm(torch.zeros(2, 2).bfloat16(), torch.zeros(2).bfloat16(), 1e-6),
    ],
)
def test_what_cannot_wait_catches_up_first(refused: Callable[[], bool]) -> None:
    """Torch computes then, or the kernel at once."""
    out, left = torch.zeros(8, 8), torch.ones(8, 8)
    with kernels.together(True):
        assert kernels.multiply(out, Term(left, left))
        assert not refused()
        assert (out == 8).all()


def test_a_room_that_grows_is_not_taken_from_what_waits() -> None:
    """More threads need a larger one; what waits has the address of the one before."""
    multiplying._kept.__dict__.clear()
    terms = [Term(torch.randn(100, 300), torch.randn(300, 200)) for _ in range(2)]
    outs = [torch.full((100, 200), torch.nan) for _ in terms]
    torch.set_num_threads(1)
    with kernels.together(True):
        assert kernels.multiply(outs[0], terms[0])
        assert outs[0].isnan().all()
        torch.set_num_threads(4)
        assert kernels.multiply(outs[1], terms[1])
        assert not outs[0].isnan().any()
        assert outs[1].isnan().all()
    for out, term in zip(outs, terms, strict=True):
        torch.testing.assert_close(out, (term.left.double() @ term.right.double()).float(), rtol=1e-5, atol=1e-4)


def test_after_an_error_nothing_waits() -> None:
    out, left = torch.zeros(8, 8), torch.ones(8, 8)

    def stopped() -> None:
        with kernels.together(True):
            assert kernels.multiply(out, Term(left, left))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert not out.any()
    assert kernels.multiply(out, Term(left, left))
    assert (out == 8).all()


def test_threads_wait_each_for_themselves() -> None:
    found: list[bool] = []

    def other() -> None:
        out = torch.zeros(8, 8)
        kernels.multiply(out, Term(torch.ones(8, 8), torch.ones(8, 8)))
        found.append(bool((out == 8).all()))

    with kernels.together(True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [True]


def test_in_a_plan_nothing_is_computed() -> None:
    with FakeTensorMode(), kernels.together(True):
        out = torch.empty(8, 8)
        assert kernels.multiply(out, Term(out.clone(), out.clone()))
        assert kernels.silu_product(out, out, out)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernels.multiply(torch.empty(16, 16), Term(x[0], x[0].t())),
        lambda x: kernels.add(torch.empty(1, 16, 32), x),
        lambda x: kernels.silu_product(x[0], x[0], torch.empty(16, 32)),
        lambda x: kernels.silu_gradient(*(x[0] for _ in range(3)), torch.empty(16, 32), torch.empty(16, 32), None),
        lambda x: kernels.rms_norm(x, torch.empty(32), 1e-6),
        lambda x: kernels.rms_norm_gradient(x, x, torch.empty(32), torch.empty(1, 16, 1), of_weight=True),
        lambda x: kernels.rotary(x[None], torch.empty(1, 16, 32), torch.empty(1, 16, 32), back=False),
        lambda x: kernels.attention(x[None], x[None], x[None], torch.empty(2, dtype=torch.int64), 16, 0.2),
        lambda x: kernels.attention_gradient(
            *(x[None] for _ in range(3)), x[:, :, None], x[:, :, None], torch.empty(2, dtype=torch.int64), 16, 0.2
        ),
    ],
)
def test_in_a_plan_what_would_wait_is_held(call: Callable[[Tensor], Any]) -> None:
    """Its memory counts until the kernels would be called."""
    with FakeTensorMode(), kernels.together(True):
        given = torch.empty(1, 16, 32)
        memory = weakref.ref(given.untyped_storage())
        assert call(given) is not False
        del given
        gc.collect()
        assert memory() is not None
        kernels.caught_up()
        gc.collect()
        assert memory() is None


def tensors(out: int, features: int, *, bias: bool, adapter: bool, trained: bool) -> list[Tensor | None]:
    def one(*shape: int, grad: bool) -> Tensor:
        return torch.randn(*shape).requires_grad_(grad)

    return [
        one(out, features, grad=trained),
        one(out, grad=trained) if bias else None,
        one(3, features, grad=True) if adapter else None,
        one(out, 3, grad=True) if adapter else None,
    ]


def passes(layers: list[list[Tensor | None]], run: Callable[[Tensor, list[Tensor | None]], Any]) -> list[Tensor]:
    """Results, and the gradients of a weighted sum of them."""
    states, given = torch.randn(2, 9, 12, requires_grad=True), list(itertools.chain(*layers))
    results = run(states, given)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(((result * torch.randn_like(result)).sum() for result in results), torch.zeros(()))
    asked = [states, *(t for t in given if t is not None and t.requires_grad)]
    return [*results, *torch.autograd.grad(loss, asked)]


@pytest.mark.parametrize("smallest", [0, 9 * 3 * 20 * 2, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "adapter", "trained"),
    [
        *itertools.product(("silu", "gelu", "projections"), (False, True), (False, True)),
        ("lora", True, False),
    ],
)
def test_whole_passes_are_bit_for_bit_the_same(
    kind: str, bias: bool, adapter: bool, trained: bool, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all products by kernels, with some, and with none."""
    monkeypatch.setattr(multiplying, "SMALLEST", smallest)
    wanted = {"bias": bias, "adapter": adapter, "trained": trained}

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        if kind == "lora":
            layers = [tensors(20, 12, bias=bias, adapter=True, trained=False)]
            return passes(layers, lambda x, given: lora_linear(x, *given, 0.3))
        layers = [tensors(out, 12, **wanted) for out in (12, 8, 8)]
        if kind == "projections":
            return passes(layers, lambda x, given: Projections.apply(x, [0.3, 0.4, 0.5], *given))
        layers = [tensors(20, 12, **wanted), tensors(20, 12, **wanted), tensors(12, 20, **wanted)]
        activation = nn.SiLU() if kind == "silu" else nn.functional.gelu
        return passes(layers, lambda x, given: GatedMLP.apply(x, activation, [0.3, 0.4, 0.5], *given))

    names: list[str] = []
    with counted(monkeypatch, names):
        found = run()
    if smallest == 0 and kind != "gelu":  # as often as a gradient of a bias has to be taken by torch, and once a pass
        assert names.count("run") >= 2
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "together", lambda _: nullcontext())
        expected = run()
    assert all(map(torch.equal, found, expected))
