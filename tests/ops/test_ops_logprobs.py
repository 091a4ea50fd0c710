"""Chunked log-probabilities: the plain computation's numbers and gradients, without its memory."""

from __future__ import annotations

import pytest
import torch
from small_heads import N, V, make

from quartet.ops.logprobs import chunked_logprobs, entropy, token_logprobs

CHUNKS = [1, 4, 11, 100]


def reference(logits, tokens, temperature):
    """Log-probabilities and entropy from the definition."""
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(tokens), distribution.entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy_of_logits(temperature):
    logits = 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(N)
    logprobs, entropies = reference(logits.double(), tokens, temperature)
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature).double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy(logits, temperature).double(), entropies, rtol=0, atol=1e-5)


def test_low_precision_logits_give_float32_and_double_stays():
    logits = torch.randn(N, V, dtype=torch.bfloat16)
    assert token_logprobs(logits, torch.arange(N), 1.0).dtype == torch.float32
    assert entropy(logits, 1.0).dtype == torch.float32
    assert entropy(logits.double(), 1.0).dtype == torch.float64


def test_entropy_of_uniform_and_of_excluded_tokens():
    logits = torch.full((1, 8), -float("inf"))
    logits[0, :4] = 1000.0
    expected = torch.tensor([4.0]).log()
    torch.testing.assert_close(entropy(logits, 1.0), expected)
    chunked = chunked_logprobs(
        logits, lambda x: x, torch.tensor([1]), temperature=1.0, chunk_tokens=1, with_entropy=True, head_trainable=False
    )
    torch.testing.assert_close(chunked[0], -expected)
    torch.testing.assert_close(chunked[1], expected)


def test_improbable_token_keeps_its_logprob():
    """A probability that underflows float32 has a finite log-probability."""
    logits = torch.tensor([[0.0, -500.0]])
    chunked, _ = chunked_logprobs(
        logits,
        lambda x: x,
        torch.tensor([1]),
        temperature=1.0,
        chunk_tokens=1,
        with_entropy=False,
        head_trainable=False,
    )
    assert chunked.item() == -500.0


@pytest.mark.parametrize("kind", ["plain", "capped"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mode", ["no_grad", "frozen", "frozen_entropy_grad", "trainable", "trainable_entropy_grad"])
def test_equals_the_plain_computation(mode, temperature, chunk, kind):
    """Values, gradients to the hidden states and gradients to the head's weights, for each way of computing them."""
    trainable, entropy_grad = mode.startswith("trainable"), mode.endswith("entropy_grad")
    head, hidden, tokens, weight, entropy_weight = make(kind, trainable=trainable)
    if mode == "no_grad":
        hidden.requires_grad_(False)
    logprobs, entropies = chunked_logprobs(
        hidden,
        head,
        tokens,
        temperature=temperature,
        chunk_tokens=chunk,
        with_entropy=True,
        head_trainable=trainable,
        entropy_grad=entropy_grad,
    )
    expected_logprobs, expected_entropies = reference(head(hidden), tokens, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=0, atol=1e-5)
    assert entropies.requires_grad == entropy_grad
    if mode == "no_grad":
        assert not logprobs.requires_grad
        return
    loss, expected_loss = (logprobs * weight).sum(), (expected_logprobs * weight).sum()
    if entropy_grad:
        loss = loss + (entropies * entropy_weight).sum()
        expected_loss = expected_loss + (expected_entropies * entropy_weight).sum()
    leaves = [hidden, *(parameter for parameter in head.parameters() if trainable)]
    for got, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, leaves), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "capped"])
@pytest.mark.parametrize("mode", ["frozen", "frozen_entropy_grad", "trainable_entropy_grad"])
def test_gradcheck_in_double_precision(mode, kind):
    trainable, entropy_grad = mode.startswith("trainable"), mode.endswith("entropy_grad")
    head, hidden, tokens, _, _ = make(kind, dtype=torch.float64, trainable=trainable)
    parameters = [parameter for parameter in head.parameters() if trainable]

    def function(hidden, *_):
        logprobs, entropies = chunked_logprobs(
            hidden,
            head,
            tokens,
            temperature=0.7,
            chunk_tokens=4,
            with_entropy=True,
            head_trainable=trainable,
            entropy_grad=entropy_grad,
        )
        return (logprobs, entropies) if entropy_grad else logprobs

    assert torch.autograd.gradcheck(function, (hidden, *parameters), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("trainable", [False, True])
def test_any_chunk_size_gives_the_same_numbers(trainable):
    head, hidden, tokens, weight, _ = make(dtype=torch.float64, trainable=trainable)

    def outcome(chunk):
        logprobs, entropies = chunked_logprobs(
            hidden, head, tokens, temperature=0.9, chunk_tokens=chunk, with_entropy=True, head_trainable=trainable
        )
        (gradient,) = torch.autograd.grad((logprobs * weight).sum(), hidden)
        return logprobs.detach(), entropies, gradient

    for chunk in CHUNKS:
        torch.testing.assert_close(outcome(chunk), outcome(N), rtol=0, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_retained_graph_gives_the_same_gradient_again(trainable):
    head, hidden, tokens, weight, entropy_weight = make(trainable=trainable)
    logprobs, entropies = chunked_logprobs(
        hidden,
        head,
        tokens,
        temperature=0.7,
        chunk_tokens=4,
        with_entropy=True,
        head_trainable=trainable,
        entropy_grad=True,
    )
    loss = (logprobs * weight + entropies * entropy_weight).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert second.equal(first)
    (only_entropy,) = torch.autograd.grad((entropies * entropy_weight).sum(), hidden, retain_graph=True)
    (only_logprobs,) = torch.autograd.grad((logprobs * weight).sum(), hidden)
    torch.testing.assert_close(only_entropy + only_logprobs, first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_autocast(trainable):
    """The head runs in bfloat16, everything after it in float32: the numbers are those of the bfloat16 logits."""
    head, hidden, tokens, weight, _ = make(trainable=trainable)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropies = chunked_logprobs(
            hidden, head, tokens, temperature=0.7, chunk_tokens=4, with_entropy=True, head_trainable=trainable
        )
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    expected, expected_entropies = reference(logits.double(), tokens, 0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=0, atol=1e-5)

    (gradient,) = torch.autograd.grad((logprobs * weight).sum(), hidden)
    (exact,) = torch.autograd.grad((reference(head(hidden), tokens, 0.7)[0] * weight).sum(), hidden)
    assert gradient.dtype == torch.float32
    # bfloat16 keeps 8 bits, so a relative error of 2^-8 per rounding; a wrong formula is off by far more.
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_a_trainable_head_announced_as_frozen_is_refused():
    head, hidden, tokens, _, _ = make(trainable=True)
    with pytest.raises(AssertionError, match="head_trainable must be True"):
        chunked_logprobs(
            hidden, head, tokens, temperature=1.0, chunk_tokens=4, with_entropy=False, head_trainable=False
        )


@pytest.mark.parametrize("trainable", [False, True])
def test_no_tokens_at_all(trainable):
    head, hidden, tokens, _, _ = make(trainable=trainable)
    logprobs, entropies = chunked_logprobs(
        hidden[:0], head, tokens[:0], temperature=1.0, chunk_tokens=4, with_entropy=True, head_trainable=trainable
    )
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.eq(0).all()
