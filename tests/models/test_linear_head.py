"""Log-probabilities under a trained linear head, in blocks of the vocabulary, against plain softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import FAMILIES
from pipeline import Pipeline
from quartet.models import heads, linear_head
from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.linear_head import linear_logprobs
from quartet.models.linears import Weights
from quartet.models.precision import autocast
from quartet.ops.logprobs import entropy, token_logprobs
from tiny import TinyRun

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and tiles, the last of each smaller than the others."""
    monkeypatch.setattr(linear_head, "BLOCK", 7)
    monkeypatch.setattr(linear_head, "TILE", 3)


def make(count: int, *, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Weights, Tensor]:
    torch.manual_seed(1)
    weight = nn.Parameter((3 * torch.randn(25, 4)).to(dtype))
    shift = nn.Parameter(torch.randn(25).to(dtype)) if bias else None
    return torch.randn(count, 4).to(dtype).requires_grad_(), Weights(weight, shift), torch.randint(0, 25, (count,))


def results(
    found: tuple[Tensor, Tensor | None], hidden: Tensor, head: Weights, *, entropy_grad: bool
) -> list[Tensor | None]:
    """Both results, and the gradients of a weighted sum of them."""
    logprobs, entropies = found
    torch.manual_seed(2)
    loss = (logprobs * torch.randn(len(logprobs), dtype=logprobs.dtype)).sum()
    if entropy_grad:
        assert entropies is not None
        loss = loss + (entropies * torch.randn(len(logprobs), dtype=logprobs.dtype)).sum()
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    return [logprobs.detach(), entropies, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("count", [8, 2, 0])
def test_results_and_gradients_are_those_of_a_plain_softmax(
    bias: bool, entropy_grad: bool, temperature: float, count: int
) -> None:
    hidden, head, tokens = make(count, bias=bias)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    plain = token_logprobs(logits, tokens, temperature), entropy(logits, temperature)
    found = linear_logprobs(hidden, head, tokens, temperature=temperature, with_entropy=True, entropy_grad=entropy_grad)
    assert found[1] is not None
    assert found[1].requires_grad is entropy_grad
    expected = results(plain, hidden, head, entropy_grad=entropy_grad)
    torch.testing.assert_close(results(found, hidden, head, entropy_grad=entropy_grad), expected)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradients_by_differences(entropy_grad: bool) -> None:
    hidden, head, tokens = make(5, bias=True)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        wanted = {"with_entropy": entropy_grad, "entropy_grad": entropy_grad}
        found = linear_logprobs(hidden, Weights(weight, bias), tokens, temperature=0.9, **wanted)
        return found if entropy_grad else found[0]

    assert torch.autograd.gradcheck(function, (hidden, head.weight, head.bias))


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    hidden, head, tokens = make(6, bias=True)
    tokens = tokens.clamp(min=8)
    assert head.bias is not None
    with torch.no_grad():
        head.bias[:8] = -torch.inf  # a whole block, and one token of the next
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    logprobs, entropies = linear_logprobs(hidden, head, tokens, temperature=1.0, with_entropy=True, entropy_grad=False)
    torch.testing.assert_close(logprobs, token_logprobs(logits, tokens, 1.0))
    torch.testing.assert_close(entropies, entropy(logits, 1.0))


def test_under_autocast_it_computes_in_bfloat16_and_answers_in_float32() -> None:
    hidden, head, tokens = make(8, bias=False, dtype=torch.float32)
    with autocast(CPU, torch.bfloat16):
        logprobs, _ = linear_logprobs(hidden, head, tokens, temperature=1.0, with_entropy=False, entropy_grad=False)
    logits = (hidden.bfloat16() @ head.weight.t().bfloat16()).float()
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits, tokens, 1.0))
    by_hidden, by_weight = torch.autograd.grad(logprobs.sum(), (hidden, head.weight))
    expected = torch.autograd.grad(token_logprobs(hidden @ head.weight.t(), tokens, 1.0).sum(), (hidden, head.weight))
    assert (by_hidden.dtype, by_weight.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close((by_hidden, by_weight), expected, rtol=0.05, atol=0.15)


def test_in_place_it_adds_to_the_gradient_that_is_there() -> None:
    hidden, head, tokens = make(8, bias=False)
    wanted = {"temperature": 1.0, "with_entropy": False, "entropy_grad": False}
    (by_weight,) = torch.autograd.grad(linear_logprobs(hidden, head, tokens, **wanted)[0].sum(), head.weight)
    with IN_PLACE.added():
        linear_logprobs(hidden, head, tokens, **wanted)[0].sum().backward()
        first = head.weight.grad
        linear_logprobs(hidden, head, tokens, **wanted)[0].sum().backward()
    assert head.weight.grad is first
    torch.testing.assert_close(head.weight.grad, 2 * by_weight)


def test_the_weight_is_converted_once_where_copies_are_kept() -> None:
    hidden, head, tokens = make(8, bias=False, dtype=torch.float32)
    wanted = {"temperature": 1.0, "with_entropy": False, "entropy_grad": False}

    def gradients() -> list[Tensor]:
        with autocast(CPU, torch.bfloat16):
            logprobs, _ = linear_logprobs(hidden, head, tokens, **wanted)
        return [logprobs, *torch.autograd.grad(logprobs.sum(), (hidden, head.weight))]

    alone, copies = gradients(), list[Tensor]()
    with CONVERTED.keeping():
        for _ in range(2):
            assert all(map(torch.equal, gradients(), alone))
            copies += (CONVERTED._kept or {}).values()
    assert len(copies) == 2
    assert copies[0] is copies[1]


class Plain(nn.Module):
    """A forward as most families write it."""

    def forward(self, ids: Tensor) -> Any:
        outputs: Any = self.model(ids)
        hidden_states = outputs.last_hidden_state
        hidden_states = hidden_states[:, slice_indices, :]  # type: ignore[name-defined] # noqa: F821
        logits = self.lm_head(hidden_states)

        loss = None
        return logits, loss


class ScaledBefore(nn.Module):
    """As MiniCPM3."""

    def forward(self, ids: Tensor) -> Any:
        outputs: Any = self.model(ids)
        hidden_states = outputs.last_hidden_state
        hidden_states = hidden_states / self.config.logits_scaling
        logits = self.lm_head(hidden_states)

        loss = None
        return logits, loss


class ScaledInPlace(nn.Module):
    """The same in other words."""

    def forward(self, ids: Tensor) -> Any:
        outputs: Any = self.model(ids)
        hidden_states = outputs[0]
        hidden_states *= 2
        logits = self.lm_head(hidden_states)

        loss = None
        return logits, loss


class ScaledAfter(nn.Module):
    """As Cohere and Granite."""

    def forward(self, ids: Tensor) -> Any:
        outputs: Any = self.model(ids)
        hidden_states = outputs[0]
        logits = self.lm_head(hidden_states)
        logits = logits * self.logit_scale

        loss = None
        return logits, loss


@pytest.mark.parametrize("kind", [Plain, ScaledBefore, ScaledInPlace, ScaledAfter])
def test_what_happens_to_states_and_logits_is_read_in_the_source(kind: Any) -> None:
    assert heads._is_linear(kind.forward) is (kind is Plain)
    assert not heads._is_linear(None)


@pytest.mark.parametrize("bias", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_impossible_tokens_leave_gradients_finite(bias: float) -> None:
    hidden, head, tokens = make(6, bias=True, dtype=torch.float32)
    tokens = tokens.clamp(min=8)
    assert head.bias is not None
    with torch.no_grad():
        head.bias[:8] = bias
    logprobs, entropies = linear_logprobs(hidden, head, tokens, temperature=0.5, with_entropy=True, entropy_grad=True)
    assert entropies is not None
    found = torch.autograd.grad(logprobs.sum() + 10 * entropies.sum(), (hidden, head.weight))
    possible = nn.functional.linear(hidden.double(), head.weight.double()[8:], head.bias.double()[8:])
    plain = token_logprobs(possible, tokens - 8, 0.5).sum() + 10 * entropy(possible, 0.5).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, (hidden, head.weight)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_taken_apart_only_where_its_logits_are_all_there_is(tiny_run: TinyRun, family: str) -> None:
    """Gemma2 caps its logits."""
    head = Pipeline(tiny_run(family)).roles.policy.head
    assert (head.linear is None) is (family == "gemma2")
    hidden = torch.randn(5, 32)
    if head.linear is not None:
        assert torch.equal(head(hidden), nn.functional.linear(hidden, head.linear.weight, head.linear.bias))
