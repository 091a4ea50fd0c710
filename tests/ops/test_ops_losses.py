"""Clipped losses by hand, their gradients, and their silence about masked slots."""

from __future__ import annotations

import math

import pytest
import torch

from quartet.ops.losses import (
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    policy_clipped,
    value_clipped,
)
from quartet.ops.masking import masked_mean

NAN = float("nan")
# Ratio, advantage -> loss, whether clipped, and d loss / d logprob (-A * ratio, or 0 where clipped); clip 0.8 to 1.3.
POLICY_BY_HAND = [
    (1.0, 2.0, -2.0, False, -2.0),
    (1.2, 2.0, -2.4, False, -2.4),
    (1.5, 2.0, -2.6, True, 0.0),
    (0.5, 2.0, -1.0, False, -1.0),
    (1.5, -2.0, 3.0, False, 3.0),
    (0.5, -2.0, 1.6, True, 0.0),
    (1.5, 0.0, 0.0, False, 0.0),
]
# New value, old value, return -> loss, whether clipped, gradient V - R (or 0 where clipped); clip 0.2.
VALUE_BY_HAND = [
    (0.5, 0.5, 1.0, 0.125, False, -0.5),
    (0.6, 0.5, 1.0, 0.08, False, -0.4),
    (0.9, 0.5, 1.0, 0.045, True, 0.0),
    (0.1, 0.5, 1.0, 0.405, False, -0.9),
    (2.0, 0.5, 1.0, 0.5, False, 1.0),
]


def column(rows, index):
    return torch.tensor([[row[index] for row in rows]])


def test_policy_loss_by_hand():
    logprobs = column(POLICY_BY_HAND, 0).log().requires_grad_()
    arguments = (logprobs, torch.zeros_like(logprobs), column(POLICY_BY_HAND, 1), torch.ones(1, 7, dtype=torch.bool))
    loss = clipped_policy_loss(*arguments, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, column(POLICY_BY_HAND, 2))
    clipped = policy_clipped(*arguments, clip_low=0.2, clip_high=0.3)
    assert clipped.equal(column(POLICY_BY_HAND, 3))
    assert not clipped.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, column(POLICY_BY_HAND, 4))


def test_value_loss_by_hand():
    values = column(VALUE_BY_HAND, 0).requires_grad_()
    arguments = (values, column(VALUE_BY_HAND, 1), column(VALUE_BY_HAND, 2), torch.ones(1, 5, dtype=torch.bool))
    loss = clipped_value_loss(*arguments, clip=0.2)
    torch.testing.assert_close(loss, column(VALUE_BY_HAND, 3))
    assert value_clipped(*arguments, clip=0.2).equal(column(VALUE_BY_HAND, 4))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, column(VALUE_BY_HAND, 5))


def test_value_loss_without_clip_is_half_the_squared_error():
    values, old, returns = (column(VALUE_BY_HAND, index) for index in range(3))
    mask = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, mask, clip=None), (values - returns) ** 2 / 2)
    assert not value_clipped(values, old, returns, mask, clip=None).any()


@pytest.mark.parametrize("junk", [NAN, float("inf"), -float("inf"), 1e30])
def test_masked_slots_never_matter(junk):
    """NaN or overflow in a masked slot reaches neither loss, nor indicator, nor gradient, whichever input holds it."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    clean = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    dirty = [each.masked_fill(~mask, junk) for each in clean]

    def outcome(first, second, third):
        first = first.clone().requires_grad_()
        policy = clipped_policy_loss(first, second, third, mask, clip_low=0.2, clip_high=0.2)
        value = clipped_value_loss(first, second, third, mask, clip=0.2)
        moved = approx_kl(first, second, mask)
        (gradient,) = torch.autograd.grad((policy + value + moved).sum(), first)
        assert policy[~mask].eq(0).all()
        assert value[~mask].eq(0).all()
        assert moved[~mask].eq(0).all()
        assert gradient[~mask].eq(0).all()
        return (
            policy.detach(),
            value.detach(),
            moved.detach(),
            gradient,
            policy_clipped(first, second, third, mask, clip_low=0.2, clip_high=0.2),
            value_clipped(first, second, third, mask, clip=0.2),
            explained_variance(first.detach(), third, mask),
        )

    for got, expected in zip(outcome(*dirty), outcome(*clean), strict=True):
        assert got.equal(expected)


def test_extra_columns_of_padding_change_no_loss_and_no_metric():
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tensors = [torch.randn(2, 3, generator=generator) for _ in range(3)]

    def numbers(first, second, third, mask):
        return [
            masked_mean(clipped_policy_loss(first, second, third, mask, clip_low=0.2, clip_high=0.2), mask),
            masked_mean(clipped_value_loss(first, second, third, mask, clip=0.2), mask),
            masked_mean(policy_clipped(first, second, third, mask, clip_low=0.2, clip_high=0.2).float(), mask),
            masked_mean(value_clipped(first, second, third, mask, clip=0.2).float(), mask),
            masked_mean(approx_kl(first, second, mask), mask),
            explained_variance(first, third, mask),
        ]

    wide = [torch.nn.functional.pad(each, (0, 5), value=NAN) for each in tensors]
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    torch.testing.assert_close(numbers(*wide, wide_mask), numbers(*tensors, mask), rtol=1e-6, atol=1e-6)


def test_sums_over_microbatches_equal_the_minibatch():
    """Ragged rows: normalised by the tokens of the whole minibatch, the cut into microbatches changes no gradient."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(6) < torch.tensor([[1], [6], [3], [2]])
    new, old, advantages = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))

    def gradient(rows_at_once):
        leaf = new.clone().requires_grad_()
        for rows in torch.arange(4).split(rows_at_once):
            loss = clipped_policy_loss(leaf[rows], old[rows], advantages[rows], mask[rows], clip_low=0.2, clip_high=0.2)
            (loss.sum() / mask.sum()).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(1), gradient(4))
    torch.testing.assert_close(gradient(3), gradient(4))


def test_approx_kl_by_hand():
    moved = approx_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, NAN]]), torch.tensor([[True, False]]))
    assert moved.tolist() == [[0.125, 0.0]]


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, NAN]])
    assert explained_variance(returns.clone(), returns, mask).item() == 1.0
    assert explained_variance(torch.full_like(returns, 9.0), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    # Half the return: the residual has a quarter of the variance. An offset of the values changes nothing.
    assert explained_variance(returns / 2 + 3, returns, mask).item() == pytest.approx(0.75, abs=1e-6)
    constant = torch.full_like(returns, 2.0)
    assert explained_variance(returns, constant, mask).item() == 0.0


def test_ratio_is_the_exponential_of_the_difference_in_nats():
    loss = clipped_policy_loss(
        torch.tensor([[-1.0]]), torch.tensor([[-1.1]]), torch.tensor([[1.0]]), torch.tensor([[True]]),
        clip_low=0.2, clip_high=0.2,
    )  # fmt: skip
    assert loss.item() == pytest.approx(-math.exp(0.1), abs=1e-6)
