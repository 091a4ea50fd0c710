"""Log-probabilities under a frozen linear head, and their gradient, against plain softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import Pipeline, sequences
from quartet.models import frozen_head, roles
from quartet.models.frozen_head import frozen_logprobs
from quartet.models.linears import Weights
from quartet.models.precision import autocast
from quartet.ops.logprobs import entropy, token_logprobs
from tiny import TinyRun


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and tiles, the last of each smaller than the others."""
    monkeypatch.setattr(frozen_head, "BLOCK", 7)
    monkeypatch.setattr(frozen_head, "TILE", 3)


def make(count: int, *, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Weights, Tensor]:
    torch.manual_seed(1)
    weight, shift = (3 * torch.randn(25, 4)).to(dtype), torch.randn(25).to(dtype) if bias else None
    return torch.randn(count, 4).to(dtype).requires_grad_(), Weights(weight, shift), torch.randint(0, 25, (count,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("count", [8, 2, 0])
def test_results_and_gradient_are_those_of_a_plain_softmax(
    bias: bool, with_entropy: bool, temperature: float, count: int
) -> None:
    hidden, head, tokens = make(count, bias=bias)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    found, entropies = frozen_logprobs(hidden, head, tokens, temperature=temperature, with_entropy=with_entropy)
    expected = token_logprobs(logits, tokens, temperature)
    torch.testing.assert_close(found, expected)
    if with_entropy:
        assert entropies is not None
        assert not entropies.requires_grad
        torch.testing.assert_close(entropies, entropy(logits, temperature).detach())
    else:
        assert entropies is None
    upstream = torch.randn(count, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, hidden, upstream), torch.autograd.grad(expected, hidden, upstream)
    )


def test_an_impossible_token_counts_nowhere() -> None:
    hidden, head, tokens = make(6, bias=True)
    tokens = tokens.clamp(min=8)
    assert head.bias is not None
    head.bias[:8] = -torch.inf  # a whole block, and one token of the next
    found, entropies = frozen_logprobs(hidden, head, tokens, temperature=0.5, with_entropy=True)
    possible = nn.functional.linear(hidden, head.weight[8:], head.bias[8:])
    expected = token_logprobs(possible, tokens - 8, 0.5)
    torch.testing.assert_close((found, entropies), (expected, entropy(possible, 0.5).detach()))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(expected.sum(), hidden))


def test_under_autocast_it_computes_in_bfloat16_and_answers_in_float32() -> None:
    hidden, head, tokens = make(8, bias=False, dtype=torch.float32)
    with autocast(torch.device("cpu"), torch.bfloat16):
        found, _ = frozen_logprobs(hidden, head, tokens, temperature=1.0, with_entropy=False)
    logits = (hidden.bfloat16() @ head.weight.t().bfloat16()).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_logprobs(logits, tokens, 1.0))
    (by_hidden,) = torch.autograd.grad(found.sum(), hidden)
    (expected,) = torch.autograd.grad(token_logprobs(hidden @ head.weight.t(), tokens, 1.0).sum(), hidden)
    assert by_hidden.dtype == torch.float32
    torch.testing.assert_close(by_hidden, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("logit", [4.0, 8.0])
def test_a_confident_token_keeps_its_gradient_in_bfloat16(logit: float) -> None:
    """Of a probability of 0.7 or 0.99 what is left to the other tokens is the gradient, and no rounding of the token's own."""
    torch.manual_seed(3)
    weight, tokens = torch.randn(25, 8).bfloat16(), torch.arange(8)
    weight[:8] = logit * torch.eye(8)
    hidden = torch.eye(8).bfloat16().requires_grad_()
    found, _ = frozen_logprobs(hidden, Weights(weight, None), tokens, temperature=1.0, with_entropy=False)
    (by_hidden,) = torch.autograd.grad(found.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(token_logprobs(exact @ weight.double().t(), tokens, 1.0).sum(), exact)
    off = (by_hidden.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < 0.02


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_a_frozen_policy_head_takes_it_and_gives_the_same(
    entropy_grad: bool, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the entropy needs a gradient too, and without gradients, the general way is taken."""
    pipeline = Pipeline(tiny_run(**{"models.lora": {"r": 4}}))
    batch, mask = sequences([[5, 9, 30, 31, 32], [7]], [[40, 41, 42, 43], [50, 51]])
    calls: list[int] = []

    def spy(*given: Any, **wanted: Any) -> Any:
        calls.append(len(given[0]))
        return frozen_logprobs(*given, **wanted)

    monkeypatch.setattr(roles, "frozen_logprobs", spy)

    def run() -> list[Tensor]:
        pipeline.loaded.optimizer.zero_grad(set_to_none=True)
        found = pipeline.roles.policy(batch, mask, temperature=0.8, with_entropy=True, entropy_grad=entropy_grad)
        (found[0] * torch.linspace(1, 2, mask.shape[1])).sum().backward()
        return [*found, *pipeline.gradients().values()]

    found = run()
    assert calls == ([] if entropy_grad else [6])
    with torch.no_grad():
        pipeline.roles.policy(batch, mask, temperature=0.8)
    assert len(calls) == (not entropy_grad)
    monkeypatch.setattr(roles.LanguageView, "_linear_head", lambda _: None)
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
