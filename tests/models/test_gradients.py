"""Gradients added in place, against autograd's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quartet.models import gradients
from quartet.models.embedding import FastEmbedding
from quartet.models.gradients import IN_PLACE, add_narrow_product
from quartet.models.lending import LENDER
from quartet.models.linears import restore_linears, use_fast_linears
from quartet.models.precision import autocast

BATCHES = (torch.tensor([[1, 4, 4], [0, 2, 1]]), torch.tensor([[3, 3, 5]]))


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("columns", [4, 6])
@pytest.mark.parametrize("lent", [0, 99])
def test_a_narrow_product_is_added(
    filled: bool, upright: bool, columns: int, lent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 5 columns on a left side that lies upright is turned. All numbers are exact."""
    monkeypatch.setattr(gradients, "WIDE", 5)
    monkeypatch.setattr(gradients, "LENT", lent)
    torch.manual_seed(0)
    left, right = torch.randint(-3, 4, (7, 8)).bfloat16(), torch.randint(-3, 4, (8, columns)).bfloat16()
    before = torch.randint(-9, 9, (7, columns)).float() + 2**-10  # no bfloat16
    found = before.clone()
    given = left.t().contiguous().t() if upright else left
    with LENDER.keeping():
        for _ in range(2):  # in the memory of the first
            add_narrow_product(found, given, right, filled=filled)
    product = left.float() @ right.float()
    assert torch.equal(found, before + 2 * product if filled else product)
    assert torch.equal(given, left)


class Tied(nn.Module):
    """Embeddings that are also the last layer, others that are not, an inner layer, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=1)
        self.second = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.idle = nn.Linear(2, 2)
        self.head.weight = self.embedding.weight
        self.recomputed = False

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens) + self.second(tokens)
        inner = checkpoint(self.inner, states, use_reentrant=False) if self.recomputed else self.inner(states)
        result: Tensor = self.head(torch.tanh(inner)).square().sum()
        return result


def make(dtype: torch.dtype = torch.float64) -> Tied:
    torch.manual_seed(0)
    model = Tied().to(dtype)
    use_fast_linears(model)
    return model


def taken(model: Tied) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    model = make(dtype)
    for tokens in BATCHES:
        model(tokens).backward()
    return taken(model)


@pytest.fixture
def in_place() -> Iterator[None]:
    """On for the whole test."""
    with IN_PLACE.added():
        yield


@pytest.mark.parametrize("recomputed", [False, True])
def test_they_are_those_of_autograd(recomputed: bool) -> None:
    wanted = expected()
    with IN_PLACE.added():
        model = make()
        model.recomputed = recomputed
        for tokens in BATCHES:
            model(tokens).backward()
    assert taken(model).keys() == wanted.keys() == {"embedding.weight", "second.weight", "inner.weight", "inner.bias"}
    torch.testing.assert_close(taken(model), wanted)


def test_under_autocast_they_are_float32() -> None:
    wanted = expected(torch.float32)
    with IN_PLACE.added():
        model = make(torch.float32)
        for tokens in BATCHES:
            with autocast(torch.device("cpu"), torch.bfloat16):
                loss = model(tokens)
            loss.backward()
    assert {gradient.dtype for gradient in taken(model).values()} == {torch.float32}
    torch.testing.assert_close(taken(model), wanted, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("in_place")
def test_the_next_minibatch_has_their_memory_and_not_their_numbers() -> None:
    model = make()
    for tokens in BATCHES:
        model(tokens).backward()
    places = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    IN_PLACE.reset(model.parameters(), reuse=True)
    assert taken(model) == {}
    # What autograd brought (the bias) is free: nobody would take its memory.
    assert set(IN_PLACE._spare) == {model.embedding.weight, model.second.weight, model.inner.weight}
    for tokens in BATCHES:
        model(tokens).backward()
    for name in ("embedding.weight", "second.weight", "inner.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.data_ptr() == places[name]
    torch.testing.assert_close(taken(model), expected())
    IN_PLACE.reset(model.parameters(), reuse=False)
    model(BATCHES[0]).backward()
    IN_PLACE.reset(model.parameters(), reuse=True)
    IN_PLACE.forget()
    model(BATCHES[0]).backward()
    model(BATCHES[1]).backward()
    torch.testing.assert_close(taken(model), expected())


def test_the_next_update_has_their_memory_and_a_model_that_is_gone_has_none() -> None:
    model = make()
    for update in (1, 2):
        with IN_PLACE.added():
            IN_PLACE.reset(model.parameters(), reuse=True)
            assert len(IN_PLACE._spare) == (0 if update == 1 else 3)
            for tokens in BATCHES:
                model(tokens).backward()
        torch.testing.assert_close(taken(model), expected())
    weight = weakref.ref(model.inner.weight)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.usefixtures("in_place")
def test_who_waits_for_a_gradient_is_told_and_who_changes_it_is_asked() -> None:
    model, told = make(), []
    handle = model.inner.weight.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.clone()))
    model(BATCHES[0]).backward()
    assert len(told) == 1
    torch.testing.assert_close(told[0], model.inner.weight.grad)
    handle.remove()
    changed = make()
    changed.inner.weight.register_hook(lambda gradient: 3 * gradient)
    changed(BATCHES[0]).backward()
    torch.testing.assert_close(changed.inner.weight.grad, 3 * told[0])


def test_only_where_asked_for() -> None:
    model = make()
    assert not IN_PLACE.takes(model.inner.weight)
    with IN_PLACE.added(False):
        assert not IN_PLACE.takes(model.inner.weight)
    with IN_PLACE.added():
        assert IN_PLACE.takes(model.inner.weight)
        assert not IN_PLACE.takes(model.inner.weight * 2)
    (gradient,) = torch.autograd.grad(model(BATCHES[0]), model.inner.weight)
    assert gradient.shape == (4, 4)
    assert model.inner.weight.grad is None


def test_embeddings_come_back() -> None:
    model = make()
    assert type(model.embedding) is FastEmbedding
    restore_linears(model)
    assert type(model.embedding) is nn.Embedding
